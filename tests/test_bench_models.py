"""The files with random weights that the benchmarks compare engines on."""

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest

from bench.compare_peers import contest_of_file
from bench.gguf_models import matrix_sizes
from bench.random_models import random_blocks, write_random_model
from bench.shapes import MIXES, SHAPES, type_of
from pagellm.engine import LLM, SamplingParams
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.commands.inspection import inspect_model
from pagellm.engine.quantization import mixes

TINY = replace(
    SHAPES["llama-3.2-1b"],
    layers=8,
    hidden=256,
    heads=8,
    kv_heads=2,
    head_dim=32,
    intermediate=320,
    vocab=512,
)


TINY_MIXTURE = replace(
    SHAPES["qwen3-30b-a3b"],
    layers=8,
    hidden=256,
    heads=8,
    head_dim=32,
    intermediate=256,
    vocab=512,
    experts=9,
)
TINY_GPT_OSS = replace(
    SHAPES["gpt-oss-20b"],
    layers=3,
    hidden=96,
    heads=8,
    head_dim=16,
    intermediate=160,
    vocab=512,
    experts=6,
)


def types(shape_name: str, mix: str) -> Counter[str]:
    shape = SHAPES[shape_name]
    return Counter(type_of(shape, mix, name, columns) for name, _, columns in shape.matrices())


def test_a_mix_is_what_llama_cpp_makes_of_the_shape() -> None:
    """Counted in the published files of Gemma 3 270M, and by llama.cpp's rules for rows of whole blocks."""
    assert types("gemma-3-270m", "Q4_K_M") == {"Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}
    assert types("llama-3.2-1b", "Q4_K_M") == {"Q4_K": 96, "Q6_K": 17}
    assert types("llama-3.1-8b", "Q4_K_M") == {"Q4_K": 193, "Q6_K": 33}
    assert types("qwen3-4b", "Q4_0") == {"Q4_0": 252, "Q6_K": 1}
    assert types("qwen3-4b", "Q8_0") == {"Q8_0": 253}
    assert types("smollm2-135m", "Q4_0") == {"Q4_0": 210, "Q8_0": 1}


@pytest.mark.parametrize("mix", mixes.MIXES)
def test_a_mix_is_what_the_engine_writes(mix: str) -> None:
    """The benchmarks know more mixes; of those that `pagellm quantize` writes both have the same rules."""
    assert MIXES[mix] == mixes.MIXES[mix]
    for shape in SHAPES.values():
        model = mixes.Matrices(shape.architecture, shape.layers, shape.tied, shape.experts)
        for name, _, columns in shape.matrices():
            if "ffn_gate_inp" not in name:  # which stays as it is
                assert type_of(shape, mix, name, columns) == mixes.type_of(mix, False, model, name, columns)


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0"])
def test_a_mixture_of_a_shape_is_served(tmp_path: Path, mix: str) -> None:
    path = tmp_path / "m.gguf"
    write_random_model(path, TINY_MIXTURE, mix)
    with open_checkpoint(path) as checkpoint:
        kinds = Counter(tensor.dtype for name, tensor in checkpoint.tensors.items() if "exps" in name)
    assert kinds == ({"Q4_K": 20, "Q6_K": 4} if mix == "Q4_K_M" else {"Q8_0": 24})
    llm = LLM(str(path), num_blocks=8, show_progress=False)
    [output] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3
    llm.close()


def test_gpt_oss_is_served_with_experts_in_mxfp4(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_random_model(path, TINY_GPT_OSS, "MXFP4_MOE")
    with open_checkpoint(path) as checkpoint:
        kinds = Counter(tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) == 3)
        others = Counter(
            tensor.dtype for name, tensor in checkpoint.tensors.items() if name.endswith("output.weight")
        )
    assert kinds == {"MXFP4": 9}
    assert others == {"Q8_0": 4}
    report = inspect_model(path)
    assert report["supported"]
    assert {layer["window"] for layer in report["architecture"]["layers"]} == {0, 128}
    assert report["weights"]["converted"] == []
    llm = LLM(str(path), num_blocks=8, show_progress=False)
    [output] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3
    llm.close()


def test_a_shape_has_as_many_layers_as_fit(tmp_path: Path) -> None:
    whole, path = TINY_MIXTURE, tmp_path / "m.gguf"
    sizes = []
    for layers in (4, 5):
        write_random_model(path, replace(whole, layers=layers), "Q4_K_M")
        with open_checkpoint(path) as checkpoint:
            sizes.append(sum(tensor.num_bytes for tensor in checkpoint.tensors.values()))
    assert whole.within("Q4_K_M", sizes[0]).layers == whole.within("Q4_K_M", sizes[1] - 1).layers == 4
    assert whole.within("Q4_K_M", sizes[1]).layers == 5
    assert whole.within("Q4_K_M", 1e9) == whole
    assert whole.within("Q4_K_M", 1).layers == 1
    assert SHAPES["gpt-oss-20b"].within("MXFP4_MOE", 16e9).layers == 24
    assert SHAPES["qwen3-30b-a3b"].within("Q4_K_M", 16e9).layers == 41


@pytest.mark.parametrize("mix", MIXES)
def test_random_blocks_have_the_size_of_weights(mix: str) -> None:
    kind = MIXES[mix][1]
    blocks = random_blocks(np.random.default_rng(0), kind, 2000)
    raw = blocks.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)).reshape(1, -1)
    values = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(values).all()
    assert 0.015 < values.std() < 0.025
    assert abs(values.mean()) < 0.003


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q4_0", "Q8_0", "F16", "Q2_K", "IQ4_XS"])
def test_a_file_of_a_shape_is_served(tmp_path: Path, mix: str) -> None:
    path = tmp_path / "m.gguf"
    write_random_model(path, TINY, mix)
    assert inspect_model(path)["supported"]
    with open_checkpoint(path) as checkpoint:
        for name, rows, columns in TINY.matrices():
            assert checkpoint.tensors[name].shape == (rows, columns)
            assert checkpoint.tensors[name].dtype == type_of(TINY, mix, name, columns)
    llm = LLM(str(path), num_blocks=8, show_progress=False)
    [output] = llm.generate([[3, 4, 5]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    llm.close()
    assert len(output.token_ids) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_all_weights_but_an_embedding_that_is_no_output_matrix(
    tmp_path: Path, tied: bool
) -> None:
    shape = replace(TINY, tied=tied)
    path = tmp_path / "m.gguf"
    write_random_model(path, shape, "Q8_0")
    matrices = {name: rows * columns for name, rows, columns in shape.matrices()}
    embedding = matrices.pop("token_embd.weight")
    output = matrices.pop("output.weight", embedding)
    num_bytes, layers, of_output = matrix_sizes(path)
    assert (layers, of_output) == (sum(matrices.values()), output)
    vectors = sum(prod(vector) for _, vector in shape.vectors()) + shape.head_dim // 2
    assert num_bytes == (layers + output) // 32 * 34 + 4 * vectors
    assert contest_of_file("m", path).products == "int8"


def test_a_step_reads_the_experts_that_its_tokens_choose(tmp_path: Path) -> None:
    """Eight of nine for one token; of two tokens one chooses the ninth but in 1 of 81 cases."""
    path = tmp_path / "m.gguf"
    write_random_model(path, TINY_MIXTURE, "Q8_0")
    sizes = {name: rows * columns for name, rows, columns in TINY_MIXTURE.matrices()}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    with open_checkpoint(path) as checkpoint:
        in_file = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
        embedding = checkpoint.tensors["token_embd.weight"].num_bytes
    every = in_file - embedding
    one, multiply_adds, _ = matrix_sizes(path)
    assert one == pytest.approx(every - experts * 34 / 32 / 9, abs=1)
    assert matrix_sizes(path, 2)[0] == pytest.approx(every - experts * 34 / 32 / 81, abs=1)
    others = sum(sizes.values()) - 2 * TINY_MIXTURE.vocab * TINY_MIXTURE.hidden - experts
    assert multiply_adds == pytest.approx(others + experts * 8 / 9)
