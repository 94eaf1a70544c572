"""The metadata of a model in GGUF's form: its sizes, its experts, how its queries and keys are rotated."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models import ModelSpec, gemma4
from pagellm.engine.models.gguf_rope import STILL
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.rope import LongRope, RopeTable
from pagellm.engine.quantization.gguf_architectures import Form
from pagellm.kernels.architecture import SIGMOID, SOFTMAX, Architecture

# Where llama.cpp reads what a scaling of RoPE needs.
_READS_DIVISORS = ("llama",)
_READS_LONGROPE = ("phi3", "minicpm", "minicpm3")
_GATING = {SOFTMAX: 1, SIGMOID: 2}


def gguf_keys(
    form: Form, config: Mapping[str, Any], spec: ModelSpec, checkpoint: Checkpoint
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The keys behind the architecture's prefix, and tensors of constants."""
    arch, first, name = spec.arch, spec.arch.layers[0], form.architecture
    context = next(
        (config[key] for key in ("max_position_embeddings", "n_positions") if type(config.get(key)) is int),
        spec.max_positions,
    )
    epsilon = "layer_norm_epsilon" if arch.layer_norm else "layer_norm_rms_epsilon"
    keys: dict[str, Any] = {
        "block_count": arch.num_layers,
        "context_length": context,
        "embedding_length": arch.hidden_size,
        "attention.head_count": int(first["num_heads"]),
        "attention.head_count_kv": int(first["num_kv_heads"]),
        "attention.key_length": int(first["head_dim"]),
        "attention.value_length": int(first["head_dim"]),
        f"attention.{epsilon}": arch.norm_epsilon,
        "vocab_size": arch.vocab_size,
        **_feed_forward_keys(form, config, arch),
    }
    if first["latent_dim"]:
        keys |= _latent_keys(form, first)
    if name == "gemma4":
        keys |= _gemma4_keys(config, arch)
    if first["qkv_clip"]:
        keys["attention.clamp_kqv"] = float(first["qkv_clip"])
    windows = arch.layers["window"]
    if (windows > 0).any():
        keys["attention.sliding_window"] = int(windows.max())
        if name == "olmo2":
            keys["attention.sliding_window_pattern"] = [bool(window) for window in windows]
    if first["attention_softcap"]:
        keys["attn_logit_softcapping"] = float(first["attention_softcap"])
    if arch.logits_softcap:
        keys["final_logit_softcapping"] = arch.logits_softcap
    if name in ("granite", "granitemoe", "minicpm"):
        keys["embedding_scale"] = arch.embedding_scale
        keys["residual_scale"] = float(first["residual_scale"])
        keys["logit_scale"] = 1 / arch.logits_scale
    if name in ("granite", "granitemoe"):
        keys["attention.scale"] = float(first["attention_scale"])
        if first["rope_table"] < 0:
            keys["rope.scaling.finetuned"] = False
    if name in ("command-r", "cohere2"):
        keys["logit_scale"] = arch.logits_scale
    if name == "gptneox":
        keys["use_parallel_residual"] = bool(first["parallel"])
    if name == "falcon":
        keys["tensor_data_layout"] = "jploski"
    rope, constants = _rope(form, config, spec, checkpoint)
    return {**keys, **rope}, constants


def _feed_forward_keys(form: Form, config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The width of the feed-forward, and what there is to say of experts."""
    layers = arch.layers
    sparse, name = layers["num_experts"] > 0, form.architecture
    width = int((layers if form.one_width else layers[~sparse])["intermediate_size"].max(initial=0))
    if not sparse.any() and name != "deepseek2":
        return {"feed_forward_length": width}
    row = layers[int(sparse.argmax())]
    size, shared = int(row["expert_size"]), int(row["intermediate_size"]) if sparse.any() else 0
    said = config.get("intermediate_size")
    if not width:  # that of no layer; where experts have no key of their own it is theirs
        width = said if form.own_width and type(said) is int and said > 0 else size
    keys: dict[str, Any] = {"feed_forward_length": width}
    if form.own_width:
        keys["expert_feed_forward_length"] = size or width
    if sparse.any():
        keys["expert_count"] = int(row["num_experts"])
        keys["expert_used_count"] = int(row["experts_per_token"])
    if name == "deepseek2":
        keys["leading_dense_block_count"] = int(sparse.argmax()) if sparse.any() else arch.num_layers
        keys["expert_shared_count"] = shared // max(1, size)
        keys["expert_weights_scale"] = float(row["router_scale"])
        keys["expert_weights_norm"] = bool(row["renormalize"])
        keys["expert_gating_func"] = _GATING[int(row["router"])]
        if sparse.any():
            keys["expert_group_count"] = int(row["expert_groups"])
            keys["expert_group_used_count"] = int(row["groups_per_token"])
    elif shared and not form.one_width:
        keys["expert_shared_feed_forward_length"] = shared
    if name == "ernie4_5-moe":
        keys["leading_dense_block_count"] = int(config.get("moe_layer_start_index", 1))
        keys["interleave_moe_layer_step"] = int(config.get("moe_layer_interval", 1))
        keys["expert_shared_count"] = shared // max(1, size)
    return keys


def _gemma4_keys(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The heads of layers that see everything and of those that do not, which differ in size."""
    layers = arch.layers
    slides = layers["window"] > 0
    full, local = (int(layers[rows]["head_dim"].max(initial=0)) for rows in (~slides, slides))
    return {
        "attention.head_count_kv": layers["num_kv_heads"].tolist(),
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": local or full,
        "attention.value_length_swa": local or full,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "attention.sliding_window": int(config.get("sliding_window", 512)),
        "attention.sliding_window_pattern": slides.tolist(),
    }


def _latent_keys(form: Form, row: Any) -> dict[str, Any]:
    """The sizes of latent attention: of what is kept, and of heads, which may have keys of their own."""
    latent, rotary = int(row["latent_dim"]), int(row["head_dim"] - row["latent_dim"])
    key, value = int(row["nope_dim"]) + rotary, int(row["value_dim"])
    keys = {"attention.kv_lora_rank": latent}
    if row["query_rank"]:
        keys["attention.q_lora_rank"] = int(row["query_rank"])
    if form.architecture != "deepseek2":
        heads = int(row["num_heads"])
        return keys | {
            "attention.head_count_kv": heads, "attention.key_length": key, "attention.value_length": value
        }  # fmt: skip
    return keys | {
        "attention.key_length": latent + rotary,
        "attention.value_length": latent,
        "attention.key_length_mla": key,
        "attention.value_length_mla": value,
    }


def _rope(
    form: Form, config: Mapping[str, Any], spec: ModelSpec, checkpoint: Checkpoint
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """How queries and keys are rotated, in layers that see everything and in those with a window."""
    if not spec.rope_tables:
        return {}, {}
    if form.architecture == "gemma4":
        return _gemma4_rope(config, spec)
    table, name = spec.rope_tables[0], form.architecture
    section, kind = rope_section(config)
    theta = section.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    theta = _theta(table) if not isinstance(theta, int | float) else float(theta)
    keys: dict[str, Any] = {"rope.dimension_count": table.rotary_dim, "rope.freq_base": theta}
    constants: dict[str, NDArray[np.float32]] = {}
    plain = theta ** (-2.0 * np.arange(len(table.frequencies)) / table.rotary_dim)
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(section["factor"])}
    elif kind == "llama3" and name in _READS_DIVISORS:
        constants["rope_freqs.weight"] = (plain / np.array(table.frequencies)).astype(np.float32)
    elif isinstance(table, LongRope) and name in _READS_LONGROPE:
        if name == "minicpm":
            keys["rope.scaling.type"] = "longrope"
        keys["rope.scaling.attn_factor"] = table.attention_factor
        keys["rope.scaling.original_context_length"] = table.original
        for length, frequencies in (("long", table.long_frequencies), ("short", table.frequencies)):
            constants[f"rope_factors_{length}.weight"] = (plain / np.array(frequencies)).astype(np.float32)
    elif kind == "yarn" and not isinstance(table, LongRope):
        key = "original_max_position_embeddings"
        original = config.get(key) or section.get(key) or spec.max_positions
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = float(section.get("factor") or table.max_positions / original)
        keys["rope.scaling.original_context_length"] = int(original)
        for which in ("beta_fast", "beta_slow"):
            if section.get(which):
                keys[f"rope.scaling.yarn_{which}"] = float(section[which])
        if section.get("mscale_all_dim") and name in ("mistral3", "deepseek2"):
            # Of deepseek2 a tenth: see `gguf_rope.score_factor`.
            factor = 0.1 if name == "deepseek2" else 1.0
            keys["rope.scaling.yarn_log_multiplier"] = factor * float(section["mscale_all_dim"])
    elif kind != "default":
        raise CheckpointError(
            f"{checkpoint.path}: rope_type: found {found(kind)}, which GGUF's {name} has no place for"
        )
    if table.query_scale is not None:
        keys["attention.temperature_scale"] = table.query_scale[0]
    if len(spec.rope_tables) > 1:
        keys["rope.freq_base_swa"] = _theta(spec.rope_tables[1])
    return keys, constants


def _gemma4_rope(
    config: Mapping[str, Any], spec: ModelSpec
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Of layers that see everything, of whose pairs some do not turn, and of the others."""
    layers = spec.arch.layers
    keys: dict[str, Any] = {}
    constants: dict[str, NDArray[np.float32]] = {}
    sections: Any = config.get("rope_parameters") or gemma4.DEFAULTS["rope_parameters"]
    for suffix, kind, rows in (
        ("", FULL, layers[layers["window"] == 0]),
        ("_swa", SLIDING, layers[layers["window"] > 0]),
    ):
        if not len(rows):
            continue
        table = spec.rope_tables[int(rows[0]["rope_table"])]
        theta = float(sections[kind]["rope_theta"])
        keys[f"rope.freq_base{suffix}"] = theta
        keys[f"rope.dimension_count{suffix}"] = table.rotary_dim
        if not suffix:
            turned = np.array(table.frequencies)
            plain = theta ** (-2.0 * np.arange(len(turned)) / table.rotary_dim)
            divisors = np.divide(plain, turned, out=np.full(len(turned), STILL), where=turned > 0)
            constants["rope_freqs.weight"] = divisors.astype(np.float32)
    return keys, constants


def rope_section(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What the configuration says of the layers that see everything, and the kind of scaling."""
    current, legacy = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    current = current.get(FULL, current)
    section = {**current, **legacy}
    kind = str(legacy.get("rope_type", legacy.get("type", current.get("rope_type", "default"))))
    return section, {"su": "longrope"}.get(kind, kind)


def _theta(table: RopeTable) -> float:
    """Of a table without a scaling that changes the ratio of its frequencies."""
    if len(table.frequencies) < 2:
        return 10000.0
    return float((table.frequencies[0] / table.frequencies[1]) ** (table.rotary_dim / 2))
