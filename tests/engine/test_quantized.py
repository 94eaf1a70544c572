"""Directories that quantizers wrote: their own libraries' values and logits, and what is refused by name."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pagellm.engine import LLM, CheckpointError, loading
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.checkpoints.quantized import QuantizedTensor
from pagellm.engine.execution.weights import formats_of, load_weights, tensor_of
from pagellm.engine.models import read_spec
from pagellm.kernels.packing import (
    FLOAT8,
    FLOAT32,
    FP4,
    INT4,
    INT4_ZERO,
    INT4_ZERO_32,
    INT8_127,
    INT8_ROW,
    NF4,
    PANEL,
    padded,
    unpack_column,
)
from tests.conftest import QUANTIZED, model_path

DIRECTORIES = sorted(path.parent.name for path in QUANTIZED.glob("*/config.json"))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_every_value_is_that_of_the_method_s_own_library(name: str) -> None:
    digests = json.loads(str(np.load(QUANTIZED / name / "expected.npz")["digests"]))
    with open_checkpoint(QUANTIZED / name) as checkpoint:
        for tensor, digest in digests.items():
            matrix = checkpoint.tensors[tensor]
            middle = matrix.shape[0] // 3
            rows = [matrix.rows(0, middle), matrix.rows(middle, matrix.shape[0])]
            assert hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest() == digest, tensor


@pytest.mark.parametrize("name", [name for name in DIRECTORIES if name != "w8a8"])
def test_logits_are_those_of_transformers_with_the_same_values(name: str) -> None:
    expected = np.load(QUANTIZED / name / "expected.npz")
    llm = LLM(str(QUANTIZED / name), num_blocks=16, num_threads=2, quantization="none", show_progress=False)
    logits = llm.logits(expected["input_ids"].tolist())
    llm.close()
    assert np.abs(logits - expected["logits"]).max() < 1e-5 * np.ptp(expected["logits"])


FORMATS = {
    "gptq": INT4,
    "gptq_order": INT4,
    "gptq_zeros_order": INT4_ZERO,
    "gptq_v2_column": INT4_ZERO,
    "awq": INT4_ZERO,
    "awq_32": INT4_ZERO_32,
    "w4a16": INT4_ZERO,  # its scales are no float16
    "w4a16_zeros": INT4_ZERO_32,
    "w4a16_column": INT4,
    "w4a16_order": INT4,
    "w4a16_zeros_order": INT4_ZERO_32,
    "w8a8": INT8_ROW,
    "fp8_block": FLOAT8,
    "fp8_channel": FLOAT8,
    "fp8_compressed_block": FLOAT8,
    "fp8_tensor": FLOAT8,
    "llm_int8": INT8_127,
    "nf4": NF4,
    "nf4_double": NF4,
    "fp4": FP4,
}
# Of the experts of mixtures, what begins and what ends them; their inputs have no order of their own.
EXPERT_FORMATS = {
    "deepseek_fp8": (FLOAT32, FLOAT8),  # blocks of 64 inputs
    "mixtral_awq": (INT4_ZERO_32, INT4_ZERO_32),
    "mixtral_w8a8": (INT8_ROW, INT8_ROW),
    "olmoe_nf4": (NF4, NF4),
    "olmoe_w4a16": (INT4_ZERO_32, INT4_ZERO_32),
    "qwen3_moe_fp8": (FLOAT8, FLOAT8),
    "qwen3_moe_fp8_stacked": (FLOAT32, FLOAT8),
    "qwen3_moe_gptq": (FLOAT32, FLOAT32),
}


@pytest.mark.parametrize("name", EXPERT_FORMATS)
def test_experts_are_kept_as_they_are_with_every_value(name: str) -> None:
    with open_checkpoint(QUANTIZED / name) as checkpoint:
        spec = read_spec(checkpoint)
        weights = load_weights(checkpoint, spec, formats_of(checkpoint, spec, "auto"), 8, show=False)
        compared = 0
        for parts, places in zip(spec.layers, weights.layers, strict=True):
            for part, expected in zip(("expert_up", "expert_down"), EXPERT_FORMATS[name], strict=True):
                column = 0
                for source in parts.get(part, ()):
                    tensor = tensor_of(checkpoint, source)
                    assert isinstance(tensor, QuantizedTensor)
                    [(first, end)] = source.ranges
                    found = np.zeros((source.outputs, tensor.shape[1]), np.float32)
                    for n in range(len(found)):
                        panel = places[part]["panel"] + (column + n) // PANEL
                        start, format = weights.panels[panel].tolist()
                        assert format == expected
                        place = (column + n) % PANEL
                        unpack_column(format, weights.values, start, tensor.shape[1], place, found[n], 0)
                    np.testing.assert_array_equal(found, tensor.rows(first, end), err_msg=source.tensor)
                    column += padded(source.outputs)
                    compared += 1
        experts = spec.arch.layers["num_experts"].sum()
        assert compared == 3 * experts > 0


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_are_kept_as_they_are_with_every_value(name: str) -> None:
    """What is unpacked again is what the file says, bit for bit, but for the order of its inputs."""
    with open_checkpoint(QUANTIZED / name) as checkpoint:
        spec = read_spec(checkpoint)
        weights = load_weights(checkpoint, spec, formats_of(checkpoint, spec, "auto"), 8, show=False)
        seen = set()
        for parts, places in zip(spec.layers, weights.layers, strict=True):
            for part, sources in parts.items():
                _, _, panel, order = places[part].tolist()
                column = 0
                for source in sources:
                    tensor = checkpoint.tensors[source.tensor]
                    if not isinstance(tensor, QuantizedTensor):
                        continue
                    expected = tensor.rows(0, tensor.shape[0])
                    if order >= 0:
                        expected = expected[:, weights.values[order:][: tensor.shape[1]].view(np.int32)]
                    found = np.zeros(expected.shape, np.float32)
                    start, format = weights.panels[panel + column // PANEL].tolist()
                    for n in range(len(found)):
                        unpack_column(format, weights.values, start, tensor.shape[1], n, found[n], 0)
                    np.testing.assert_array_equal(found, expected, err_msg=source.tensor)
                    assert format == FORMATS[name]
                    assert (order >= 0) == (tensor.order() is not None)
                    seen.add(source.tensor)
                    column += len(found)  # whole panels, in these models
        assert len(seen) == 7


@pytest.mark.parametrize("name", DIRECTORIES)
def test_logits_of_what_is_kept_are_near(name: str) -> None:
    """W8A8's are those of exact integers; activations of others are rounded, and keys and values of all."""
    expected = np.load(QUANTIZED / name / "expected.npz")
    llm = LLM(str(QUANTIZED / name), num_blocks=16, num_threads=2, show_progress=False)
    logits = llm.logits(expected["input_ids"].tolist())
    llm.close()
    error = np.abs(logits - expected["logits"]) / np.ptp(expected["logits"])
    # A router's choice between two experts may be so near that a token takes the other one.
    near = (error.max(axis=1) < 0.03).mean()
    assert near >= 0.9 if name in EXPERT_FORMATS else near == 1
    assert error.mean() < 0.005


EXACT = [name for name, format in FORMATS.items() if format in (INT8_ROW, FLOAT8, INT8_127, NF4, FP4)]


@pytest.mark.parametrize("name", EXACT)
def test_products_that_round_no_activation_but_as_they_are_asked_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys and values in float32: W8A8's logits are those of exact integers, others' of float32.

    In W8A8 an activation may lie so near the middle of two levels that it takes the other one: a token then.
    """
    monkeypatch.setattr(loading, "kv_format", lambda formats: FLOAT32)
    expected = np.load(QUANTIZED / name / "expected.npz")
    llm = LLM(str(QUANTIZED / name), num_blocks=16, num_threads=2, show_progress=False)
    logits = llm.logits(expected["input_ids"].tolist())
    llm.close()
    errors = np.abs(logits - expected["logits"]).max(axis=1) / np.ptp(expected["logits"])
    assert (errors < 1e-5).mean() >= (0.9 if name == "w8a8" else 1.0)
    assert (errors < 0.01).all()


def quantized_gptq(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Any levels and zero points in groups of 32, near the weights [outputs, inputs]."""
    outputs, inputs = weight.shape
    groups = -(-inputs // 32)
    scales = np.full((groups, outputs), np.abs(weight).max() / 6, np.float16)
    zeros = np.random.default_rng(outputs).integers(6, 10, (groups, outputs))
    levels = np.rint(weight.T / scales.repeat(32, axis=0)[:inputs]) + zeros.repeat(32, axis=0)[:inputs]
    levels = levels.clip(0, 15).astype(np.uint32)
    shifts = 4 * np.arange(8, dtype=np.uint32)
    words = (levels.reshape(-1, 8, outputs) << shifts[:, None]).sum(axis=1, dtype=np.uint32)
    stored = np.pad(zeros - 1, ((0, 0), (0, -outputs % 8))).astype(np.uint32).reshape(groups, -1, 8)
    packed = (stored << shifts).sum(axis=2, dtype=np.uint32)
    return {"qweight": words.view(np.int32), "qzeros": packed.view(np.int32), "scales": scales}


def quantized_int8(weight: np.ndarray) -> dict[str, np.ndarray]:
    greatest = np.abs(weight).max(axis=1)
    levels = np.rint(weight * (127 / greatest)[:, None]).astype(np.int8)
    return {"weight": levels, "SCB": greatest, "weight_format": np.zeros(1, np.uint8)}


METHODS = {
    "gptq": (quantized_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}),
    "llm_int8": (quantized_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
# Fused projections, grouped or not; biases; rotary pairs; experts, one a matrix or stacked; keys as values.
ARCHITECTURES = (
    "qwen2",
    "cohere",
    "glm4",
    "falcon_40b",
    "starcoder2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gemma4_text",
)


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, method) for name in ARCHITECTURES for method in METHODS), ("phi3", "llm_int8")],
)
def test_every_architecture_computes_with_what_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """Its logits are those of the same values in float32, also as they are kept where these become floats."""
    quantize, section = METHODS[method]
    for copy in ("quantized", "plain"):
        shutil.copytree(model_path(name), tmp_path / copy)
    with open_checkpoint(model_path(name)) as checkpoint:
        tensors = {
            key: tensor.rows(0, tensor.shape[0]) for key, tensor in checkpoint.tensors.items() if tensor.shape
        }
    quantized, named = {}, set()
    for key, value in tensors.items():
        module = key.removesuffix(".weight")
        of_layer = re.search(r"\.\d+\.(.*)\.weight", key)
        whole = value.ndim == 2 and (method != "gptq" or value.shape[1] % 8 == 0)
        if of_layer and whole and not re.search(r"(gate|router)\.weight", key):
            named.add(of_layer[1])
            parts = quantize(value)
            quantized |= {f"{module}.{part}": np.ascontiguousarray(one) for part, one in parts.items()}
        else:
            quantized[key] = value
    save_file(quantized, tmp_path / "quantized" / "model.safetensors")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    if method == "gptq":
        section = section | {"modules_in_block_to_quantize": [sorted(named)]}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    with open_checkpoint(tmp_path / "quantized") as checkpoint:
        for key, tensor in checkpoint.tensors.items():
            if isinstance(tensor, QuantizedTensor):
                tensors[key] = tensor.rows(0, tensor.shape[0])
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    monkeypatch.setattr(loading, "kv_format", lambda formats: FLOAT32)
    tokens = np.load(model_path(name) / "expected.npz")["input_ids"].tolist()
    logits = []
    for copy, quantization in (("plain", "none"), ("quantized", "none"), ("quantized", "auto")):
        llm = LLM(str(tmp_path / copy), num_blocks=16, quantization=quantization, show_progress=False)
        logits.append(llm.logits(tokens))
        llm.close()
    np.testing.assert_array_equal(logits[1], logits[0])
    if method == "llm_int8":
        np.testing.assert_array_equal(logits[2], logits[0])
    else:
        assert 0 < np.abs(logits[2] - logits[0]).mean() < 0.05 * np.ptp(logits[0])


def test_zero_biases_that_nobody_asked_for_are_left_alone(tmp_path: Path) -> None:
    shutil.copytree(QUANTIZED / "gptq", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(256, np.float16)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        read_spec(checkpoint)
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with (
        open_checkpoint(tmp_path / "m") as checkpoint,
        pytest.raises(CheckpointError, match=r"up_proj\.bias has no place"),
    ):
        read_spec(checkpoint)


@pytest.mark.parametrize("matrix", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("name", ["gptq", "llm_int8"])
def test_what_belongs_to_no_layer_may_be_quantized_too(tmp_path: Path, name: str, matrix: str) -> None:
    quantize, section = METHODS[name]
    for copy in ("quantized", "plain"):
        shutil.copytree(QUANTIZED / name, tmp_path / copy)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] |= section
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    tensors = load_file(QUANTIZED / name / "model.safetensors")
    parts = quantize(tensors.pop(f"{matrix}.weight").astype(np.float32))
    parts = {f"{matrix}.{part}": np.ascontiguousarray(one) for part, one in parts.items()}
    save_file(tensors | parts, tmp_path / "quantized" / "model.safetensors")
    with open_checkpoint(tmp_path / "quantized") as checkpoint:
        tensor = checkpoint.tensors[f"{matrix}.weight"]
        assert isinstance(tensor, QuantizedTensor)
        plain = {f"{matrix}.weight": tensor.rows(0, tensor.shape[0])}
    save_file(tensors | plain, tmp_path / "plain" / "model.safetensors")
    logits = []
    for copy in ("quantized", "plain"):
        with LLM(str(tmp_path / copy), num_blocks=16, quantization="none", show_progress=False) as llm:
            logits.append(llm.logits(list(range(20))))
    np.testing.assert_array_equal(*logits)
