"""The shapes of models that people run, and which type llama.cpp's quantizer gives each of their tensors.

Shapes are those of the published configurations; `src/llama-quant.cpp` of llama.cpp (without an importance
matrix) is where the mixes are from. `random_models` writes files of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType


@dataclass(frozen=True)
class Shape:
    """A decoder. rope_factors: whether it has those of Llama 3's scaling; window: of most layers.

    experts: of each layer, or 0; then intermediate is the width of each; a token passes through per_token.
    yarn: the factor of that scaling and the context that it was trained with.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    context: int
    rope_base: float
    norm_epsilon: float
    rope_factors: bool = False
    window: int | None = None
    experts: int = 0
    per_token: int = 0
    yarn: tuple[float, int] | None = None

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Name, rows of all experts together and columns of each matrix, in the order of a file."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd.weight", self.vocab, self.hidden
        if not self.tied:
            yield "output.weight", self.vocab, self.hidden
        for layer in range(self.layers):
            for name, rows, columns in (
                ("attn_q", q, self.hidden),
                ("attn_k", kv, self.hidden),
                ("attn_v", kv, self.hidden),
                ("attn_output", self.hidden, q),
                *self._feed_forward(),
            ):
                yield f"blk.{layer}.{name}.weight", rows, columns

    def _feed_forward(self) -> Iterator[tuple[str, int, int]]:
        suffix, count = ("_exps", self.experts) if self.experts else ("", 1)
        if self.experts:
            yield "ffn_gate_inp", self.experts, self.hidden
        yield f"ffn_gate{suffix}", count * self.intermediate, self.hidden
        yield f"ffn_up{suffix}", count * self.intermediate, self.hidden
        yield f"ffn_down{suffix}", count * self.hidden, self.intermediate

    def stored_shape(self, name: str, rows: int, row_bytes: int) -> tuple[int, ...]:
        """How a file has a matrix: those of experts one behind the other."""
        stacked = (self.experts, rows // self.experts) if "_exps." in name else (rows,)
        return (*stacked, row_bytes)

    def vectors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each norm, bias and sink."""
        yield "output_norm.weight", (self.hidden,)
        for layer in range(self.layers):
            for name, *shape in self._layer_vectors():
                yield f"blk.{layer}.{name}", tuple(shape)

    def _layer_vectors(self) -> Iterator[tuple[Any, ...]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "attn_norm.weight", self.hidden
        if self.architecture != "gpt-oss":
            yield "ffn_norm.weight", self.hidden
        if self.architecture in ("qwen3", "qwen3moe", "gemma3"):
            yield "attn_q_norm.weight", self.head_dim
            yield "attn_k_norm.weight", self.head_dim
        if self.architecture in ("gemma3", "gpt-oss"):
            yield "post_attention_norm.weight", self.hidden
        if self.architecture == "gemma3":
            yield "post_ffw_norm.weight", self.hidden
        if self.architecture in ("qwen2", "gpt-oss"):
            yield "attn_q.bias", q
            yield "attn_k.bias", kv
            yield "attn_v.bias", kv
        if self.architecture == "gpt-oss":
            yield "attn_output.bias", self.hidden
            yield "attn_sinks.weight", self.heads
            yield "ffn_gate_inp.bias", self.experts
            yield "ffn_gate_exps.bias", self.experts, self.intermediate
            yield "ffn_up_exps.bias", self.experts, self.intermediate
            yield "ffn_down_exps.bias", self.experts, self.hidden

    def within(self, mix: str, num_bytes: float) -> "Shape":
        """The shape with as many of its layers as make a file of at most so many bytes; at least one."""
        for layers in range(self.layers, 1, -1):
            shape = replace(self, layers=layers)
            if shape._file_bytes(mix) <= num_bytes:
                return shape
        return replace(self, layers=1)

    def _file_bytes(self, mix: str) -> int:
        """Of the weights."""
        matrices = [
            bytes_of(type_of(self, mix, name, columns), rows * columns)
            for name, rows, columns in self.matrices()
        ]
        return sum(matrices) + sum(4 * prod(shape) for _, shape in self.vectors())


def _llama3(layers: int, hidden: int, heads: int, head_dim: int, intermediate: int, tied: bool) -> Shape:
    rope_base, epsilon = 5e5, 1e-5
    return Shape(
        "llama", layers, hidden, heads, 8, head_dim, intermediate, 128256, tied, 131072, rope_base, epsilon,
        rope_factors=True,
    )  # fmt: skip


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int, tied: bool) -> Shape:
    return Shape(
        "qwen3", layers, hidden, heads, 8, 128, intermediate, 151936, tied, 40960, 1e6, 1e-6
    )  # fmt: skip


def _gemma3(layers: int, hidden: int, intermediate: int) -> Shape:
    return Shape(
        "gemma3", layers, hidden, 4, 1, 256, intermediate, 262144, True, 32768, 1e6, 1e-6, window=512
    )  # fmt: skip


SHAPES = {
    "smollm2-135m": Shape("llama", 30, 576, 9, 3, 64, 1536, 49152, True, 8192, 1e5, 1e-5),
    "gemma-3-270m": _gemma3(18, 640, 2048),
    "smollm2-360m": Shape("llama", 32, 960, 15, 5, 64, 2560, 49152, True, 8192, 1e5, 1e-5),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 32768, 1e6, 1e-6),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, True),
    "gemma-3-1b": _gemma3(26, 1152, 6912),
    "llama-3.2-1b": _llama3(16, 2048, 32, 64, 8192, True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 128, 8192, True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, True),
    "qwen3-30b-a3b": Shape(
        "qwen3moe", 48, 2048, 32, 4, 128, 768, 151936, False, 40960, 1e6, 1e-6, experts=128, per_token=8
    ),
    "gpt-oss-20b": Shape(
        "gpt-oss",
        24,
        2880,
        64,
        8,
        64,
        2880,
        201088,
        False,
        131072,
        15e4,
        1e-5,
        window=128,
        experts=32,
        per_token=4,
        yarn=(32.0, 4096),
    ),
    "llama-3.1-8b": _llama3(32, 4096, 32, 128, 14336, False),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, False),
}

# What a mix is called in a file, and the type that most of its matrices get.
MIXES = {
    "F32": (LlamaFileType.ALL_F32, "F32"),
    "F16": (LlamaFileType.MOSTLY_F16, "F16"),
    "BF16": (LlamaFileType.MOSTLY_BF16, "BF16"),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, "Q8_0"),
    "Q6_K": (LlamaFileType.MOSTLY_Q6_K, "Q6_K"),
    "Q5_K_M": (LlamaFileType.MOSTLY_Q5_K_M, "Q5_K"),
    "Q5_1": (LlamaFileType.MOSTLY_Q5_1, "Q5_1"),
    "Q5_0": (LlamaFileType.MOSTLY_Q5_0, "Q5_0"),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, "Q4_K"),
    "Q4_K_S": (LlamaFileType.MOSTLY_Q4_K_S, "Q4_K"),
    "MXFP4_MOE": (LlamaFileType.MOSTLY_MXFP4_MOE, "MXFP4"),
    "IQ4_NL": (LlamaFileType.MOSTLY_IQ4_NL, "IQ4_NL"),
    "IQ4_XS": (LlamaFileType.MOSTLY_IQ4_XS, "IQ4_XS"),
    "Q4_1": (LlamaFileType.MOSTLY_Q4_1, "Q4_1"),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, "Q4_0"),
    "Q3_K_M": (LlamaFileType.MOSTLY_Q3_K_M, "Q3_K"),
    "Q2_K": (LlamaFileType.MOSTLY_Q2_K, "Q2_K"),
}

# Of types in blocks of 256, what rows get that are no multiple of it.
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


def type_of(shape: Shape, mix: str, name: str, columns: int) -> str:
    """The type that a matrix gets in a mix, by its name and the length of its rows."""
    base = MIXES[mix][1]
    if base in ("F32", "F16", "BF16"):
        return base
    if ".ffn_gate_inp." in name:
        return "F32"
    if base == "MXFP4" and "_exps." not in name:
        return "Q8_0"
    chosen = _before_fallback(shape, mix, base, name, columns)
    if columns % _block(chosen):
        chosen = _FALLBACKS.get(chosen, chosen)
    return chosen if columns % _block(chosen) == 0 else "F16"


def bytes_of(type: str, count: int) -> int:
    """What so many numbers of a type take, whole rows of them."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    return count // block * block_bytes


def _before_fallback(shape: Shape, mix: str, base: str, name: str, columns: int) -> str:
    if name == "output.weight" or (name == "token_embd.weight" and shape.tied):
        return "Q8_0" if base == "Q8_0" or columns % _block(base) else "Q6_K"
    if name == "token_embd.weight":
        return base
    layer, part = int(name.split(".")[1]), name.split(".")[2].removesuffix("_exps")
    eighth, sixteenth = shape.layers // 8, shape.layers // 16
    # The first and the last eighth of the layers, and every third between them.
    more = layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2
    grouped = shape.heads // shape.kv_heads >= 4
    if part == "attn_v":
        if mix in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if more else base
        special = {
            "Q2_K": "Q4_K" if grouped else "Q3_K",
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q4_K_S": "Q5_K" if layer < 4 else base,
        }
        if mix.startswith("IQ4"):
            return "Q5_K" if grouped else base
        return special.get(mix, base)
    if part == "ffn_down":
        if mix in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if more else base
        if mix == "Q4_K_S" or mix.startswith("IQ4"):
            return "Q5_K" if layer < eighth else base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q5_K" if layer < sixteenth else "Q4_K"}.get(mix, base)
    if part == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(mix, base)
    return base


def _block(type: str) -> int:
    return GGML_QUANT_SIZES[GGMLQuantizationType[type]][0]
