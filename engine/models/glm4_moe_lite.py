"""GLM-4.7-Flash: DeepSeek-V3 in its own sizes, with a list of the layers that have experts (Z.ai 2026)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import deepseek
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type glm4_moe_lite."""
    model = HubModel(checkpoint, _DEFAULTS)
    fields, name = model.fields, "mlp_layer_types"
    kinds = fields.get(name)
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (model.num_layers - 1)
    if (
        not isinstance(kinds, list)
        or len(kinds) != model.num_layers
        or any(kind not in ("dense", "sparse") for kind in kinds)
    ):
        raise fields.error(name, kinds, f"a list of {model.num_layers}, each one of dense, sparse")
    # The class passes over this number; in its own files it says the same.
    dense = kinds.index("sparse") if "sparse" in kinds else model.num_layers
    fields.expect("first_k_dense_replace", dense)
    return deepseek.sigmoid_spec(model, [kind == "sparse" for kind in kinds], partial=True)
