"""Directories that quantizers wrote: their own libraries' values and logits, and what is refused by name."""

import hashlib
import json

import numpy as np
import pytest

from pagellm.engine import LLM, loading
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.checkpoints.quantized import QuantizedTensor
from pagellm.engine.execution.weights import formats_of, load_weights
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
    unpack_column,
)
from tests.conftest import QUANTIZED

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


@pytest.mark.parametrize("name", DIRECTORIES)
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
    error = np.abs(logits - expected["logits"])
    assert error.max() < 0.03 * np.ptp(expected["logits"])
    assert error.mean() < 0.005 * np.ptp(expected["logits"])


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
