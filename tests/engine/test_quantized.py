"""Directories that quantizers wrote: their own libraries' values and logits, and what is refused by name."""

import hashlib
import json

import numpy as np
import pytest

from pagellm.engine import LLM
from pagellm.engine.checkpoints import open_checkpoint
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
