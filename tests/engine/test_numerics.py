"""Logits of small random checkpoints against an independent implementation's: fixtures/models/make.py."""

import numpy as np
import pytest

from pagellm.engine import LLM
from tests.conftest import MODELS, model_path

CASES = sorted(path.name for path in MODELS.iterdir() if (path / "expected.npz").exists())


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_reference(name: str) -> None:
    expected = np.load(MODELS / name / "expected.npz")
    llm = LLM(str(model_path(name)), num_blocks=16, num_threads=2, quantization="none", show_progress=False)
    logits = llm.logits(expected["input_ids"].tolist())
    llm.close()
    assert logits.dtype == np.float32
    assert np.abs(logits - expected["logits"]).max() < 1e-4


def test_every_family_and_format_has_a_case() -> None:
    families = {name.split("_")[0] for name in CASES}
    assert {"gpt2", "llama", "qwen2", "mistral", "gguf"} <= families
