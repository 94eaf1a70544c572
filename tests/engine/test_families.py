"""Architectures beside Llama: their configurations become features of layers, or one clear error."""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pagellm.engine import LLM, CheckpointError
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.commands.inspection import inspect_model
from pagellm.engine.execution.weights import formats_of, load_weights
from pagellm.engine.models import ModelSpec, Source, read_spec
from pagellm.kernels.packing import unpack_column
from tests.conftest import ARCHITECTURES, MODELS


def edited(
    tmp_path: Path,
    name: str,
    edit: Callable[[dict[str, Any]], None],
    rename: Callable[[str], str] = lambda tensor: tensor,
) -> Path:
    """A fixture's directory after a change of its configuration, and of its tensors' names."""
    directory = tmp_path / name
    shutil.copytree(ARCHITECTURES / name, directory)
    config = json.loads((directory / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = {rename(tensor): place for tensor, place in json.loads(content[8 : 8 + size]).items()}
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])
    return directory


def setting(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


def spec_of(tmp_path: Path, name: str, **changes: Any) -> ModelSpec:
    with open_checkpoint(edited(tmp_path, name, setting(**changes))) as checkpoint:
        return read_spec(checkpoint)


def gguf_spec(name: str, **changes: Any) -> ModelSpec:
    """The spec of a GGUF fixture with some keys under its architecture's prefix changed; "__" is a dot."""
    with open_checkpoint(ARCHITECTURES / name / "model.gguf") as checkpoint:
        prefix = f"{checkpoint.config['general.architecture']}."
        config = checkpoint.config | {prefix + key.replace("__", "."): v for key, v in changes.items()}
        return read_spec(replace(checkpoint, config=config))


# Keys of the configurations that their makers published, which say nothing new.
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"rope_scaling": None, "max_window_layers": 28, "use_sliding_window": False}),
    ("gemma2", {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"}),
    ("gemma3_text_old", {"cache_implementation": "hybrid", "rope_theta": 1000000}),
    (
        "gemma4_text_dense",
        {
            "use_bidirectional_attention": "vision",
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "vocab_size_per_layer_input": 262144,
            "num_experts": None,
            "top_k_experts": None,
        },
    ),
    ("phi3", {"auto_map": {"AutoModel": "x"}, "attention_bias": False, "rope_scaling": None}),
    ("phi4_mini", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}),
    ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2, "rope_scaling": None}),
    ("granite", {"mlp_bias": False, "rope_scaling": None}),
    ("granitemoehybrid", {"init_method": "mup", "normalization_function": "rmsnorm"}),
    ("minicpm", {"rope_scaling": None, "mup_denominator": 32, "sparse_config": None}),
    ("glm4", {"partial_rotary_factor": 0.5, "rope_scaling": None}),
    ("ministral3", {"attention_bias": False, "use_cache": True}),
    ("olmo2", {"rope_scaling": None}),
    ("cohere", {"use_qk_norm": False, "pad_token_id": 0, "rope_scaling": None}),
    ("falcon_40b", {"multi_query": True, "bias": False, "rope_scaling": None, "hidden_dropout": 0.0}),
    ("gpt_bigcode_multi_head", {"scale_attn_weights": True, "summary_use_proj": True}),
    ("gpt_neox", {"rope_scaling": None, "tie_word_embeddings": False}),
    ("gptj_tied", {"rotary": True, "summary_type": "cls_index", "tokenizer_class": "GPT2Tokenizer"}),
    ("opt", {"do_layer_norm_before": True, "layerdrop": 0.0, "word_embed_proj_dim": 36}),
    ("phi", {"qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None}),
    ("starcoder2_full", {"norm_type": "layer_norm", "residual_dropout": 0.1, "sliding_window": None}),
]


@pytest.mark.parametrize(("name", "keys"), PUBLISHED)
def test_keys_that_published_configurations_have_change_nothing(
    tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    with open_checkpoint(ARCHITECTURES / name) as checkpoint:
        assert spec_of(tmp_path, name, **keys) == read_spec(checkpoint)


HUB_NAMES = sorted(path.name for path in ARCHITECTURES.iterdir() if (path / "config.json").exists())


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_number_under_an_unknown_key_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"chunk_gain: found 0\.5, expected no such key"):
        spec_of(tmp_path, name, chunk_gain=0.5)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: found True"),
        ("gemma2", {"hidden_activation": "gelu_quick"}, "hidden_activation: found 'gelu_quick'"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected hidden_activation alone"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types: found .*, expected a list of 3"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping: found 50\.0"),
        ("gemma3", {"text_config": None}, "text_config: found None, expected the language model's"),
        ("gemma3", {"audio_gain": 2}, "audio_gain: found 2, expected no such key"),
        ("gemma3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: found 'fp8'"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "num_kv_shared_layers: found 1, expected 0"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input: found 8"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention: found 'all'"),
        ("gemma4_text", {"top_k_experts": 7}, "experts_per_token: found 7 with 6 experts"),
        ("gemma4_text", {"num_experts": 5}, r"router\.proj\.weight has shape \(6, 36\)"),
        ("gemma4_text", {"num_experts": None}, "num_experts: found None, expected an integer"),
        ("gemma4_text", {"enable_moe_block": False}, "has no place in architecture gemma4_text"),
        ("gemma4_text", {"attention_k_eq_v": False}, r"v_proj\.weight is missing"),
        ("gemma4_text", {"per_layer_config": {"1": {"gain": 4}}}, r"per_layer_config\.1\.gain: found 4"),
        ("gemma4_text", {"per_layer_config": {"1": 4}}, r"per_layer_config\.1: found 4, expected an"),
        ("gemma4_text", {"per_layer_config": {"3": {}}}, "per_layer_config: found .3., expected the"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 16}}}, "the same heads in all layers"),
        ("gemma4_text", {"rope_parameters": {}}, "rope_parameters.sliding_attention: found None"),
        ("gemma4_text", {"rope_scaling": {"factor": 2.0}}, "rope_scaling: found .*, expected no such key"),
        ("gemma4", {"video_gain": 2}, "video_gain: found 2, expected no such key"),
        ("granitemoehybrid", {"num_local_experts": 8}, "num_experts_per_tok: found 0, expected an integer"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "found .'linear_attention"),
        ("granitemoehybrid", {"layers_block_type": ["mamba"] * 2}, "the same as layers_block_type"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type: found 'alibi'"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier: found 0, expected a positive number"),
        ("phi4_mini", {"full_attn_mod": 2}, "full_attn_mod: found 2"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "type: found 'linear'"),
        ("minicpm", {"sparse_config": {"topk": 64}}, "sparse_config: found"),
        ("mistral_window", {"layer_types": ["full_attention", "sliding_attention"]},
         "layer_types: found .*, expected sliding_attention alone, as mistral has it"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4},
         "layer_types: found .*, expected full_attention alone where use_sliding_window is false"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers: found .*each one of 0 and 1"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: found .*at least 4"),
        ("glm4", {"attention_bias": False}, "bias has no place"),
        ("glm4", {"mlp_bias": True}, "mlp_bias: found True, expected False"),
        ("ernie4_5", {"hidden_act": "relu"}, "hidden_act: found 'relu'"),
        ("bitnet", {"quantization_config": {"quant_method": "bitnet"}}, "quantization_config: found 'bitnet"),
        ("bitnet", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected one of relu2, silu, swish"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm: found True"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block: found False"),
        ("cohere2", {"sliding_window": None}, "sliding_window: found None, expected an integer"),
        ("cohere2", {"head_dim": 4}, "head_dim: found 4, expected 8"),
        ("cohere2", {"layer_switch": 3}, "layer_switch: found 3, expected 4"),
        ("falcon_7b", {"alibi": True}, "alibi: found True, expected False"),
        ("falcon_7b", {"num_ln_in_parallel_attn": 2}, "new_decoder_architecture: found False, expected true"),
        ("falcon_40b", {"parallel_attn": False}, "new_decoder_architecture: found True, expected"),
        ("falcon_7b", {"bias": True}, r"query_key_value\.bias is missing"),
        ("falcon_7b", {"multi_query": False, "num_kv_heads": None}, r"query_key_value\.weight has shape"),
        ("gpt_bigcode", {"multi_query": False}, r"attn\.c_attn\.weight has shape"),
        ("gpt_bigcode", {"num_key_value_heads": 2}, "num_key_value_heads: found 2, expected 1"),
        ("gpt_neox", {"rope_theta": 5e5}, "rope_theta: found 500000.0, expected rotary_emb_base alone, or"),
        ("gpt_neox", {"rotary_pct": 0.01}, "rotary_pct: found 0.01, expected a share"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "experts_per_token: found 9 with 7 experts in 1 groups"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok: found 0, expected an integer"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers: found 'all', expected a list"),
        ("qwen3_moe", {"num_experts": 8}, "num_local_experts: found 7, expected the same as num_experts"),
        ("qwen3_moe", {"moe_intermediate_size": 24}, r"gate_proj\.weight has shape \(20, 32\)"),
        ("qwen3_moe_stacked", {"num_local_experts": 6}, r"gate\.weight has shape \(7, 32\)"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 20}, r"shared_expert\..* has shape"),
        ("mixtral", {"num_local_experts": 1 << 20}, "2097152 experts in all layers, expected at most 131072"),
        ("mixtral", {"router_aux_loss_coef": 0.1, "router_gain": 2}, "router_gain: found 2, expected"),
        ("ernie4_5_moe", {"moe_layer_end_index": -2}, "moe_layer_end_index: found -2, expected a layer's"),
        ("ernie4_5_moe", {"moe_num_shared_experts": -1}, "moe_num_shared_experts: found -1, expected"),
        ("olmoe_clip", {"clip_qkv": -1.0}, "clip_qkv: found -1.0, expected a positive number"),
        ("dbrx", {"moe_normalize_expert_weights": 2.0}, "ffn_config.moe_normalize_expert_weights: found 1.0"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2.0}}, "found 2.0, expected 1 or null"),
        ("dbrx", {"ffn_config": {"gain": 2.0}}, "gain: found 2.0, expected no such key"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit: found 5.0, expected 7.0"),
        ("gpt_oss", {"experts_per_token": 3}, "experts_per_token: found 3, expected 2"),
        ("gpt_oss_mxfp4", {"quantization_config": {"quant_method": "mxfp4", "block": 64}}, "block"),
        ("granitemoe", {"num_experts_per_tok": 6}, "experts_per_token: found 6 with 5 experts"),
        ("gptj", {"rotary_dim": None}, "rotary_dim: found None, expected an integer"),
        ("gptj", {"rotary_dim": 16}, "16 dimensions of a head are rotated, expected at most 12"),
        ("gptj", {"scale_attn_weights": False}, "scale_attn_weights: found False"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: found False"),
        ("opt", {"word_embed_proj_dim": 18}, "word_embed_proj_dim: found 18, expected 36"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm: found True"),
        ("opt", {"enable_bias": False}, "bias has no place"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm: found True"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type: found 'gated'"),
    ],
)  # fmt: skip
def test_what_an_architecture_does_not_have_is_refused_by_name(
    tmp_path: Path, name: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_of(tmp_path, name, **keys)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gemma2", {"rope__freq_base_swa": 5e5}, r"rope\.freq_base_swa: found 500000\.0"),
        ("gemma3_text", {"attention__sliding_window_pattern": np.ones(3, np.bool_)}, "window_pattern: found"),
        ("gemma4_text", {"attention__shared_kv_layers": 1}, r"attention\.shared_kv_layers: found 1"),
        ("gemma4_text", {"embedding_length_per_layer_input": 8}, "embedding_length_per_layer_input: found 8"),
        (
            "gemma4_text",
            {"attention__sliding_window_pattern": 6},
            "sliding_window_pattern: found 6, expected",
        ),
        ("gemma4_text", {"attention__sliding_window_pattern": np.array([1, 2, 0])}, "window_pattern: found"),
        ("gemma4_text", {"attention__sliding_window_pattern": np.array([True])}, "window_pattern: found"),
        (
            "gemma4_text",
            {"attention__value_length_swa": 8},
            r"attention\.value_length_swa: found 8",
        ),
        (
            "gemma4_text",
            {"rope__dimension_count_swa": 14},
            r"rope\.dimension_count_swa: found 14, expected an",
        ),
        ("gemma4_text", {"rope__scaling__type": "yarn"}, r"rope\.scaling\.type: found 'yarn'"),
        ("gemma4_text", {"expert_count": 0}, "expert_used_count: found 3, expected 0"),
        ("glm4", {"rope__dimension_sections": np.ones(4, np.int32)}, r"rope\.dimension_sections: found"),
        ("granite", {"expert_count": 8}, "expert_used_count is missing"),
        (
            "granitemoehybrid",
            {"attention__head_count_kv": np.array([2, 0], np.int32)},
            "head_count_kv: found",
        ),
        ("granite", {"deepstack_mapping": np.zeros(2, np.int32)}, "deepstack_mapping: found"),
        ("qwen3", {"attention__sliding_window": 8}, r"attention\.sliding_window: found 8"),
        ("olmo2", {"attention__clamp_kqv": 8.0}, r"attention\.clamp_kqv: found 8\.0"),
        ("bitnet_silu", {"attention__sliding_window": 8}, r"attention\.sliding_window: found 8"),
        ("falcon_7b", {"attention__max_alibi_bias": 8.0}, r"attention\.max_alibi_bias: found 8\.0"),
        ("gpt_neox", {"use_parallel_residual": 1}, "use_parallel_residual: found 1, expected true or false"),
        ("starcoder2_full", {"attention__sliding_window": 8}, r"attention\.sliding_window: found 8"),
    ],
)
def test_what_a_gguf_file_asks_for_and_is_not_there_is_refused_by_name(
    name: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        gguf_spec(name, **keys)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gemma4_text", "blk.0.attn_v.weight"),  # only layers that see everything may have none
        ("gemma4_text", "blk.1.layer_output_scale.weight"),
        ("gemma4_text", "blk.2.ffn_down_exps.scale"),
        ("gemma4_text", "blk.2.ffn_gate_inp.scale"),
        ("gemma4_text", "blk.1.post_ffw_norm_1.weight"),
        ("gemma4_text", "rope_freqs.weight"),
        ("deepseek_v3", "blk.2.exp_probs_b.bias"),
    ],
)
def test_a_tensor_that_one_layer_of_many_lacks_is_missing(name: str, tensor: str) -> None:
    with open_checkpoint(ARCHITECTURES / name / "model.gguf") as checkpoint:
        assert tensor in checkpoint.tensors
        rest = {key: value for key, value in checkpoint.tensors.items() if key != tensor}
        with pytest.raises(CheckpointError, match=rf"tensor {re.escape(tensor)} is missing"):
            read_spec(replace(checkpoint, tensors=rest))


def windows(spec: ModelSpec) -> list[int]:
    return spec.arch.layers["window"].tolist()


def test_windows_are_of_the_layers_that_the_configuration_says(tmp_path: Path) -> None:
    def of(name: str, **keys: Any) -> list[int]:
        return windows(spec_of(tmp_path / str(len(keys)), name, **keys))

    assert of("gemma2") == [9, 0, 9]
    assert of("gemma2", layer_types=None) == [9, 0, 9]
    assert of("gemma3_text") == [9, 9, 9, 9, 9, 0, 9]
    assert of("gemma3_text_old") == [9, 9, 9, 9, 9, 0, 9]
    assert of("gemma3_text_old", sliding_window_pattern=2) == [9, 0, 9, 0, 9, 0, 9]
    assert of("olmo3") == [9, 9, 9, 0]
    assert of("olmo3", layer_types=["full_attention"] * 3 + ["sliding_attention"]) == [0, 0, 0, 9]
    assert of("mistral_window") == [9, 9]
    assert of("phi3_window") == [9, 9]
    assert of("qwen3", use_sliding_window=True, sliding_window=7, layer_types=None) == [0, 0]
    keys = {"use_sliding_window": True, "sliding_window": 7, "layer_types": None, "max_window_layers": 1}
    assert of("qwen3", **keys) == [0, 7]
    assert of("smollm3", use_sliding_window=True, sliding_window=7, layer_types=None) == [0, 0, 0, 7]


def test_windows_of_gguf_files_follow_a_list_or_a_period() -> None:
    assert windows(gguf_spec("gemma2")) == [9, 0, 9]
    assert windows(gguf_spec("gemma3_text")) == [9, 9, 9, 9, 9, 0, 9]
    assert windows(gguf_spec("gemma3_text", attention__sliding_window_pattern=3)) == [9, 9, 0, 9, 9, 0, 9]
    assert windows(gguf_spec("gemma3_text", attention__sliding_window=0)) == [0] * 7
    pattern = np.array([False, True, False, True])
    assert windows(gguf_spec("olmo3", attention__sliding_window_pattern=pattern)) == [0, 9, 0, 9]
    assert windows(gguf_spec("gemma4_text")) == [9, 0, 0]
    pattern = np.array([1, 0, 0], np.int32)  # for which llama.cpp takes numbers, too
    assert windows(gguf_spec("gemma4_text", attention__sliding_window_pattern=pattern)) == [9, 0, 0]
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight has shape"):
        gguf_spec("gemma4_text", attention__sliding_window_pattern=pattern[::-1])


def test_layers_have_the_rotary_embeddings_of_their_kind(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "gemma3_text_old")
    assert spec.arch.layers["rope_table"].tolist() == [1, 1, 1, 1, 1, 0, 1]
    stretched, local = (table.frequencies for table in spec.rope_tables)
    assert stretched[1] == pytest.approx(1e6 ** (-2 / 8) / 8)
    assert local[1] == pytest.approx(1e4 ** (-2 / 8))
    assert spec_of(tmp_path, "smollm3").arch.layers["rope_table"].tolist() == [0, 0, 0, -1]
    spec = spec_of(tmp_path, "gemma4_text")
    assert spec.arch.layers["rope_table"].tolist() == [0, 1, 1]
    assert spec.rope_tables[0].rotary_dim == 12
    assert spec.rope_tables[1].frequencies == pytest.approx((1, 1e6 ** (-2 / 16), 0, 0, 0, 0, 0, 0))
    of_gguf = gguf_spec("gemma4_text")
    assert of_gguf.arch.layers["rope_table"].tolist() == [1, 0, 0]
    assert of_gguf.rope_tables[0].frequencies == pytest.approx(spec.rope_tables[1].frequencies)


def test_layers_that_see_everything_have_heads_of_their_own(tmp_path: Path) -> None:
    def heads(spec: ModelSpec) -> list[tuple[int, int]]:
        layers = spec.arch.layers
        return list(zip(layers["head_dim"].tolist(), layers["num_kv_heads"].tolist(), strict=True))

    assert heads(gguf_spec("gemma4_text")) == [(12, 2), (16, 1), (16, 1)]
    assert heads(spec_of(tmp_path, "gemma4_text")) == [(12, 2), (16, 1), (16, 1)]
    keys = {"per_layer_config": None, "global_head_dim": 16, "num_global_key_value_heads": 1}
    assert heads(spec_of(tmp_path / "old", "gemma4_text", **keys)) == [(12, 2), (16, 1), (16, 1)]
    # The last layer sees everything whatever the list says.
    keys["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(spec_of(tmp_path / "last", "gemma4_text", **keys)) == [9, 0, 0]


def test_multipliers_are_of_the_model_and_of_its_layers(tmp_path: Path) -> None:
    granite = spec_of(tmp_path, "granite").arch
    assert (granite.embedding_scale, granite.logits_scale) == (12.0, pytest.approx(1 / 3))
    assert granite.layers["residual_scale"].tolist() == [0.35, 0.35]
    assert granite.layers["attention_scale"].tolist() == [0.2, 0.2]
    minicpm = spec_of(tmp_path, "minicpm").arch
    assert (minicpm.embedding_scale, minicpm.logits_scale) == (12.0, 0.5)
    assert minicpm.layers["residual_scale"].tolist() == [1.4 / 2**0.5] * 2
    gemma2 = spec_of(tmp_path, "gemma2").arch
    assert (gemma2.embedding_scale, gemma2.logits_softcap) == (6.0, 4.0)
    assert gemma2.layers["attention_softcap"].tolist() == [3.0] * 3


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model."])
def test_a_language_model_beside_a_vision_tower_is_read_alone(tmp_path: Path, name: str, prefix: str) -> None:
    def rename(tensor: str) -> str:
        is_other = "vision" in tensor or "projector" in tensor
        if is_other and prefix == "model.language_model.":
            return f"model.{tensor}"
        return tensor.replace("language_model.model.", prefix)

    with open_checkpoint(ARCHITECTURES / name) as checkpoint:
        plain = read_spec(checkpoint)
    with open_checkpoint(edited(tmp_path, name, setting(), rename)) as checkpoint:
        spec = read_spec(checkpoint)
    assert spec.arch == plain.arch
    assert spec.rest["embedding"][0].tensor == f"{prefix}embed_tokens.weight"
    assert "vision tower" in spec.left_alone
    assert inspect_model(str(tmp_path / name))["architecture"]["left_alone"] == spec.left_alone


def test_a_text_config_without_a_type_is_of_the_whole_s(tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["text_config"]["model_type"]

    with open_checkpoint(edited(tmp_path, "gemma3", forget)) as checkpoint:
        assert read_spec(checkpoint).architecture == "gemma3_text"


# Loading


def fused(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """A llama's Q, K and V, and its gate and linear half, as the tensors of a phi3."""
    config.update(model_type="phi3", original_max_position_embeddings=None)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        qkv = [tensors.pop(f"{prefix}.self_attn.{one}_proj.weight") for one in "qkv"]
        up = [tensors.pop(f"{prefix}.mlp.{one}_proj.weight") for one in ("gate", "up")]
        tensors[f"{prefix}.self_attn.qkv_proj.weight"] = np.concatenate(qkv)
        tensors[f"{prefix}.mlp.gate_up_proj.weight"] = np.concatenate(up)


def logits(path: Path, quantization: str) -> np.ndarray:
    llm = LLM(str(path), num_blocks=16, num_threads=2, quantization=quantization, show_progress=False)
    result = llm.logits(list(range(20)))
    llm.close()
    return result


def test_experts_that_are_apart_give_the_bits_of_stacked_ones(tmp_path: Path) -> None:
    stacked, apart = ARCHITECTURES / "gemma4_text", tmp_path / "apart"
    shutil.copytree(stacked, apart)
    tensors = {}
    with open_checkpoint(stacked) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            values = tensor.rows(0, tensor.shape[0]).reshape(tensor.shape)
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = values
                continue
            before, _, part = name.rpartition(".")
            halves = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
            for expert, matrix in enumerate(values):
                for half, index in halves.items():
                    piece = np.split(matrix, len(halves))[index]
                    tensors[f"{before}.{expert}.{half}.weight"] = np.ascontiguousarray(piece)
    save_file(tensors, apart / "model.safetensors")
    np.testing.assert_array_equal(logits(apart, "int8"), logits(stacked, "int8"))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_fused_tensor_gives_the_bits_of_its_pieces(tmp_path: Path, quantization: str) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(MODELS / "llama_mha", plain)
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    fused(config, tensors)
    other = tmp_path / "fused"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    save_file(tensors, other / "model.safetensors")
    np.testing.assert_array_equal(logits(plain, quantization), logits(other, quantization))


@pytest.mark.parametrize("rows", [((0, 36),), ((6, 12), (0, 6), (24, 36)), ((30, 36), (12, 18))])
@pytest.mark.parametrize("rotary_dim", [0, 4])
def test_ranges_of_rows_and_rotary_pairs_are_taken_in_their_order(
    rows: tuple[tuple[int, int], ...], rotary_dim: int
) -> None:
    """Of the embedding of a tiny model, taken for heads of six."""
    with open_checkpoint(MODELS / "gguf_llama_f32" / "model.gguf") as checkpoint:
        spec = read_spec(checkpoint)
        tensor = checkpoint.tensors["blk.0.attn_q.weight"]
        heads = sum(end - first for first, end in rows) // 6
        source = Source(
            tensor.name, tensor.shape, rows=rows, paired_heads=heads, rotary_dim=rotary_dim, add=1.0
        )
        stored = np.concatenate([tensor.rows(first, end) for first, end in rows]).reshape(heads, 6, -1)
        order = [0, 2, 4, 1, 3, 5] if rotary_dim == 0 else [0, 2, 1, 3, 4, 5]
        expected = stored[:, order].reshape(heads * 6, -1) + np.float32(1)
        arch = spec.arch._replace(num_positions=heads * 6)
        rest = {**spec.rest, "position_embedding": (source,)}
        spec = replace(spec, arch=arch, rest=rest)
        weights = load_weights(checkpoint, spec, formats_of(checkpoint, spec, "none"), 8, show=False)
        start = int(weights.rest[0]["position_embedding"]["start"])
        loaded = weights.values[start : start + expected.size].reshape(expected.shape)
        np.testing.assert_array_equal(loaded, expected)


def test_more_heads_than_dimensions_is_an_error_and_no_crash(tmp_path: Path) -> None:
    for name in ("gemma2", "olmo2"):
        with pytest.raises(CheckpointError, match="num_attention_heads: found 4000, expected at most"):
            spec_of(tmp_path, name, num_attention_heads=4000, head_dim=None)


@pytest.mark.parametrize(("value", "scale"), [({}, 1 / 3), ({"logit_scale": 2.0}, 0.5)])
def test_a_dense_granite_may_be_called_a_hybrid(value: dict[str, Any], scale: float) -> None:
    with open_checkpoint(ARCHITECTURES / "granitemoehybrid" / "model.gguf") as checkpoint:
        config = {key.replace("granite.", "granitehybrid."): v for key, v in checkpoint.config.items()}
        config |= {"general.architecture": "granitehybrid"}
        config |= {f"granitehybrid.{key}": v for key, v in value.items()}
        spec = read_spec(replace(checkpoint, config=config))
    assert spec.arch.logits_scale == pytest.approx(scale)


@pytest.mark.parametrize("name", ["gguf_llama_f32", "gguf_llama_q8_0", "gguf_llama_q4_0"])
def test_ranges_of_a_matrix_s_rows_are_packed_as_they_are_stored(name: str) -> None:
    """Of the product behind attention, taken for heads of two rotary pairs, in two ranges."""
    with open_checkpoint(MODELS / name / "model.gguf") as checkpoint:
        spec = read_spec(checkpoint)
        tensor = checkpoint.tensors["blk.0.attn_output.weight"]
        outputs, inputs = tensor.shape
        source = Source(tensor.name, tensor.shape, rows=((8, outputs), (0, 8)))
        source = replace(source, paired_heads=outputs // 4)
        spec = replace(spec, layers=({**spec.layers[0], "output": (source,)}, *spec.layers[1:]))
        stored = np.roll(tensor.rows(0, outputs), -8, axis=0).reshape(-1, 4, inputs)
        expected = stored[:, [0, 2, 1, 3]].reshape(outputs, inputs)
        weights = load_weights(checkpoint, spec, formats_of(checkpoint, spec, "auto"), 8, show=False)
        place = weights.layers[0]["output"]
        column = np.zeros(inputs, np.float32)
        for n in range(outputs):
            unpack_column(int(place["format"]), weights.values, int(place["start"]), inputs, n, column, 0)
            np.testing.assert_array_equal(column, expected[n])


HOSTILE = (None, 0, -1, "x", [1], {"a": 1}, True, 1e-300, 1 << 19, 10**30, math.inf)
CONFIGURATIONS = sorted(
    f"{directory.name}/{file}"
    for directory in ARCHITECTURES.iterdir()
    for file in ("config.json", "model.gguf")
    if (directory / file).exists()
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_value_of_any_key_is_more_than_an_error(name: str) -> None:
    """Whatever a key says, the reader answers or refuses."""
    path = ARCHITECTURES / name
    is_gguf = path.suffix == ".gguf"
    with open_checkpoint(path if is_gguf else path.parent) as checkpoint:
        prefix = checkpoint.config["general.architecture"] if is_gguf else ""
        for key in (key for key in checkpoint.config if key.startswith(prefix)):
            for value in (*HOSTILE, *[np.zeros(2, np.int32)] * is_gguf):
                with contextlib.suppress(CheckpointError):
                    read_spec(replace(checkpoint, config={**checkpoint.config, key: value}))


def test_a_gguf_file_s_fused_tensor_gives_the_bits_of_its_pieces(tmp_path: Path) -> None:
    """As the first files of GLM-4 have it: Q, K and V in one tensor, with biases and rotary pairs."""
    source, path = ARCHITECTURES / "glm4" / "model.gguf", tmp_path / "fused.gguf"
    writer = gguf.GGUFWriter(path, "glm4")
    with open_checkpoint(source) as checkpoint:
        for key, value in checkpoint.config.items():
            if key.startswith("glm4."):
                add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
                add(key, value)
        rows = {name: tensor.rows(0, tensor.shape[0]) for name, tensor in checkpoint.tensors.items()}
        spec = read_spec(checkpoint)
    for layer in range(spec.arch.num_layers):
        for kind in ("weight", "bias"):
            pieces = [rows.pop(f"blk.{layer}.attn_{one}.{kind}") for one in "qkv"]
            rows[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(pieces)
    for name, values in rows.items():
        writer.add_tensor(name, values.reshape(-1) if values.shape[-1:] == (1,) else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(logits(path, "none"), logits(source, "none"))


def test_a_key_by_llama_s_name_may_say_the_default_of_the_class(tmp_path: Path) -> None:
    keys = {"rotary_emb_base": 10000, "rope_theta": 10000.0, "rope_scaling": None}
    assert (
        spec_of(tmp_path, "gpt_neox", **keys).rope_tables == spec_of(tmp_path / "b", "gpt_neox").rope_tables
    )
    with pytest.raises(CheckpointError, match="rope_theta: found 500, expected rotary_emb_base alone"):
        spec_of(tmp_path / "c", "gpt_neox", rope_theta=500)


def test_the_readme_shows_an_architecture_as_it_is() -> None:
    root = Path(__file__).parents[2]
    shown = (root / "README.md").read_text("utf-8")
    assert f"```python\n{(root / 'engine' / 'models' / 'qwen3.py').read_text('utf-8')}```\n" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts_per_token": 0},
            "experts_per_token: found 0 with 7 experts in 1 groups, expected from 1 to 7",
        ),
        ({"expert_groups": 0}, "expert_groups: found 0 .* expected from 1 to 7"),
        ({"expert_groups": 2}, "7 experts cannot be in 2 equal groups"),
        ({"expert_groups": 7, "groups_per_token": 8}, "groups_per_token: found 8 .* expected from 1 to 7"),
        ({"expert_groups": 7, "groups_per_token": 2}, "experts_per_token: found 3 .* expected from 1 to 2"),
        ({"group_best": 8}, "group_best: found 8 .* expected from 1 to 7"),
        ({"expert_size": 0}, "expert_size: found 0"),
        ({"shared_gate": 1}, "intermediate_size: found 0 .* expected 1 or more"),
        ({"num_experts": 0}, "experts_per_token: found 3, expected 0 without experts"),
        ({"num_experts": 0, "experts_per_token": 0}, "found neither a feed-forward nor experts"),
    ],
)
def test_numbers_of_a_mixture_that_do_not_fit_each_other_are_refused(
    changes: dict[str, int], message: str
) -> None:
    """Else a kernel would look for an expert that there is not."""
    with open_checkpoint(ARCHITECTURES / "qwen3_moe") as checkpoint:
        spec = read_spec(checkpoint)
    layers = spec.arch.layers.copy()
    for name, value in changes.items():
        layers[name][1] = value
    with pytest.raises(CheckpointError, match=f"qwen3_moe: layer 1: {message}"):
        replace(spec, arch=spec.arch._replace(layers=layers))
