"""ERNIE 4.5: Llama whose rotary pairs are neighbours, and with experts in its larger ones (Baidu 2025)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.decoder import some_with_experts
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, EXPERT_NAMES, MIXTURE_HARMLESS, MLP, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import SOFTMAX

_DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
    "use_bias": False,
}
_MIXTURE_DEFAULTS = {
    **_DEFAULTS,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": None,
}
_NAMES = {
    **EXPERT_NAMES,
    "selection_bias": "mlp.moe_statics.e_score_correction_bias",
    "expert_up_b": ("mlp.experts.{}.gate_proj.bias", "mlp.experts.{}.up_proj.bias"),
    "expert_down_b": "mlp.experts.{}.down_proj.bias",
    "shared_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared_down": "mlp.shared_experts.down_proj",
}
# How routers are trained, and how many layers predict tokens further on, which nobody asks here.
_HARMLESS = (
    rf"{MIXTURE_HARMLESS} | moe_capacity | moe_aux_loss_lambda | moe_orthogonal_loss_lambda"
    r" | moe_use_aux_free | moe_dropout_prob | num_nextn_predict_layers | multi_token_pred_lambda"
)


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type ernie4_5."""
    model = HubModel(checkpoint, _DEFAULTS)
    return model.spec(biases=model.biases(use_bias=ATTENTION + MLP), paired=True)


def mixture_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type ernie4_5_moe."""
    model = HubModel(checkpoint, _MIXTURE_DEFAULTS)
    fields = model.fields
    size = fields.integer("moe_intermediate_size", 1536)
    shared = fields.whole_number("moe_num_shared_experts", 2)
    first, last = fields.whole_number("moe_layer_start_index", 1), fields.get("moe_layer_end_index", -1)
    if type(last) is not int or last < -1:
        raise fields.error("moe_layer_end_index", last, "a layer's number, or -1 for the last")
    last = model.num_layers - 1 if last == -1 else last
    step, dense = fields.integer("moe_layer_interval", 1), fields.integer("intermediate_size")
    sparse = [first <= i <= last and (i + 1) % step == 0 for i in range(model.num_layers)]
    features = {
        "num_experts": fields.integer("moe_num_experts", 64),
        "experts_per_token": fields.integer("moe_k", 6),
        "expert_size": size,
        "router": SOFTMAX,
        "renormalize": True,
        "score_floor": fields.number("moe_norm_min", 1e-12),
        "selection_bias": True,
    }
    features = some_with_experts(sparse, features, shared * size, dense)
    biases = model.biases(use_bias=(*ATTENTION, *MLP, "lm_head"))
    return model.spec(features, model.expert_names(_NAMES), biases=biases, paired=True, harmless=_HARMLESS)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture ernie4_5."""
    return GgufModel(checkpoint).spec(paired=True)


def mixture_from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture ernie4_5-moe."""
    model = GgufModel(checkpoint)
    fields = model.fields
    first = fields.whole_number("leading_dense_block_count", 0)
    step, dense = fields.integer("interleave_moe_layer_step"), fields.integer("feed_forward_length")
    shared = fields.whole_number("expert_shared_feed_forward_length", 0)
    fields.get("expert_shared_count")  # llama.cpp goes by their width alone
    sparse = [index >= first and (index + 1) % step == 0 for index in range(model.num_layers)]
    features = model.experts(
        renormalize=True,
        selection_bias=any(name.endswith("exp_probs_b.bias") for name in checkpoint.tensors),
    )
    return model.spec(some_with_experts(sparse, features, shared, dense), paired=True)
