"""GGUF files of real shapes with random weights, so that every engine can be timed at the sizes people run.

Blocks of quantized types are made as such, random bits under scales that give weights of a usual size: no
floats are quantized, so that a file of 4B weights is written about as quickly as a disk takes it, piece by
piece. The vocabulary has the right size and no meaning: prompts are random ids.

Run: python bench/random_models.py SHAPE [MIX ...] [--max-gb 16]
"""

import argparse
import os
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType
from numpy.typing import NDArray

from bench.shapes import MIXES, SHAPES, Shape, bytes_of, type_of
from pagellm.engine.cache import cache_dir
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE

PIECE_BYTES = 16 << 20
STANDARD_DEVIATION = 0.02  # of weights, as training starts with
ALIGNMENT = 32

# Where a block has its float16 scale and minimum, and what a scale of 1 makes of random bits: the standard
# deviation of the weights, and the mean of what the minimum takes away.
_SCALED = {
    "Q8_0": (0, None, 74.0, 0.0),
    "Q4_0": (0, None, 4.6, 0.0),
    "Q4_1": (0, 2, 4.6, 7.5),
    "Q5_0": (0, None, 9.2, 0.0),
    "Q5_1": (0, 2, 9.2, 15.5),
    "Q2_K": (80, 82, 14.0, 1.5),
    "Q3_K": (108, None, 44.0, 0.0),
    "Q4_K": (0, 2, 240.0, 7.5),
    "Q5_K": (0, 2, 480.0, 15.5),
    "Q6_K": (208, None, 1400.0, 0.0),
    "IQ4_NL": (0, None, 70.0, 0.0),
    "IQ4_XS": (0, None, 1300.0, 0.0),
}
_TOKENIZERS = {
    "llama": "llama-bpe",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen3moe": "qwen2",
    "gpt-oss": "gpt-4o",
    "gemma3": "qwen2",
}


def random_model(shape_name: str, mix: str, max_gb: float | None = None) -> Path:
    """The file of a shape in a mix, written into pagellm's cache directory if it is not there.

    max_gb: it has as many of the layers as make no larger a file, one at least; None: all of them.
    """
    shape, cut = SHAPES[shape_name], ""
    if max_gb is not None:
        whole, shape = shape, shape.within(mix, max_gb * 1e9)
        cut = f".{shape.layers}-layers" if shape != whole else ""
    target = cache_dir() / "bench" / f"{shape_name}{cut}.{mix}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, suffix=".partial")
        os.close(descriptor)
        try:
            write_random_model(Path(temporary), shape, mix)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    return target


def write_random_model(path: Path, shape: Shape, mix: str) -> None:
    """Writes a GGUF file of a shape, holding no more than a piece of it in memory."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, shape.architecture)
    _add_metadata(writer, shape, mix)
    matrices = [
        (name, rows, columns, type_of(shape, mix, name, columns)) for name, rows, columns in shape.matrices()
    ]
    vectors = list(shape.vectors())
    if shape.rope_factors:
        vectors.append(("rope_freqs.weight", (shape.head_dim // 2,)))
    sizes = []
    for name, rows, columns, type in matrices:
        sizes.append(bytes_of(type, rows * columns))
        stored = shape.stored_shape(name, rows, bytes_of(type, columns))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), sizes[-1], GGMLQuantizationType[type])
    for name, vector_shape in vectors:
        writer.add_tensor_info(name, vector_shape, np.dtype(np.float32), 4 * prod(vector_shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    [file] = writer.fout
    _pad(file)
    for (_, _, _, type), num_bytes in zip(matrices, sizes, strict=True):
        _write_blocks(file, rng, type, num_bytes)
        _pad(file)
    for name, vector_shape in vectors:
        file.write(_vector(rng, name, prod(vector_shape), shape).tobytes())
        _pad(file)
    writer.close()


def _add_metadata(writer: GGUFWriter, shape: Shape, mix: str) -> None:
    writer.add_name(f"random weights, {mix}")
    writer.add_file_type(int(MIXES[mix][0]))
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(shape.vocab)
    if shape.architecture == "llama":
        writer.add_rope_dimension_count(shape.head_dim)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.per_token)
        writer.add_expert_feed_forward_length(shape.intermediate)
    if shape.window is not None:
        writer.add_sliding_window(shape.window)
    if shape.yarn is not None:
        factor, original = shape.yarn
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original)
    # OpenVINO fails on a vocabulary without control tokens.
    tokens = ["<|endoftext|>", *CHAR_OF_BYTE, "Ġt"]
    tokens += [f"<unused{index}>" for index in range(len(tokens), shape.vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_TOKENIZERS[shape.architecture])
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _write_blocks(file: BinaryIO, rng: np.random.Generator, type: str, num_bytes: int) -> None:
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type]][1]
    step = PIECE_BYTES // block_bytes * block_bytes
    for first in range(0, num_bytes, step):
        count = min(step, num_bytes - first) // block_bytes
        file.write(random_blocks(rng, type, count).tobytes())


def random_blocks(rng: np.random.Generator, type: str, count: int) -> NDArray[np.uint8]:
    """[count, bytes of a block]: valid blocks of a type, whose weights are of a usual size around 0."""
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type]][1]
    if type in ("F32", "F16", "BF16"):
        values = rng.normal(0, STANDARD_DEVIATION, count).astype(np.float32)
        if type == "F32":
            return values.view(np.uint8).reshape(count, 4)
        if type == "F16":
            return values.astype(np.float16).view(np.uint8).reshape(count, 2)
        return np.ascontiguousarray(values.view(np.uint16).reshape(count, 2)[:, 1:]).view(np.uint8)
    blocks = np.frombuffer(rng.bytes(count * block_bytes), np.uint8).reshape(count, block_bytes).copy()
    if type == "MXFP4":  # an exponent, by which random levels are 2.9 large
        blocks[:, 0] = 127 + rng.choice([-8, -7, -7], count)
        return blocks
    at, minimum_at, deviation, mean = _SCALED[type]
    scales = STANDARD_DEVIATION / deviation * rng.uniform(0.5, 1.5, count)
    _put_float16(blocks, at, scales)
    if minimum_at is not None:
        # The minimum of K-quants is subtracted.
        _put_float16(blocks, minimum_at, scales * (mean if type.endswith("_K") else -mean))
    return blocks


def _put_float16(blocks: NDArray[np.uint8], at: int, values: NDArray[np.float64]) -> None:
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _vector(rng: np.random.Generator, name: str, size: int, shape: Shape) -> NDArray[np.float32]:
    if name == "rope_freqs.weight":
        return _rope_factors(shape)
    if name.endswith(".bias") or "sinks" in name:
        return rng.normal(0, STANDARD_DEVIATION, size).astype(np.float32)
    return rng.uniform(0.9, 1.1, size).astype(np.float32)


def _rope_factors(shape: Shape) -> NDArray[np.float32]:
    """What frequencies are divided by in Llama 3's scaling: 32 for long waves, 1 for short ones."""
    frequencies = shape.rope_base ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = 8192 * frequencies / (2 * np.pi)
    keep = np.clip((turns - 1) / (4 - 1), 0, 1)
    return (1 / (keep + (1 - keep) / 32)).astype(np.float32)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random weights of a real shape as GGUF.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mixes", nargs="*", default=["Q4_K_M"], metavar="MIX", help=", ".join(MIXES))
    parser.add_argument("--max-gb", type=float, help="as many layers as so many GB have room for, or one")
    arguments = parser.parse_args()
    if arguments.max_gb is not None and not arguments.max_gb > 0:
        parser.error("--max-gb: expected a number above 0")
    for mix in arguments.mixes:
        if mix not in MIXES:
            parser.error(f"MIX: found {mix!r}, expected one of {', '.join(MIXES)}")
        print(random_model(arguments.shape, mix, arguments.max_gb))


if __name__ == "__main__":
    main()
