"""Latent attention: what published configurations mean, what is kept of a token, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pagellm.engine import LLM, CheckpointError
from pagellm.engine.checkpoints import Checkpoint, open_checkpoint
from pagellm.engine.commands.inspection import inspect_model
from pagellm.engine.execution.weights import kv_bytes_per_token
from pagellm.engine.models import ModelSpec, read_spec
from pagellm.engine.models.shape import read_shape
from pagellm.kernels.packing import BFLOAT16, FLOAT32
from pagellm.sim.costs.mixtures import read_mixture
from tests.conftest import ARCHITECTURES
from tests.engine.test_families import gguf_spec, spec_of

# The files beside the published weights, without what says nothing of the model's arithmetic.
MINICPM3_4B = {
    "model_type": "minicpm3", "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 6400,
    "max_position_embeddings": 32768, "num_attention_heads": 40, "num_hidden_layers": 62,
    "num_key_value_heads": 40, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 768,
    "kv_lora_rank": 256, "rms_norm_eps": 1e-05, "vocab_size": 73448, "scale_emb": 12, "dim_model_base": 256,
    "scale_depth": 1.4, "v_head_dim": 64, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": [2, 73440], "initializer_range": 0.1, "use_cache": True, "pretraining_tp": 1,
    "auto_map": {"AutoModel": "modeling_minicpm.MiniCPM3Model"},
    "rope_scaling": {
        "type": "longrope", "long_factor": [1.0] * 16, "short_factor": [1.0] * 16,
        "original_max_position_embeddings": 32768,
    },
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "aux_loss_alpha": 0.001, "attention_bias": False, "attention_dropout": 0.0,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "v_head_dim": 128,
    "vocab_size": 102400,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
GLM_4_7_FLASH = {
    "model_type": "glm4_moe_lite", "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 154820,
    "eos_token_id": [154820, 154827, 154829], "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10240, "max_position_embeddings": 202752, "moe_intermediate_size": 1536,
    "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 20, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "q_lora_rank": 768,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "vocab_size": 154880,
}  # fmt: skip
# Billions of weights, and numbers that are kept of a token in all layers.
PUBLISHED = [
    (MINICPM3_4B, 4.07, 62 * (256 + 32)),
    (DEEPSEEK_V2_LITE, 15.7, 27 * (512 + 64)),
    (GLM_4_7_FLASH, 29.9, 47 * (512 + 64)),
]
published = pytest.mark.parametrize(
    ("config", "billions", "kept"), PUBLISHED, ids=[config["model_type"] for config, _, _ in PUBLISHED]
)


def spec_of_config(config: dict[str, Any]) -> ModelSpec:
    return read_spec(Checkpoint(Path("of"), "safetensors", config, {}, headers_only=True, config_only=True))


@published
def test_a_published_configuration_is_a_model_of_its_size(
    config: dict[str, Any], billions: float, kept: int, tmp_path: Path
) -> None:
    """The simulator's own reader of such files agrees in every size."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shape, other = read_shape(path), read_mixture(path)
    assert other is not None
    assert round(shape["num_parameters"] / 1e9, 2 if billions < 5 else 1) == billions
    for name in ("hidden_size", "vocab_size", "tied_embeddings", "max_model_len"):
        assert shape[name] == other[name]
    assert len(shape["layers"]) == len(other["layers"])
    for layer, expected in zip(shape["layers"], other["layers"], strict=True):
        assert layer.items() >= expected.items()


@published
def test_a_token_is_kept_as_one_latent_vector_for_all_heads(
    config: dict[str, Any], billions: float, kept: int
) -> None:
    arch = spec_of_config(config).arch
    assert kv_bytes_per_token(arch, FLOAT32) == 4 * kept
    assert kv_bytes_per_token(arch, BFLOAT16) == 2 * kept


def test_what_is_kept_is_what_the_cache_has_room_for() -> None:
    llm = LLM(str(ARCHITECTURES / "minicpm3"), num_blocks=5, block_size=4, show_progress=False)
    cache = llm.engine.runner.cache
    words = int(cache.key_start[-1] + cache.value_start[-1])
    llm.close()
    assert 4 * words == 5 * 4 * 2 * 4 * (20 + 16)
    report = inspect_model(ARCHITECTURES / "minicpm3", "none")
    assert report["kv_cache"]["bytes_a_token"] == 2 * 4 * (20 + 16)


def test_scores_are_scaled_by_yarn_s_magnitude_squared() -> None:
    plain = (128 + 64) ** -0.5
    scaled = DEEPSEEK_V2_LITE | {"rope_scaling": DEEPSEEK_V2_LITE["rope_scaling"] | {"mscale": 1.0}}
    magnitude = 0.1 * 0.707 * math.log(40) + 1
    for config, factor, of_rope in (
        (DEEPSEEK_V2_LITE, magnitude**2, 1.0),
        (scaled, magnitude**2, (0.1 * math.log(40) + 1) / magnitude),
        (DEEPSEEK_V2_LITE | {"rope_scaling": None}, 1.0, 1.0),
    ):
        spec = spec_of_config(config)
        np.testing.assert_allclose(spec.arch.layers["attention_scale"], plain * factor)
        np.testing.assert_allclose(spec.rope_tables[0].attention_factor, of_rope)


def test_norms_of_what_is_compressed_have_the_epsilon_of_the_reference() -> None:
    """transformers' classes have one of their own, llama.cpp has one for all."""
    spec = spec_of_config(MINICPM3_4B)
    assert spec.arch.norm_epsilon == 1e-5
    assert (spec.arch.layers["latent_epsilon"] == 1e-6).all()
    spec = gguf_spec("minicpm3_4b", attention__layer_norm_rms_epsilon=1e-4)
    assert (spec.arch.layers["latent_epsilon"] == 1e-4).all()


def test_layers_that_predict_tokens_further_on_are_left_alone(tmp_path: Path) -> None:
    for name in ("deepseek_v3", "glm4_moe_lite"):
        with open_checkpoint(ARCHITECTURES / name) as checkpoint:
            spec = read_spec(checkpoint)
            assert any(".layers.3." in tensor for tensor in checkpoint.tensors)
        assert spec.arch.num_layers == 3
        assert "left alone" in spec.left_alone
        with pytest.raises(CheckpointError, match=r"layers\.3\..* has no place"):
            spec_of(tmp_path / name, name, num_nextn_predict_layers=0)
    spec = gguf_spec("glm4_moe_lite")
    assert (spec.arch.num_layers, "left alone" in spec.left_alone) == (3, True)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite"])
def test_older_files_have_one_tensor_that_widens_keys_and_values(name: str, tmp_path: Path) -> None:
    """As llama.cpp's converter wrote them before April 2025, with the keys of heads as they are widened."""
    source, path = ARCHITECTURES / name / "model.gguf", tmp_path / "old.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    with open_checkpoint(source) as checkpoint:
        keys = {k.removeprefix("deepseek2."): v for k, v in checkpoint.config.items() if "deepseek2." in k}
        rows = {name: tensor.rows(0, tensor.shape[0]) for name, tensor in checkpoint.tensors.items()}
        num_layers = read_spec(checkpoint).arch.num_layers
    keys["attention.key_length"] = keys.pop("attention.key_length_mla")
    keys["attention.value_length"] = keys.pop("attention.value_length_mla")
    keys["attention.head_count_kv"] = keys["attention.head_count"]
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(f"deepseek2.{key}", value)
    for layer in range(num_layers):
        k, v = (rows.pop(f"blk.{layer}.attn_{one}_b.weight") for one in "kv")
        both = np.concatenate([k.swapaxes(1, 2), v], axis=1)
        rows[f"blk.{layer}.attn_kv_b.weight"] = both.reshape(-1, both.shape[2])
    for tensor, values in rows.items():
        writer.add_tensor(tensor, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = [logits(one) for one in (path, source)]
    np.testing.assert_array_equal(*found)


def logits(path: Path) -> np.ndarray:
    llm = LLM(str(path), quantization="none", num_blocks=8, show_progress=False)
    found = llm.logits(list(range(3, 40)))
    llm.close()
    return found


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("minicpm3", {"kv_lora_rank": 0}, "kv_lora_rank: found 0, expected an integer from 1"),
        ("minicpm3", {"kv_lora_rank": 19}, r"kv_a_proj_with_mqa\.weight has shape .*, expected \(35, 36\)"),
        ("minicpm3", {"q_lora_rank": None}, r"q_proj\.weight is missing"),
        ("minicpm3", {"q_lora_rank": True}, "q_lora_rank: found True, expected an integer"),
        ("minicpm3", {"qk_nope_head_dim": 8}, r"q_b_proj\.weight has shape"),
        ("minicpm3", {"qk_rope_head_dim": 15}, "qk_rope_head_dim: found 15, expected an even number"),
        ("minicpm3", {"v_head_dim": 12}, r"kv_b_proj\.weight has shape"),
        ("minicpm3", {"head_dim": 12}, "head_dim: found 12, expected 16"),
        ("minicpm3", {"qk_head_dim": 96}, "qk_head_dim: found 96, expected 23"),
        ("minicpm3", {"num_key_value_heads": 1}, "num_key_value_heads: found 1, expected 3"),
        ("minicpm3", {"num_attention_heads": 1 << 20}, "num_attention_heads: found 1048576"),
        ("minicpm3_plain", {"attention_bias": True}, "attention_bias: found True, expected false where"),
        ("minicpm3", {"rope_scaling": {"type": "linear", "factor": None, "mscale_all_dim": 1.0}}, "factor"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: found 'noaux_tc', expected one of greedy"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: found True, expected False"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func: found 'sigmoid', expected 'softmax'"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq: found 2, expected 1"),
        ("deepseek_v2", {"first_k_dense_replace": -1}, "first_k_dense_replace: found -1"),
        ("deepseek_v2", {"num_experts_per_tok": 7}, "experts_per_token: found 7 with 6 experts"),
        ("deepseek_v2_groups", {"n_group": 4}, "experts_per_token|6 experts cannot be in 4"),
        ("deepseek_v2_groups", {"topk_group": 4}, "groups_per_token: found 4"),
        ("deepseek_v3", {"n_group": 6}, "group_best: found 2 .*, expected from 1 to 1"),
        ("deepseek_v3", {"rope_interleave": "yes"}, "rope_interleave: found 'yes'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: found 'softmax', expected 'sigmoid'"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types: found .*a list of 3"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace: found 2, expected 1"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, name: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_of(tmp_path, name, **keys)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("minicpm3_4b", {"attention__key_length": 6}, "key_length: found 6, expected more than rope.dim"),
        ("minicpm3_4b", {"attention__head_count_kv": 1}, "head_count_kv: found 1, expected 8"),
        ("minicpm3_4b", {"rope__dimension_count": 5}, "dimension_count: found 5, expected an even number"),
        ("minicpm3_4b", {"attention__value_length": 25}, r"attn_kv_b\.weight has shape"),
        ("deepseek_v2", {"attention__key_length": 99}, "key_length: found 99, expected 26"),
        ("deepseek_v2", {"attention__value_length": 10}, "value_length: found 10, expected 20"),
        ("deepseek_v2", {"attention__head_count_kv": 4}, "head_count_kv: found 4, expected 1"),
        ("deepseek_v2", {"attention__kv_lora_rank": 21}, "key_length: found 26, expected 27"),
        ("deepseek_v2", {"attention__temperature_scale": 0.1}, "temperature_scale: found 0.1"),
        ("deepseek_v2", {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}, "factor: found 2"),
        ("deepseek_v2", {"expert_gating_func": 3}, "expert_gating_func: found 3, expected 1 or 2"),
        ("deepseek_v2", {"leading_dense_block_count": 2}, r"ffn_gate\.weight is missing"),
        ("glm4_moe_lite", {"nextn_predict_layers": 4}, "nextn_predict_layers: found 4, expected fewer"),
        ("glm4_moe_lite", {"nextn_predict_layers": 0}, "tensor .* (is missing|has no place)"),
    ],
)  # fmt: skip
def test_what_a_gguf_file_says_must_fit_as_well(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        gguf_spec(name, **keys)


def test_a_configuration_alone_cannot_ask_for_endless_work() -> None:
    heads = {"num_attention_heads": 1 << 19, "num_key_value_heads": 1 << 19}
    huge = {**heads, "num_hidden_layers": 1 << 13, "hidden_size": 1 << 20}
    with pytest.raises(CheckpointError, match="num_attention_heads: found 524288, expected at most 8 in"):
        spec_of_config(MINICPM3_4B | huge)
