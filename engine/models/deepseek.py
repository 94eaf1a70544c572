"""DeepSeek-V2, V2-Lite and V3, and GLM-4.7-Flash in GGUF: latent attention, and experts behind some layers.

DeepSeek-AI 2024. GGUF files of this architecture may also have no experts at all.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.decoder import Names, some_with_experts
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.gguf_latent import gguf_attention
from pagellm.engine.models.hub import EXPERT_NAMES, MIXTURE_HARMLESS, MLP, HubModel
from pagellm.engine.models.hub_latent import hub_attention
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import SIGMOID, SOFTMAX

_V2_DEFAULTS = {
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
    "n_group": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "topk_group": None,
    "topk_method": "greedy",
    "moe_intermediate_size": 1407,
}
_V3_DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rope_interleave": True,
}
_NAMES: Names = {
    **EXPERT_NAMES,
    "selection_bias": "mlp.gate.e_score_correction_bias",
    "shared_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared_down": "mlp.shared_experts.down_proj",
}
# How routers are trained, and how experts lie on several machines.
_HARMLESS = rf"{MIXTURE_HARMLESS} | seq_aux | ep_size | num_mtp_layers | num_nextn_predict_layers"
# What is added to the sum of a token's scores.
_SCORE_FLOOR = 1e-20
_GREEDY, _GROUPS = "greedy", "group_limited_greedy"
# Of GGUF files: what experts are scored by, and of which vocabulary and numbers of layers sigmoids are where
# a file does not say.
_GATING = {1: SOFTMAX, 2: SIGMOID}
_SIGMOID_LAYERS, _SIGMOID_VOCABULARY = (47, 48), 154880
_PREDICTION = "the layers that predict tokens further on are left alone"


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type deepseek_v2."""
    model = HubModel(checkpoint, _V2_DEFAULTS)
    fields = model.fields
    attention = hub_attention(model)
    fields.expect("scoring_func", "softmax")
    fields.expect("norm_topk_prob", False)  # which the class passes over
    method = fields.choice("topk_method", {name: name for name in (_GREEDY, _GROUPS)})
    groups = {}
    if method == _GROUPS:
        groups = {
            "expert_groups": fields.integer("n_group"),
            "groups_per_token": fields.integer("topk_group"),
        }
    for name in ("n_group", "topk_group"):
        fields.get(name)  # known where nothing is chosen by groups, too
    features = _mixture(model, _behind(model), router=SOFTMAX, **groups)
    return model.spec(
        {**attention.features, **features},
        {**model.expert_names(_NAMES), **attention.names},
        biases=attention.biases + model.biases(mlp_bias=MLP),
        harmless=_HARMLESS,
        paired=True,
        rope_tables=(attention.rope,),
    )


def v3_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type deepseek_v3."""
    model = HubModel(checkpoint, _V3_DEFAULTS)
    return sigmoid_spec(model, _behind(model))


def _behind(model: HubModel) -> list[bool]:
    """Whether each layer has experts: those behind the first ones."""
    first = model.fields.whole_number("first_k_dense_replace")
    return [index >= first for index in range(model.num_layers)]


def sigmoid_spec(model: HubModel, sparse: Sequence[bool], **rope: Any) -> ModelSpec:
    """A model of DeepSeek-V3's kind, of which these layers have experts. rope: of `hub_rope.table`."""
    fields = model.fields
    fields.expect("topk_method", "noaux_tc")
    fields.expect("scoring_func", "sigmoid")
    interleaved = fields.get("rope_interleave")
    if interleaved is not None and not isinstance(interleaved, bool):
        raise fields.error("rope_interleave", interleaved, "true, false or null")
    attention = hub_attention(model, **rope)
    features = _mixture(
        model,
        sparse,
        router=SIGMOID,
        selection_bias=True,
        renormalize=fields.boolean("norm_topk_prob"),
        score_floor=_SCORE_FLOOR,
        expert_groups=fields.integer("n_group"),
        groups_per_token=fields.integer("topk_group"),
        group_best=2,
    )
    spec = model.spec(
        {**attention.features, **features},
        {**model.expert_names(_NAMES), **attention.names},
        biases=attention.biases,
        harmless=_HARMLESS,
        paired=bool(interleaved),
        rope_tables=(attention.rope,),
    )
    count = fields.whole_number("num_nextn_predict_layers", fields.get("num_mtp_layers", 1))
    return _without_prediction(spec, model.checkpoint, count)


def _mixture(model: HubModel, sparse: Sequence[bool], **features: Any) -> dict[str, Any]:
    """The features of layers of which some have experts, by the keys that all of these classes have."""
    fields = model.fields
    fields.expect("moe_layer_freq", 1)
    size, dense = fields.integer("moe_intermediate_size"), fields.integer("intermediate_size")
    features |= {
        "num_experts": fields.integer("n_routed_experts"),
        "experts_per_token": fields.integer("num_experts_per_tok"),
        "expert_size": size,
        "router_scale": fields.number("routed_scaling_factor", 1.0),
    }
    shared = fields.whole_number("n_shared_experts") * size
    return some_with_experts(sparse, features, shared, dense)


def _without_prediction(spec: ModelSpec, checkpoint: Checkpoint, count: int) -> ModelSpec:
    """The model without the `count` layers behind its last one, which are for speculation."""
    first = spec.arch.num_layers
    behind = range(first, first + count)
    names = tuple(
        name
        for name in checkpoint.tensors
        if (found := re.search(r"\b(?:layers|blk)\.(\d{1,9})\.", name)) and int(found[1]) in behind
    )
    return replace(spec, repeated=spec.repeated + names, left_alone=_PREDICTION) if names else spec


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture deepseek2."""
    model = GgufModel(checkpoint)
    fields = model.fields
    predicted = fields.whole_number("nextn_predict_layers", 0)
    if predicted >= model.num_layers:
        raise fields.error("nextn_predict_layers", predicted, f"fewer than block_count, {model.num_layers}")
    model.num_layers -= predicted
    attention = gguf_attention(model, scales_scores=True)
    first = fields.whole_number("leading_dense_block_count", 0)
    sparse = [index >= first for index in range(model.num_layers)]
    features, names = _gguf_mixture(model, sparse) if any(sparse) else (_gguf_dense(model), {})
    spec = model.spec(
        {**attention.features, **features},
        {**names, **attention.names},
        paired=True,
        rope_tables=(attention.rope,),
    )
    return _without_prediction(spec, checkpoint, predicted)


def _gguf_dense(model: GgufModel) -> dict[str, Any]:
    """Of a model without experts, of which files say what they would be."""
    fields = model.fields
    for name in ("feed_forward_length", "shared_count", "weights_scale", "weights_norm", "gating_func"):
        fields.get(f"expert_{name}")
    return {"intermediate_size": fields.integer("feed_forward_length")}


def _gguf_mixture(model: GgufModel, sparse: Sequence[bool]) -> tuple[dict[str, Any], Names]:
    """The features of the layers, and names of tensors that are called otherwise."""
    fields, tensors = model.fields, model.checkpoint.tensors
    gating = fields.get("expert_gating_func", 0)
    if type(gating) is int and gating == 0:
        vocabulary = model.vocabulary("token_embd.weight")
        sigmoid = len(sparse) in _SIGMOID_LAYERS and vocabulary == _SIGMOID_VOCABULARY
        gating = 2 if sigmoid else 1
    if type(gating) is not int or gating not in _GATING:
        raise fields.error("expert_gating_func", gating, "1 or 2")
    groups = fields.whole_number("expert_group_count", 0)
    used = fields.whole_number("expert_group_used_count", 0)
    features = model.experts(
        router=_GATING[gating],
        renormalize=fields.boolean("expert_weights_norm", False),
        router_scale=fields.number_or_zero("expert_weights_scale") or 1.0,
        **({"expert_groups": groups, "groups_per_token": used, "group_best": 2} if groups > 1 else {}),
    )
    shared = fields.whole_number("expert_shared_count") * features["expert_size"]
    dense = fields.integer("feed_forward_length")
    features = some_with_experts(sparse, features, shared, dense)
    biases = [f"blk.{index}.exp_probs_b.bias" for index, one in enumerate(sparse) if one]
    has_bias = any(name in tensors for name in biases)  # then all layers with experts must have one
    features["selection_bias"] = [one and has_bias for one in sparse]
    stacked = f"blk.{sparse.index(True)}.ffn_gate_up_exps.weight"
    return features, {"expert_up": "ffn_gate_up_exps.weight"} if stacked in tensors else {}
