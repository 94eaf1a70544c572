"""Gemma 3: Gemma 2 with norms of queries and keys instead of softcaps, and RoPE by kind of layer (2025).

The text model, also where a checkpoint has a vision tower beside it, which is left alone.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import gemma2, rope
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import PER_HEAD

_DEFAULTS = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_THETAS = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gemma3_text, or gemma3 with a text_config of it."""
    model = HubModel(checkpoint, _DEFAULTS, gemma2.KEYS)
    model.fields.expect("attn_logit_softcapping", 0.0)  # which the class names and passes over
    period = model.fields.integer("sliding_window_pattern")
    types = [SLIDING if (index + 1) % period else FULL for index in range(model.num_layers)]
    types = list(model.layer_types(FULL, SLIDING) or types)
    tables = model.rope_tables_by_type(_THETAS)
    features = {
        "qk_norm": PER_HEAD,
        "window": model.windows(types),
        "rope_table": [list(_THETAS).index(kind) for kind in types],
    }
    return gemma2.hub_spec(model, features, rope_tables=tables)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gemma3."""
    model = GgufModel(checkpoint)
    windows = model.windows(period=6)
    local = rope.plain(model.head_dim, model.fields.number("rope.freq_base_swa", 1e4))
    features = {
        "qk_norm": PER_HEAD,
        "window": windows,
        "rope_table": [int(window > 0) for window in windows],
    }
    return gemma2.gguf_spec(model, 62, 0.0, features, rope_tables=(model.rope_table(), local))
