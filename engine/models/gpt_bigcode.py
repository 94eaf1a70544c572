"""GPT-BigCode, StarCoder and SantaCoder: GPT-2 with one KV head (Allal et al. 2023)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import gpt2
from pagellm.engine.models.hub import GELU_OR_RELU, HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {**gpt2.DEFAULTS, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": None}
_KEYS = {**gpt2.KEYS, "num_key_value_heads": "num_key_value_heads"}
# How the class computes the same, and settings of another server.
_HARMLESS = """attention_softmax_in_fp32 | scale_attention_softmax_in_fp32 | inference_runner | max_batch_size
  | pad_key_length | pre_allocate_kv_cache | validate_runner_input"""


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gpt_bigcode."""
    model = HubModel(checkpoint, _DEFAULTS, _KEYS)
    single = model.fields.boolean("multi_query", True)
    kv_heads = 1 if single else model.num_heads
    model.fields.expect("num_key_value_heads", kv_heads)
    features = {**gpt2.features(model), "num_kv_heads": kv_heads}
    # With a KV head for each, Q, K and V are stored by head.
    return model.spec(
        features,
        gpt2.NAMES,
        GELU_OR_RELU,
        base="transformer.",
        harmless=_HARMLESS,
        rope_tables=(),
        num_positions=model.max_positions,
        layer_norm=True,
        biases=gpt2.BIASES,
        grouped_qkv=not single,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture starcoder, whose keys say what differs from gpt2."""
    return gpt2.from_gguf(checkpoint)
