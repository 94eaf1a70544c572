"""Every architecture's logits against transformers', in each format: fixtures/architectures/make.py."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pagellm.engine import LLM, PagellmError
from pagellm.engine.checkpoints import open_checkpoint

ARCHITECTURES = Path(__file__).parents[1] / "fixtures" / "architectures"
CHECKPOINTS = sorted(
    f"{directory.name}/{format}"
    for directory in ARCHITECTURES.iterdir()
    for format in ("model.safetensors", "model.gguf")
    if (directory / format).exists()
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_the_references_or_the_architecture_is_refused_by_name(name: str) -> None:
    file = ARCHITECTURES / name
    path = file if file.suffix == ".gguf" else file.parent
    expected = np.load(file.parent / "expected.npz")
    max_model_len = int(expected["max_model_len"]) if "max_model_len" in expected else None
    refusal = None
    try:
        llm = LLM(
            str(path),
            num_blocks=16,
            num_threads=2,
            max_model_len=max_model_len,
            quantization="none",
            show_progress=False,
        )
        # A file may say that its context is shorter (chatglm's converter writes its width).
        length = min(llm.engine.spec.max_positions, len(expected["input_ids"]))
        logits = llm.logits(expected["input_ids"][:length].tolist())
        llm.close()
    except PagellmError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal_of(path).search(refusal)
        return
    assert logits.dtype == np.float32
    assert np.abs(logits - expected["logits"][:length]).max() < 1e-4 * np.ptp(expected["logits"])


def refusal_of(path: Path) -> re.Pattern[str]:
    """What the message says of an architecture, a RoPE scaling or a window that is not supported yet."""
    config = open_checkpoint(path).config
    kind = config.get("model_type") or config["general.architecture"]
    return re.compile(f"(model_type|general.architecture): found '{kind}'|rope_type|scaling.type|window")


def test_every_checkpoint_is_in_the_test() -> None:
    configs = [json.loads(path.read_text()) for path in ARCHITECTURES.glob("*/config.json")]
    kinds = {config["model_type"] for config in configs}
    assert kinds == {
        *("qwen3", "gemma2", "gemma3_text", "gemma3", "phi3", "smollm3", "olmo2", "olmo3", "granite"),
        *("granitemoehybrid", "ministral3", "mistral3", "mistral", "glm", "glm4", "ernie4_5", "minicpm"),
        *("cohere", "cohere2", "starcoder2", "gpt_bigcode", "falcon", "gpt_neox", "gptj", "phi", "opt"),
        *("bitnet", "llama"),
    }
    assert sum(name.endswith("model.gguf") for name in CHECKPOINTS) == 29
