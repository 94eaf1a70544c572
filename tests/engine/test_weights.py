"""Weights in every format: which one a matrix gets, that files are repacked, and how far logits move."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pagellm.engine import LLM, CheckpointError, ConfigError, EngineConfig
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.execution.weights import _runs, _unpair, formats_of, kv_format, load_weights, pair
from pagellm.engine.models import Source, read_spec
from pagellm.kernels.architecture import LAYER, PARTS, Run
from pagellm.kernels.encoding import GGUF_FORMATS
from pagellm.kernels.packing import (
    BFLOAT16,
    FLOAT32,
    INT4,
    INT4_K,
    INT4_MIN,
    INT5,
    INT5_MIN,
    INT6_K,
    INT8,
    PANEL,
    unpack_column,
)
from tests.conftest import MODELS, model_path

LAYER_MATRICES = ("qkv", "output", "up", "down")


def formats(model: str, quantization: str) -> tuple[set[int], int]:
    """The formats of the layers' matrices, and that of the output matrix."""
    with open_checkpoint(model_path(model)) as checkpoint:
        spec = read_spec(checkpoint)
        table = formats_of(checkpoint, spec, quantization)
    lm_head = table[-1].get("lm_head", table[-1]["embedding"])
    layers = {run.format for by_part in table[:-1] for name in LAYER_MATRICES for run in by_part[name]}
    [run] = lm_head
    return layers, run.format


@pytest.mark.parametrize(
    ("model", "quantization", "layers", "lm_head"),
    [
        ("llama_gqa", "auto", FLOAT32, FLOAT32),
        ("llama_bf16", "auto", FLOAT32, FLOAT32),
        ("gguf_llama_f32", "auto", FLOAT32, FLOAT32),
        ("gguf_llama_q8_0", "auto", INT8, INT8),
        ("gguf_llama_q4_0", "auto", INT4, INT4),
        ("gguf_llama_q4_1", "auto", INT4_MIN, INT8),
        ("gguf_llama_q5", "auto", INT5, INT5_MIN),
        ("gguf_llama_q5", "none", FLOAT32, FLOAT32),
        ("gguf_llama_q5", "int4", INT4_MIN, INT5_MIN),
        ("gguf_llama_q4_0", "none", FLOAT32, FLOAT32),
        ("gguf_llama_q4_0", "bf16", BFLOAT16, BFLOAT16),
        ("gguf_llama_q4_0", "int8", INT8, INT8),
        ("gguf_llama_q4_0", "int4", INT4, INT4),
        ("gguf_llama_q8_0", "int4", INT4_MIN, INT8),
        ("llama_gqa", "int8", INT8, INT8),
        ("llama_gqa", "int4", INT4_MIN, INT8),
        ("gpt2", "bf16", BFLOAT16, BFLOAT16),
    ],
)
def test_a_matrix_gets_the_format_that_is_asked_for_or_keeps_its_own(
    model: str, quantization: str, layers: int, lm_head: int
) -> None:
    assert formats(model, quantization) == ({layers}, lm_head)


@pytest.mark.parametrize("model", ["gguf_llama_q8_0", "gguf_llama_q4_0", "gguf_llama_q4_1", "gguf_llama_q5"])
def test_a_quantized_file_is_repacked_without_a_change_of_value(model: str) -> None:
    with open_checkpoint(model_path(model)) as checkpoint:
        spec = read_spec(checkpoint)
        weights = load_weights(checkpoint, spec, formats_of(checkpoint, spec, "auto"), 8, show=False)
        places = {
            "token_embd.weight": weights.rest[0]["embedding"],
            "blk.0.ffn_down.weight": weights.layers[0]["down"],
        }
        for name, place in places.items():
            expected = checkpoint.tensors[name].rows(0, checkpoint.tensors[name].shape[0])
            column = np.zeros(expected.shape[1], np.float32)
            for n in range(len(expected)):
                unpack_column(
                    int(place["format"]), weights.values, int(place["start"]), expected.shape[1], n, column, 0
                )  # fmt: skip
                np.testing.assert_array_equal(column, expected[n])


@pytest.mark.parametrize(
    "model", ["llama_gqa", "llama_bias", "gpt2", "gpt2_odd_heads", "qwen2", "gguf_llama_q4_0"]
)
@pytest.mark.parametrize(("quantization", "most"), [("bf16", 0.02), ("int8", 0.05), ("int4", 0.4)])
def test_logits_of_a_format_are_near_those_of_float32(model: str, quantization: str, most: float) -> None:
    """As a share of the logits' own spread: a transposed or misplaced block would be far off."""
    tokens = np.load(MODELS / model / "expected.npz")["input_ids"].tolist()
    logits = {}
    for name in ("none", quantization):
        llm = LLM(str(model_path(model)), num_blocks=16, quantization=name, show_progress=False)
        logits[name] = llm.logits(tokens)
        llm.close()
    error = np.abs(logits[quantization] - logits["none"])
    assert 0 < error.mean() < most * logits["none"].std()


def test_quantized_weights_take_less_memory() -> None:
    sizes = {}
    with open_checkpoint(model_path("gguf_llama_q8_0")) as checkpoint:
        spec = read_spec(checkpoint)
        for quantization in ("none", "bf16", "auto", "int4"):
            table = formats_of(checkpoint, spec, quantization)
            sizes[quantization] = load_weights(checkpoint, spec, table, 8, show=False).values.nbytes
    assert sizes["none"] > sizes["bf16"] > sizes["auto"] > sizes["int4"]


def test_the_cache_is_float32_only_beside_float32_weights() -> None:
    for quantization, expected in (("none", FLOAT32), ("bf16", BFLOAT16), ("int8", BFLOAT16)):
        with open_checkpoint(model_path("llama_gqa")) as checkpoint:
            table = formats_of(checkpoint, read_spec(checkpoint), quantization)
        assert kv_format(table) == expected


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"quantization: found 'int3', expected one of auto, none, bf16, int8, int4"
    ):
        EngineConfig(quantization="int3")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_weight_that_no_block_can_hold_is_refused(tmp_path: Path, quantization: str) -> None:
    source = model_path("llama_gqa")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"] * 1e9
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, tmp_path / name)
    with open_checkpoint(tmp_path) as checkpoint:
        spec = read_spec(checkpoint)
        table = formats_of(checkpoint, spec, quantization)
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj.* no finite float16"):
            load_weights(checkpoint, spec, table, 8, show=False)


def test_a_type_without_a_format_becomes_float32_and_that_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(model_path("gguf_llama_q5"))
    for dtype in ("Q5_0", "Q5_1"):
        monkeypatch.delitem(GGUF_FORMATS, dtype)
    LLM(path, num_blocks=8, show_progress=True).close()
    said = capsys.readouterr().err
    assert said.count("Q5_0 (5.5 bits), Q5_1 (6 bits) are converted to float32, 4 bytes a weight") == 1
    LLM(path, num_blocks=8, show_progress=True, quantization="int8").close()
    assert "converted" not in capsys.readouterr().err


def test_tensors_of_a_part_keep_a_format_each_where_panels_allow() -> None:
    """Such as q, k and v in the types that Q4_K_M mixes; all are float32 where one must be."""
    part, row = PARTS["qkv"], None
    sources = tuple(
        Source(name, (size, 256)) for name, size in (("q", 8 * PANEL), ("k", PANEL), ("v", PANEL))
    )
    mixed = [INT4_K, INT4_K, INT6_K]
    expected = (Run(8 * PANEL, INT4_K), Run(PANEL, INT4_K), Run(PANEL, INT6_K))
    assert _runs(part, row, sources, mixed) == expected
    assert _runs(part, row, sources, [INT4_K] * 3) == (Run(10 * PANEL, INT4_K),)
    assert _runs(part, row, sources, [INT4_K, FLOAT32, INT6_K]) == (Run(10 * PANEL, FLOAT32),)
    odd = (Source("q", (PANEL + 1, 256)), *sources[1:])
    assert _runs(part, row, odd, mixed) == (Run(3 * PANEL + 1, FLOAT32),)
    gated = np.zeros(1, LAYER)[0]
    gated["gated"] = 1
    halves = (Source("gate", (PANEL + 1, 256)), Source("up", (PANEL + 1, 256)))
    expected = (Run(2 * PANEL, INT4_K), Run(2 * PANEL, INT8))
    assert _runs(PARTS["up"], gated, halves, [INT4_K, INT8]) == expected


def test_rotary_pairs_become_halves_and_pairs_again_wherever_they_begin() -> None:
    """Two heads of 8 of which 4 dimensions are rotated: pairs (0, 1), (2, 3) of these to (0, 2), (1, 3)."""
    for start, order in ((0, [0, 2, 1, 3, 4, 5, 6, 7]), (2, [0, 1, 2, 4, 3, 5, 6, 7])):
        source = Source("q", (16, 3), paired_heads=2, rotary_dim=4, rotary_start=start)
        stored = np.arange(48).reshape(16, 3)
        halves = np.concatenate([stored[order], stored[8:][order]])
        assert np.array_equal(_unpair(stored, source), halves)
        assert np.array_equal(pair(halves, source), stored)
