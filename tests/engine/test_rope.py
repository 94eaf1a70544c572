"""Rotary embeddings against transformers and llama.cpp: fixtures/rope/make.py."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagellm.engine import LLM, CheckpointError
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.models import hub_rope, read_spec, rope
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.rope import RopeTable
from tests.conftest import MODELS
from tests.fixtures.rope.gguf_model import GGUF, IDS, model_weights, write_model
from tests.fixtures.rope.make import LOGITS

ROPE = Path(__file__).parent.parent / "fixtures" / "rope"
HUB = json.loads((ROPE / "hub.json").read_text())
LAYER_TYPES: dict[str, dict[str, str | float]] = {
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    "olmo3": {"full_attention": "rope_theta", "sliding_attention": 5e5},
}
# What the readers of these classes say.
CLASSES: dict[str, dict[str, Any]] = {
    "phi3": {"partial": True, "kinds": hub_rope.PHI3_KINDS},
    "glm": {"partial": True},
    "gpt_neox": {"partial": True},
    "ministral3": {"scales_queries": True},
}
DEFAULTS = {
    "phi3": {"original_max_position_embeddings": 4096},
    "glm": {"partial_rotary_factor": 0.5},
    "gemma3_text": {"rope_theta": 1e6},
    "olmo3": {"rope_theta": 5e5},
}
KEYS = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def of_config(
    config: dict[str, Any], model_type: str = "llama", max_positions: int = 4096
) -> dict[str, RopeTable]:
    """By layer type, or "" for all of them."""
    fields = Fields(Path("config.json"), config, defaults=DEFAULTS.get(model_type), keys=KEYS.get(model_type))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    max_positions = config.get("max_position_embeddings", max_positions)
    if model_type in LAYER_TYPES:
        return hub_rope.tables_by_layer_type(fields, head_dim, max_positions, LAYER_TYPES[model_type])
    return {"": hub_rope.table(fields, head_dim, max_positions, **CLASSES.get(model_type, {}))}


@pytest.mark.parametrize("case", HUB, ids=[case["name"] for case in HUB])
def test_a_config_s_rotary_embeddings_are_those_of_transformers(case: dict[str, Any]) -> None:
    tables = of_config(case["config"], case["model_type"])
    assert tables.keys() == case["tables"].keys()
    for layer_type, by_length in case["tables"].items():
        tables[layer_type].check("")
        for length, expected in by_length.items():
            table = tables[layer_type].at(int(length))
            np.testing.assert_allclose(table.frequencies, expected["frequencies"], rtol=2e-6)
            assert math.isclose(table.attention_factor, expected["attention_factor"], rel_tol=1e-6)


SECTION = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"rope_type": "ntk"}, "rope_type: found 'ntk', expected one of default, linear, dynamic"),
        ("llama", {"rope_type": "proportional"}, "rope_type: found 'proportional'"),
        (
            "phi3",
            SECTION | {"rope_type": "llama3"},
            "rope_type: found 'llama3', expected one of default, long",
        ),
        ("llama", SECTION | {"type": "linear"}, "type: found 'linear', expected 'yarn', as rope_type is"),
        ("llama", SECTION | {"factor": 0.0}, "factor: found 0.0, expected a positive number"),
        ("llama", {"rope_type": "yarn"}, "factor is missing"),
        ("llama", {"rope_type": "dynamic"}, "factor is missing"),
        ("llama", SECTION | {"beta_slow": -1.0}, "beta_slow: found -1.0"),
        ("llama", SECTION | {"beta_fast": 0.01}, "bounds of 0.01 and 1.0 turns, expected some"),
        ("llama", SECTION | {"truncate": 0}, "truncate: found 0, expected true or false"),
        ("llama", SECTION | {"attention_factor": -0.5}, "attention_factor: found -0.5"),
        ("llama", SECTION | {"alpha": 2.0}, "alpha: found 2.0, expected no such key"),
        (
            "llama",
            SECTION | {"llama_4_scaling_beta": 0.1},
            "llama_4_scaling_beta: found 0.1, expected no such",
        ),
        ("ministral3", SECTION, "llama_4_scaling_beta is missing"),
        (
            "llama",
            SECTION | {"original_max_position_embeddings": 0},
            "original_max_position_embeddings: found 0",
        ),
        ("llama", SECTION | {"rope_theta": 1.0}, "theta 1.0"),
        (
            "llama",
            LONGROPE | {"short_factor": [1.0] * 3},
            "short_factor: found .* expected a list of 4 positive",
        ),
        ("llama", LONGROPE | {"long_factor": [1.0, 2.0, 0.0, 4.0]}, "long_factor: found"),
        ("llama", LONGROPE | {"long_factor": None}, "long_factor: found None"),
        (
            "llama",
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "partial_rotary_factor",
        ),
        ("glm", {"rope_type": "default", "partial_rotary_factor": 1.5}, "partial_rotary_factor: found 1.5"),
        ("glm", SECTION | {"partial_rotary_factor": 0.4}, "found 3 dimensions, expected an even number"),
        ("glm", {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25}, "dynamic"),
    ],
)
def test_bad_rotary_parameters_are_refused_by_name(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        of_config({"hidden_size": 16, "num_attention_heads": 2, "rope_parameters": changes}, model_type)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "type: found 'linear', expected 'default'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "rope_type: found 'linear', expected no",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": "8"}}},
            r"rope_parameters\.sliding_attention\.factor: found '8'",
        ),
        (
            {"rope_parameters": {"full_attention": SECTION | {"truncate": False}}},
            "truncate: found False, expected true in a section of a layer type",
        ),
        (
            {
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}},
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            r"full_attention\.factor: found 4\.0, expected 8\.0, as rope_scaling has it",
        ),
    ],
)
def test_bad_sections_of_layer_types_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        of_config({"hidden_size": 16, "num_attention_heads": 2} | config, "gemma3_text")


def test_a_factor_that_transformers_passes_over_changes_nothing() -> None:
    # As in DeepSeek-R1-0528-Qwen3-8B's configuration.
    config = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e6}
    plain = of_config(config | {"rope_scaling": SECTION})
    assert of_config(config | {"rope_scaling": SECTION | {"attn_factor": 0.878}}) == plain


def test_a_scaling_may_be_made_for_more_than_the_model_says() -> None:
    base = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 2048}
    dynamic = {"rope_type": "dynamic", "factor": 2.5}
    assert of_config(base | {"rope_scaling": SECTION})[""].max_positions == 4096
    assert of_config(base | {"rope_scaling": dynamic})[""].max_positions == 5120
    assert of_config(base)[""].max_positions == 0


def test_what_a_length_decides_is_said() -> None:
    longrope = of_config(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 8,
        }
    )[""]
    assert "long factors, because max_model_len 9 is beyond 8" in longrope.choice(9)
    assert "max_model_len 8 is served with the short factors" in longrope.choice(8)
    dynamic = of_config(
        {"hidden_size": 16, "num_attention_heads": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    )[""]
    assert "none, because max_model_len 8 is within 4096" in dynamic.choice(8)
    assert "as one of max_model_len 5000" in dynamic.choice(5000)
    assert rope.plain(8).choice(5000) == ""


def edited_copy(directory: Path, changes: dict[str, Any]) -> Path:
    """The model llama_gqa with another configuration."""
    source = MODELS / "llama_gqa"
    for path in source.iterdir():
        if path.suffix != ".npz":
            (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_a_scaled_model_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    length, parameters = LOGITS[name]
    section = {"rope_theta": 10000.0, **parameters}
    path = edited_copy(tmp_path, {"max_position_embeddings": 48, "rope_parameters": section})
    if parameters["rope_type"] == "dynamic":  # whose original context this is
        path = edited_copy(tmp_path, {"max_position_embeddings": 16, "rope_parameters": section})
    expected = np.load(ROPE / "logits.npz")
    llm = LLM(str(path), max_model_len=length, num_blocks=8, num_threads=2, show_progress=False)
    logits = llm.logits(expected[f"{name}_ids"].tolist())
    llm.close()
    assert np.abs(logits[-8:] - expected[f"{name}_logits"]).max() < 1e-4


@pytest.mark.parametrize("name", GGUF)
def test_logits_of_a_gguf_file_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    case, path = GGUF[name], tmp_path / "model.gguf"
    write_model(path, model_weights(), case)
    llm = LLM(
        str(path), max_model_len=case.n_ctx, num_blocks=16, num_threads=2, quantization="none",
        show_progress=False,
    )  # fmt: skip
    logits = llm.logits(IDS.tolist())
    llm.close()
    assert np.abs(logits[-8:] - np.load(ROPE / "gguf.npz")[name]).max() < 2e-4


def gguf_table(directory: Path, name: str) -> RopeTable:
    write_model(directory / "model.gguf", model_weights(), GGUF[name])
    with open_checkpoint(directory / "model.gguf") as checkpoint:
        [table] = read_spec(checkpoint).rope_tables
    return table


def test_a_yarn_file_s_context_is_what_the_scaling_is_made_for(tmp_path: Path) -> None:
    assert gguf_table(tmp_path, "yarn").max_positions == 512


def test_the_length_decides_about_the_factors_of_a_gguf_file(tmp_path: Path) -> None:
    table = gguf_table(tmp_path, "longrope_short")
    assert table.at(256).frequencies != table.at(257).frequencies
