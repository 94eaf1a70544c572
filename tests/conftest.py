"""What the tests share: fixtures of small random models, the real weights, and hypothesis profiles."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from pagellm.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:  # tests of what is pure Python do without Numba: tests/mutation.py runs them many times
    from pagellm.engine import LLM

MODELS = Path(__file__).parent / "fixtures" / "models"
ARCHITECTURES = Path(__file__).parent / "fixtures" / "architectures"
QUANTIZED = Path(__file__).parent / "fixtures" / "quantized"

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# `--hypothesis-profile=quick`: for tests that run many times over, once for each instruction set.
settings.register_profile("quick", settings.get_profile("default"), max_examples=6)
# `--hypothesis-profile=unshrunk`: for tests/mutation.py, to which a failure in any form will do.
settings.register_profile("unshrunk", settings.get_profile("default"), phases=[Phase.generate])
settings.load_profile("default")


def at_most(examples: int) -> settings:
    """So many examples, or fewer if the profile wants fewer."""
    return settings(max_examples=min(examples, settings.default.max_examples))


def model_path(name: str) -> Path:
    """A small random checkpoint: its directory, or its GGUF file if there is nothing else."""
    directory = next(
        (folder / name for folder in (MODELS, ARCHITECTURES) if (folder / name).exists()), QUANTIZED / name
    )
    return directory if (directory / "config.json").exists() else directory / "model.gguf"


def real_weights(model: str, **settings: Any) -> "LLM":
    """A known model; without its weights the test is skipped, and in CI it fails."""
    from pagellm.engine import LLM, CheckpointError

    try:
        return LLM(model, show_progress=False, **settings)
    except CheckpointError as error:
        if os.environ.get("CI"):
            pytest.fail(f"THE REAL WEIGHTS CANNOT BE FETCHED: {error}")
        pytest.skip(f"the real weights cannot be fetched: {error}")


def output_of(sequence: Sequence) -> list[int]:
    """The tokens that a sequence has got so far."""
    return sequence.token_ids[sequence.num_prompt_tokens :].tolist()


@pytest.fixture(scope="session")
def smollm() -> Iterator["LLM"]:
    """The default model with its real weights."""
    llm = real_weights("smollm2-135m-instruct", max_model_len=2048)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def gemma() -> Iterator["LLM"]:
    """Gemma 3 270M with its real weights, as its file has them."""
    llm = real_weights("gemma-3-270m", max_model_len=2048)
    yield llm
    llm.close()
