"""Checkpoints' configurations and tensor names become a `ModelSpec`, or one clear error."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pagellm.engine import CheckpointError
from pagellm.engine.checkpoints import Checkpoint, Tensor, open_checkpoint
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
    tensors = dict.fromkeys(
        map(str, range(12 * layers + 4))
    )  # only their number matters before shapes are checked
    checkpoint = SimpleNamespace(
        path=Path("gpt2"),
        format="safetensors",
        config=config,
        tensors=tensors,
        quantization="",
        config_only=False,
    )
    spec = gpt2.from_huggingface(cast(Checkpoint, checkpoint))
    assert num_parameters(spec) == parameters
    assert (spec.arch.layers["head_dim"] * heads == hidden).all()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("llama_mha", setting(model_type="bert"), "model_type: found 'bert', expected .*gpt2,.* llama"),
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
        ("llama_mha", setting(rope_parameters={"rope_type": "ntk", "factor": 4}), "rope_type: found 'ntk'"),
        ("llama_rope_linear", setting(rope_scaling={"type": "linear"}), "factor is missing"),
        ("llama_mha", setting(tie_word_embeddings="yes"), "tie_word_embeddings: found 'yes'"),
        ("llama_mha", setting(head_dim=7), "found 7 dimensions, expected an even number"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 0.5, "rope_type": "default"}},
            "rotary embeddings: found theta 0.5",
        ),
        ({"head_dim": 7}, "rotary embeddings: found 7 dimensions"),
        ({"num_key_value_heads": 4}, "llama: layer 0: 6 attention heads cannot share 4 KV heads"),
    ],
)
def test_settings_that_fit_no_model_name_the_checkpoint(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/llama_gqa: {message}"):
        edited(tmp_path, "llama_gqa", setting(**changes))


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


def test_a_type_of_element_that_is_not_read_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    def edit(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = np.zeros(32, np.int8)

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has type I8, expected one of F32, F16"):
        edited(tmp_path, "llama_mha", edit)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    def edit(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(4, np.float32)

    with pytest.raises(CheckpointError, match=r"q_norm\.weight has no place"):
        edited(tmp_path, "llama_mha", edit)


def windows(spec: ModelSpec) -> list[int]:
    """Of each layer; every context is served up to its end, whatever the windows are."""
    assert spec.max_positions == 64
    return spec.arch.layers["window"].tolist()


def test_a_mistral_without_a_window_has_its_class_s_and_null_means_none(tmp_path: Path) -> None:
    def without_window(config: dict[str, Any], _tensors: dict[str, Any]) -> None:
        del config["sliding_window"]

    assert windows(edited(tmp_path, "mistral", setting(sliding_window=20))) == [20]
    assert windows(edited(tmp_path / "absent", "mistral", without_window)) == [4096]
    assert windows(edited(tmp_path / "null", "mistral", setting(sliding_window=None))) == [0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_types": ["full_attention"] * 2}, [0, 0]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, [0, 20]),
        ({"max_window_layers": 2}, [0, 0]),  # from that layer on
        ({"max_window_layers": 1}, [0, 20]),
        ({"sliding_window": None, "max_window_layers": 0}, [0, 0]),
        ({"use_sliding_window": False, "max_window_layers": 0}, [0, 0]),
    ],
)
def test_qwen2_s_window_counts_where_a_layer_uses_it(
    tmp_path: Path, changes: dict[str, Any], expected: list[int]
) -> None:
    def edit(config: dict[str, Any], _tensors: dict[str, Any]) -> None:
        config.pop("layer_types", None)
        config.update({"use_sliding_window": True, "sliding_window": 20} | changes)

    assert windows(edited(tmp_path, "qwen2", edit)) == expected


@pytest.mark.parametrize("changes", [{"sliding_window": None}, {"use_sliding_window": False}])
def test_layers_that_slide_need_a_window(tmp_path: Path, changes: dict[str, Any]) -> None:
    keys = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True} | changes
    with pytest.raises(CheckpointError, match=r"layer_types: found .*, expected full_attention alone"):
        edited(tmp_path, "qwen2", setting(**keys))


def test_llama_s_class_knows_no_window(tmp_path: Path) -> None:
    spec = edited(tmp_path, "llama_mha", setting(sliding_window=8, use_sliding_window=True))
    assert windows(spec) == [0, 0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier: found 12\.0, expected no such key"),
        ({"logit_scale": 0.0625}, "logit_scale: found"),
        ({"is_causal": False}, "is_causal: found False, expected true"),
        ({"is_causal": None}, "is_causal: found None, expected true"),
        ({"rope_interleaved": True}, "rope_interleaved: found True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: found"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types: found"),
        ({"layer_types": ["full_attention"]}, "layer_types: found"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: found"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
         r"rope_parameters\.rope_theta: found 500000\.0, expected 10000\.0, as rope_scaling has it"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "default"}},
         r"rope_parameters\.rope_type: found 'linear', expected 'default', as rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "partial_rotary_factor": 0.5},
         "partial_rotary_factor: found 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "stretch": 3}}, r"rope_scaling\.stretch"),
        ({"rope_parameters": {"rope_theta": 1e-9}}, "theta 1e-09, expected a number from 1"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-9}}, "radians a position"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}},
         "quantization_config: found 'gptq', expected weights that it has quantized"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "load_in_4bit: found False, expected"),
        ({"quantization_config": {"quant_method": "fp8"}}, "found 'fp8', expected weights that it has"),
        ({"quantization_config": {"quant_method": "awq"}}, "found 'awq'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, r"_config\.format: found None"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization: found 'mlx', bits 4, group_size 64"),
        ({"quantization_config": {"load_in_4bit": True}}, "found 'bitsandbytes', expected"),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "int4"}}, "'torchao', quant_type"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "quant_algo 'NVFP4'"),
        ({"quantization_config": {}}, r"quantization_config: found \{\}"),
        ({"compression_config": {"format": "marlin-24"}}, "compression_config: found .*, format 'marlin-24'"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}},
         r"text_config\.quantization_config: found 'awq'"),
        ({"rms_norm_eps": None}, "rms_norm_eps: found None"),
    ],
)  # fmt: skip
def test_what_could_change_the_arithmetic_is_obeyed_or_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        edited(tmp_path, "llama_mha", setting(**keys))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "found 'gptq', expected weights that"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "found 'awq', expected weights that"),
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "FP8"}},
            "found 'modelopt', quant_algo 'FP8'",
        ),
    ],
)
def test_a_quantizer_s_own_file_is_a_refusal_too(
    tmp_path: Path, name: str, content: dict[str, Any], message: str
) -> None:
    shutil.copytree(MODELS / "llama_mha", tmp_path / "m")
    (tmp_path / "m" / name).write_text(json.dumps(content))
    with (
        pytest.raises(CheckpointError, match=message) as caught,
        open_checkpoint(tmp_path / "m") as checkpoint,
    ):
        read_spec(checkpoint)
    assert name in str(caught.value)


# Keys as files on the hub have them, of several years of transformers.
OLD_KEYS: dict[str, Any] = {
    "_name_or_path": "a/b", "_attn_implementation_autoset": True, "transformers_version": "4.31.0",
    "torch_dtype": "bfloat16", "auto_map": {"AutoModel": "x.Y"}, "use_cache": True, "pad_token_id": -1,
    "attention_dropout": 0.1, "initializer_range": 0.02, "gradient_checkpointing": False,
    "max_length": 4096, "temperature": 0.7, "top_p": 0.9, "do_sample": True, "num_beams": 1,
    "id2label": {"0": "A"}, "label2id": {"A": 0}, "task_specific_params": None, "tokenizer_class": "X",
    "is_decoder": False, "is_encoder_decoder": False, "pruned_heads": {}, "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None, "chunk_size_feed_forward": 0, "return_dict": True,
    "torchscript": False, "output_attentions": False, "unsloth_fixed": True, "bad_words_ids": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama_mha", {"pretraining_tp": 1, "max_sequence_length": 2048}),
        ("llama_mha", {"pretraining_tp": 2, "is_llama_config": True, "rope_interleaved": False}),
        ("llama_mha", {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
        ("qwen2", {"use_mrope": False, "max_window_layers": 21, "use_sliding_window": False}),
        ("mistral", {"rope_theta": 10000.0, "attention_bias": False}),
        ("gpt2", {"n_ctx": 64, "summary_type": "cls_index", "summary_first_dropout": 0.1, "attn_pdrop": 0.1}),
        ("gpt2", {"reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False}),
        ("gpt2", {"hidden_size": 32, "num_attention_heads": 4}),
    ],
)  # fmt: skip
def test_keys_that_change_nothing_are_let_by(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    expected = read_spec(open_checkpoint(MODELS / name))
    assert edited(tmp_path, name, setting(**OLD_KEYS | keys)) == expected


def test_another_class_s_name_of_a_key_must_agree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden_size: found 64, expected n_embd alone"):
        edited(tmp_path, "gpt2", setting(hidden_size=64))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["llama_mha", "llama_base_model", "gpt2_untied"])
def test_a_wrapper_s_prefix_changes_nothing(tmp_path: Path, name: str, wrapper: str) -> None:
    def wrap(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for tensor in list(tensors):
            tensors[wrapper + tensor] = tensors.pop(tensor)

    plain = read_spec(open_checkpoint(MODELS / name))
    wrapped = edited(tmp_path, name, wrap)
    assert num_parameters(wrapped) == num_parameters(plain)
    assert all(s.tensor.startswith(wrapper) for sources in wrapped.rest.values() for s in sources)


def test_names_of_another_kind_are_listed(tmp_path: Path) -> None:
    def rename(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for tensor in list(tensors):
            tensors[f"net.{tensor}"] = tensors.pop(tensor)

    with pytest.raises(CheckpointError, match=r"weight is missing, expected .*; there are 21 \(net\."):
        edited(tmp_path, "llama_mha", rename)


def test_an_equal_head_beside_a_tied_embedding_is_the_embedding(tmp_path: Path) -> None:
    def repeat(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def change(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    assert edited(tmp_path, "llama_gqa", repeat).arch.tied
    assert not edited(tmp_path / "other", "llama_gqa", change).arch.tied


def test_too_few_tensors_for_the_layers_are_listed(tmp_path: Path) -> None:
    def keep_one(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in list(tensors)[1:]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"num_hidden_layers: found 2, expected tensors .* only 1 \("):
        edited(tmp_path, "llama_mha", keep_one)


def test_tied_output_is_the_embedding() -> None:
    assert read_spec(open_checkpoint(MODELS / "gpt2")).arch.tied
    assert not read_spec(open_checkpoint(MODELS / "gpt2_untied")).arch.tied


# GGUF


def with_metadata(name: str, changes: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> ModelSpec:
    """The spec of a GGUF fixture with some keys under its architecture's prefix changed."""
    with open_checkpoint(MODELS / name / "model.gguf") as checkpoint:
        prefix = f"{checkpoint.config['general.architecture']}."
        config = checkpoint.config | {prefix + key: value for key, value in changes.items()}
        tensors = dict(checkpoint.tensors) if tensors is None else tensors
        return read_spec(replace(checkpoint, config=config, tensors=tensors, quantization=""))


@pytest.mark.parametrize(
    ("changes", "divisor"),
    [
        ({}, 1.0),
        ({"rope.scaling.factor": 4.0}, 4.0),  # llama.cpp takes linear where no type is named
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
        ({"rope.scaling.finetuned": True, "rope.scaling.original_context_length": 64}, 1.0),
    ],
)
def test_linear_scaling_of_a_gguf_file_by_llama_cpp_s_rules(changes: dict[str, Any], divisor: float) -> None:
    [plain] = with_metadata("gguf_llama_f32", {}).rope_tables
    [scaled] = with_metadata("gguf_llama_f32", changes).rope_tables
    assert scaled.frequencies == tuple(frequency / divisor for frequency in plain.frequencies)


@pytest.mark.parametrize("name", ["gguf_llama_f32", "gguf_qwen2", "gguf_gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        {"attention.causal": True, "expert_count": 0, "expert_used_count": 0},
        {"vocab_size": 32, "tensor_data_layout": "Meta AI original pth", "pooling_type": 3},
    ],
)
def test_keys_of_a_gguf_file_that_change_nothing_are_let_by(name: str, changes: dict[str, Any]) -> None:
    assert with_metadata(name, changes) == with_metadata(name, {})


@pytest.mark.parametrize("name", ["gguf_llama_f32", "gguf_qwen2", "gguf_gpt2"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.causal": False}, r"attention\.causal: found False, expected True"),
        ({"attention.scale": 0.5}, r"attention\.scale: found 0\.5, expected no such key"),
        ({"logit_scale": 0.5}, "logit_scale: found"),
        ({"expert_count": 8}, "expert_count: found 8, expected 0|llama.expert_used_count is missing"),
        ({"expert_count": np.zeros(3, np.uint32)}, r"expert_count: found array"),
        ({"block_count": np.full(3, 2, np.uint32)}, r"block_count: found array.*, expected an integer"),
        ({"attention.head_count": np.full(2, 4, np.uint32)}, r"head_count: found array"),
        ({"block_count": 1000}, "block_count: found 1000, expected tensors for so many layers"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers: found 1"),
    ],
)
def test_what_could_change_a_gguf_file_s_arithmetic_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        with_metadata(name, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope.scaling.type": "ntk"},
            r"rope\.scaling\.type: found 'ntk', expected one of none, linear, yarn",
        ),
        ({"rope.scaling.factor": np.ones(2, np.float32)}, r"rope\.scaling\.factor: found array"),
        ({"rope.scaling.factor": -1.0}, r"rope\.scaling\.factor: found -1\.0"),
        ({"rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor: found"),
        ({"rope.dimension_count": 4}, r"rope\.dimension_count: found 4, expected 6"),
        ({"rope.freq_base": 0.25}, "theta 0.25, expected a number from 1"),
    ],
)
def test_rotary_settings_of_a_gguf_file_are_obeyed_or_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        with_metadata("gguf_llama_f32", changes)


def test_a_gguf_file_of_a_vocabulary_alone_is_named_so() -> None:
    with pytest.raises(CheckpointError, match="metadata alone \\(a vocabulary\\)"):
        with_metadata("gguf_llama_f32", {}, tensors={})


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_divisor_of_rotary_frequencies_is_a_positive_number(tmp_path: Path, value: float) -> None:
    source = MODELS / "gguf_llama_rope_freqs" / "model.gguf"
    with open_checkpoint(source) as checkpoint:
        offset = checkpoint.tensors["rope_freqs.weight"].offset
    content = bytearray(source.read_bytes())
    content[offset + 4 : offset + 8] = np.float32(value).tobytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"rope_freqs\.weight: found .* at 1, expected a number above"),
    ):
        read_spec(checkpoint)
