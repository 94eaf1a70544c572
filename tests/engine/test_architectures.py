"""Every architecture's logits against transformers', in each format: fixtures/architectures/make.py."""

import json

import numpy as np
import pytest

from pagellm.engine import LLM
from tests.conftest import ARCHITECTURES

CHECKPOINTS = sorted(
    f"{directory.name}/{file}"
    for directory in ARCHITECTURES.iterdir()
    for file in ("model.safetensors", "model.gguf")
    if (directory / file).exists()
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_agree_with_the_reference(name: str) -> None:
    file = ARCHITECTURES / name
    expected = np.load(file.parent / "expected.npz")
    max_model_len = int(expected["max_model_len"]) if "max_model_len" in expected else None
    llm = LLM(
        str(file if file.suffix == ".gguf" else file.parent),
        num_blocks=16,
        num_threads=2,
        max_model_len=max_model_len,
        quantization="none",
        show_progress=False,
    )
    logits = llm.logits(expected["input_ids"].tolist())
    llm.close()
    assert logits.dtype == np.float32
    assert np.abs(logits - expected["logits"]).max() < 1e-5 * np.ptp(expected["logits"])


def test_every_architecture_has_a_checkpoint() -> None:
    configs = [json.loads(path.read_text()) for path in ARCHITECTURES.glob("*/config.json")]
    assert {config["model_type"] for config in configs} == {
        *("qwen3", "gemma2", "gemma3_text", "gemma3", "phi3", "smollm3", "olmo2", "olmo3", "granite"),
        *("granitemoehybrid", "ministral3", "mistral3", "mistral", "glm", "glm4", "ernie4_5", "minicpm"),
        *("cohere", "cohere2", "starcoder2", "gpt_bigcode", "falcon", "gpt_neox", "gptj", "phi", "opt"),
        *("bitnet", "llama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dbrx", "ernie4_5_moe"),
        *("granitemoe", "granitemoeshared", "minicpm3", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        *("gpt_oss", "gemma4", "gemma4_text"),
    }
    assert sum(name.endswith("model.gguf") for name in CHECKPOINTS) == 44
