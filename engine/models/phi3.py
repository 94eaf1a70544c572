"""Phi-3, Phi-3.5, Phi-4 and their minis: Llama with fused projections (Abdin et al. 2024).

Long contexts are LongRoPE's; Phi-4-mini rotates a part of each head and ties the output to the embedding.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import hub_rope
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type phi3."""
    model = HubModel(checkpoint, _DEFAULTS)
    for name in ("full_attn_mod", "interpolate_factor"):  # of the class that Phi-4-mini brings along
        model.fields.expect(name, 1)
    model.fields.expect("lm_head_bias", False)
    rope = model.rope_table(partial=True, kinds=hub_rope.PHI3_KINDS)
    names = {"qkv": "self_attn.qkv_proj", "up": "mlp.gate_up_proj"}
    return model.spec({"window": model.windows()}, names, rope_tables=(rope,))


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture phi3; llama.cpp does not obey its window."""
    model = GgufModel(checkpoint)
    rope = model.rope_table(partial=True)
    return model.spec({"window": model.window()}, rope_tables=(rope,))
