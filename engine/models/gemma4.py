"""Gemma 4: fewer and wider heads in layers that see everything, and experts beside a feed-forward (2026).

The text model, also where a checkpoint has towers for images and sound beside it, which are left alone. Not
of E2B and E4B: their last layers use the keys and values of earlier ones, and each layer has an embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import gemma2, hub_rope, rope
from pagellm.engine.models.decoder import Names
from pagellm.engine.models.fields import NOTHING, Fields
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, GELU_OR_RELU, HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import GELU_TANH
from pagellm.kernels.architecture import PER_HEAD, SOFTMAX

DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
}
_PERIOD = 6  # of the layers that see everything
_NAMES: Names = {
    **gemma2.NAMES,
    "layer_scale": "layer_scalar",
    "shared_post_norm": "post_feedforward_layernorm_1",
    "router": "router.proj",
    "router_norm": "router.scale",
    "expert_scale": "router.per_expert_scale",
    "expert_norm": "pre_feedforward_layernorm_2",
    "expert_up": "experts.gate_up_proj",
    "expert_down": "experts.down_proj",
    "expert_post_norm": "post_feedforward_layernorm_2",
}
# Those of files in which each expert has its own, as quantizers write them.
_APART: Names = {
    "expert_up": ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"),
    "expert_down": "experts.{}.down_proj.weight",
}
GGUF_NAMES: Names = {
    "layer_scale": "layer_output_scale.weight",
    "shared_up": ("ffn_gate", "ffn_up"),
    "shared_down": "ffn_down",
    "shared_post_norm": "post_ffw_norm_1",
    "router_norm": "ffn_gate_inp.scale",
    "expert_scale": "ffn_down_exps.scale",
    "expert_norm": "pre_ffw_norm_2",
    "expert_post_norm": "post_ffw_norm_2",
}
STACKED = "ffn_gate_up_exps.weight"
# Of every layer, and of one with experts.
_FEATURES = {"attention_scale": 1.0, "qk_norm": PER_HEAD, "value_norm": True, "post_norm": True}
_MIXTURE = {"router": SOFTMAX, "renormalize": True, "expert_norms": True}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gemma4_text, or gemma4 with a text_config of it."""
    model = HubModel(checkpoint, DEFAULTS, gemma2.KEYS)
    fields = model.fields
    fields.expect("use_bidirectional_attention", "vision")  # among the tokens of an image
    fields.expect("num_kv_shared_layers", 0)
    fields.expect("hidden_size_per_layer_input", 0)
    for name in ("vocab_size_per_layer_input", "use_double_wide_mlp"):
        fields.get(name)  # of what is refused
    types = [FULL if (index + 1) % _PERIOD == 0 else SLIDING for index in range(model.num_layers)]
    types = [*(model.layer_types(FULL, SLIDING) or types)[:-1], FULL]  # the last one whatever a list says
    window = fields.integer("sliding_window", maximum=1 << 30)
    same = fields.boolean("attention_k_eq_v", False)
    heads = _heads(model, types, same)
    head_dims = dict(zip(types, heads["head_dim"], strict=True))
    features = {
        **_FEATURES,
        **heads,
        "window": [window if kind == SLIDING else 0 for kind in types],
        "rope_table": [list(head_dims).index(kind) for kind in types],
        "layer_scale": True,
        **_experts(model),
    }
    apart = any(".experts.0." in name for name in checkpoint.tensors)
    return model.spec(
        features,
        {**_NAMES, **_APART} if apart else _NAMES,
        GELU_OR_RELU,
        biases=model.biases(attention_bias=ATTENTION),
        embedding_scale=model.hidden_size**0.5,
        logits_softcap=fields.number_or_zero("final_logit_softcapping"),
        keys_as_values=[index for index, kind in enumerate(types) if same and kind == FULL],
        rope_tables=hub_rope.tables_by_head_dim(fields, head_dims),
    )


def _heads(model: HubModel, types: Sequence[str], same: bool) -> dict[str, list[int]]:
    """The size of heads and the number of KV heads of each layer.

    Newer files have what differs from the model's numbers in `per_layer_config`, under the layers' indices;
    the others have those of the layers that see everything. same: whether keys are values there, without
    which these layers have as many as others.
    """
    fields, name = model.fields, "per_layer_config"
    kv_heads, of_full = fields.integer("num_key_value_heads"), "num_global_key_value_heads"
    overrides: Any = fields.get(name)
    others: Any = {"head_dim": fields.integer("global_head_dim", 512)}
    if same and fields.has(of_full):
        others["num_key_value_heads"] = fields.integer(of_full)
    fields.get(of_full)
    if overrides is None:
        overrides = {str(index): others for index, kind in enumerate(types) if kind == FULL}
    if not isinstance(overrides, Mapping):
        raise fields.error(name, overrides, "an object")
    heads, of_kind = [], dict[str, tuple[int, int]]()
    for index, kind in enumerate(types):
        values = overrides.get(str(index), {})
        if not isinstance(values, Mapping):
            raise fields.error(f"{name}.{index}", values, "an object")
        own = Fields(fields.path, values, f"{fields.prefix}{name}.{index}.")
        heads.append((own.integer("head_dim", model.head_dim), own.integer("num_key_value_heads", kv_heads)))
        own.refuse_others(NOTHING, "a layer")
        if of_kind.setdefault(kind, heads[-1]) != heads[-1]:
            raise fields.error(f"{name}.{index}", values, f"the same heads in all layers of {kind}")
    for key in overrides:
        if key not in map(str, range(len(types))):
            raise fields.error(name, key, f"the index of one of {len(types)} layers")
    head_dims, num_kv_heads = map(list, zip(*heads, strict=True))
    return {"head_dim": head_dims, "num_kv_heads": num_kv_heads}


def _experts(model: HubModel) -> dict[str, Any]:
    """The features of experts beside the feed-forward of every layer, if there are any."""
    fields, names = model.fields, ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not fields.boolean("enable_moe_block", False):
        for name in names:
            fields.get(name)  # which the class passes over
        return {}
    count, per_token, size = (fields.integer(name) for name in names)
    return {
        **_MIXTURE,
        "num_experts": count,
        "experts_per_token": per_token,
        "expert_size": size,
        "expert_scale": True,
        "logit_scale": model.hidden_size**-0.5,
    }


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gemma4."""
    model = GgufModel(checkpoint)
    fields, tensors, name = model.fields, checkpoint.tensors, "attention.sliding_window_pattern"
    fields.expect("attention.shared_kv_layers", 0)
    fields.expect("embedding_length_per_layer_input", 0)
    slides, window = fields.get(name), fields.integer("attention.sliding_window", maximum=1 << 30)
    whole = isinstance(slides, np.ndarray) and slides.dtype.kind in "bui"
    if not whole or slides.shape != (model.num_layers,) or not np.isin(slides, (0, 1)).all():
        raise fields.error(name, slides, f"true or false for each of {model.num_layers} layers")
    head_dim = fields.integer("attention.key_length_swa")
    fields.expect("attention.value_length_swa", head_dim)
    rotary_dim = fields.integer("rope.dimension_count_swa", head_dim)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise fields.error("rope.dimension_count_swa", rotary_dim, f"an even number up to {head_dim}")
    local = rope.plain(rotary_dim, fields.number("rope.freq_base_swa", rope.DEFAULT_THETA))

    def has(tensor: str, layers: Sequence[int] = range(model.num_layers)) -> bool:
        """Whether one of the layers has it; then all must."""
        return any(f"blk.{index}.{tensor}" in tensors for index in layers)

    features = {
        **_FEATURES,
        "activation": GELU_TANH,
        "window": [window if one else 0 for one in slides],
        "head_dim": [head_dim if one else model.head_dim for one in slides],
        "rope_table": [int(one) for one in slides],
        "layer_scale": has(str(GGUF_NAMES["layer_scale"])),
    }
    names = dict(GGUF_NAMES)
    if model.has_experts():
        features |= model.experts(
            **_MIXTURE,
            intermediate_size=fields.integer("feed_forward_length"),
            expert_scale=has(str(names["expert_scale"])),
            logit_scale=model.hidden_size**-0.5,
        )
        if has(STACKED):
            names["expert_up"] = STACKED
    for name, neutral in (("rope.scaling.type", "none"), ("rope.scaling.attn_factor", 1.0)):
        fields.expect(name, neutral)
    if not slides.all() and "rope_freqs.weight" not in tensors:
        raise CheckpointError(f"{checkpoint.path}: tensor rope_freqs.weight is missing: it says what turns")
    full = [index for index, one in enumerate(slides) if not one]
    have_values = has("attn_v.weight", full) or has("attn_qkv.weight")
    return model.spec(
        features,
        names,
        embedding_scale=model.hidden_size**0.5,
        logits_softcap=fields.number_or_zero("final_logit_softcapping", 30.0),
        keys_as_values=() if have_values else full,
        rope_tables=(model.rope_table(), local),
    )
