"""Checkpoints' configurations and tensor names become a `ModelSpec`, or one clear error."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pagellm.engine import CheckpointError
from pagellm.engine.checkpoints import Checkpoint, open_checkpoint
from pagellm.engine.models import ModelSpec, gpt2, read_spec
from tests.conftest import MODELS

Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def edited(tmp_path: Path, name: str, edit: Edit) -> ModelSpec:
    """The spec of a fixture after a change of its configuration and its tensors."""
    directory = tmp_path / name
    shutil.copytree(MODELS / name, directory)
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    edit(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return read_spec(open_checkpoint(directory))


def setting(**changes: Any) -> Edit:
    return lambda config, _tensors: config.update(changes)


def num_parameters(spec: ModelSpec) -> int:
    parts = (*spec.layers, spec.rest)
    return sum(math.prod(s.shape) for part in parts for sources in part.values() for s in sources)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "positions", "parameters"),
    [
        (12, 768, 12, 1024, 124_439_808),  # GPT-2
        (24, 1024, 16, 1024, 354_823_168),  # medium
        (36, 1280, 20, 1024, 774_030_080),  # large
        (48, 1600, 25, 1024, 1_557_611_200),  # XL
        (96, 12288, 96, 2048, 174_604_259_328),  # the shape of GPT-3 175B
    ],
)
def test_gpt2s_published_sizes_are_configurations_alone(
    layers: int, hidden: int, heads: int, positions: int, parameters: int
) -> None:
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads}
    config |= {"n_positions": positions, "vocab_size": 50257}
    tensors = dict.fromkeys(range(12 * layers + 4))  # only their number matters before shapes are checked
    checkpoint = SimpleNamespace(path=Path("gpt2"), format="safetensors", config=config, tensors=tensors)
    spec = gpt2.from_huggingface(cast(Checkpoint, checkpoint))
    assert num_parameters(spec) == parameters
    assert spec.head_dim * heads == hidden


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("llama_mha", setting(model_type="bert"), "model_type: found 'bert', expected .*gpt2, llama"),
        ("llama_mha", setting(model_type=None), "model_type: found None"),
        ("llama_mha", setting(hidden_size="64"), "hidden_size: found '64', expected an integer"),
        ("llama_mha", setting(hidden_size=0), "hidden_size: found 0"),
        ("llama_mha", setting(num_hidden_layers=10**9), "num_hidden_layers: found 1000000000"),
        ("llama_mha", setting(num_key_value_heads=3), "3 KV heads"),
        ("llama_mha", setting(hidden_act="gelu"), "hidden_act: found 'gelu'"),
        ("llama_mha", setting(rms_norm_eps=-1), "rms_norm_eps: found -1"),
        ("llama_mha", setting(vocab_size=50), r"shape .* expected"),
        ("llama_mha", setting(attention_bias=True), "bias is missing"),
        ("llama_bias", setting(attention_bias=False), "has no place"),
        ("llama_mha", setting(rope_parameters={"rope_type": "yarn", "factor": 4}), "rope_type: found 'yarn'"),
        ("llama_rope_linear", setting(rope_scaling={"type": "linear"}), "factor is missing"),
        ("llama_mha", setting(tie_word_embeddings="yes"), "tie_word_embeddings: found 'yes'"),
        ("llama_mha", setting(partial_rotary_factor=10000.0), "partial_rotary_factor: found 10000.0"),
        ("llama_mha", setting(partial_rotary_factor=0.01), "found 0 dimensions, expected an even number"),
        ("llama_mha", setting(rms_norm_eps=10**400), "rms_norm_eps: found 1000"),
        ("llama_mha", setting(model_type=["llama"]), r"model_type: found \['llama'\]"),
        ("gpt2", setting(n_head=7), "n_embd: found .*a multiple of n_head, 7"),
        ("gpt2", setting(activation_function="swish"), "activation_function: found 'swish'"),
        ("gpt2", setting(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_a_bad_configuration_is_an_error_that_names_the_field(
    tmp_path: Path, name: str, edit: Edit, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        edited(tmp_path, name, edit)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    def edit(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        edited(tmp_path, "llama_mha", edit)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    def edit(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = np.zeros((3, 5), np.float32)

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(3, 5\), expected \(\d+,\)"):
        edited(tmp_path, "llama_mha", edit)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    def edit(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(4, np.float32)

    with pytest.raises(CheckpointError, match=r"q_norm\.weight has no place"):
        edited(tmp_path, "llama_mha", edit)


def test_sliding_window_attention_is_served_within_its_window(tmp_path: Path) -> None:
    assert edited(tmp_path, "mistral", setting(sliding_window=20)).max_positions == 20
    assert edited(tmp_path / "none", "mistral", setting(sliding_window=None)).max_positions > 20


def test_tied_output_is_the_embedding() -> None:
    assert read_spec(open_checkpoint(MODELS / "gpt2")).tied
    assert not read_spec(open_checkpoint(MODELS / "gpt2_untied")).tied
