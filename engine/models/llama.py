"""The Llama family: RMSNorm, rotary embeddings, SwiGLU, grouped-query attention (Touvron et al. 2023).

Llama, Mistral and Qwen2 differ here in which projections have a bias and in what an absent key means.
"""

import math
from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import gguf_metadata, hub_config, rope
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.names import count_layers, embedding_and_head, hub_prefixes
from pagellm.engine.models.rope import RopeTable
from pagellm.engine.models.spec import ModelSpec, Parts, Source
from pagellm.kernels import activation
from pagellm.kernels.architecture import Architecture, layer_rows

_HUGGINGFACE = {
    "embedding": "embed_tokens.weight",
    "final_norm": "norm.weight",
    "layer": "layers.{}.",
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GGUF = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
    "layer": "blk.{}.",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "output": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
# What transformers' class of a model_type takes for a key that config.json lacks, where the classes differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}
_DEFAULT_WINDOW = 4096  # of Mistral and, where use_sliding_window is true, of Qwen2
_DEFAULT_FIRST_WINDOW_LAYER = 28  # of Qwen2


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type llama, mistral or qwen2."""
    fields = hub_config.read_config(checkpoint)
    model_type = str(checkpoint.config["model_type"])
    defaults = _DEFAULTS[model_type]

    def integer(name: str, maximum: int = 1 << 20) -> int:
        return fields.integer(name, defaults[name], maximum)

    fields.choice("hidden_act", {"silu": "silu", "swish": "silu"}, "silu")
    hidden, heads = fields.integer("hidden_size", 4096), fields.integer("num_attention_heads", 32)
    head_dim = fields.integer_or_none("head_dim") or hidden // heads
    num_layers = count_layers(fields, "num_hidden_layers", checkpoint, 32)
    max_positions = integer("max_position_embeddings", 1 << 30)
    attention_bias, mlp_bias = _biases(fields, model_type)
    decoder, wrapper = hub_prefixes(checkpoint, "model.", "layers.0.input_layernorm.weight")
    names = _HUGGINGFACE | {
        part: decoder + _HUGGINGFACE[part] for part in ("embedding", "final_norm", "layer")
    }
    tied = fields.boolean("tie_word_embeddings", False)
    embedding, lm_head, repeated = embedding_and_head(
        checkpoint, names["embedding"], f"{wrapper}lm_head.weight", tied
    )
    spec = _spec(
        architecture=model_type,
        num_layers=num_layers,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer_or_none("num_key_value_heads", defaults["num_key_value_heads"]) or heads,
        head_dim=head_dim,
        intermediate=integer("intermediate_size"),
        vocab=integer("vocab_size", 1 << 30),
        max_positions=max_positions,
        window=_window(fields, model_type, num_layers),
        epsilon=fields.number("rms_norm_eps", 1e-6),
        rope_table=rope.of_config(fields, head_dim, max_positions),
        attention_scale=head_dim**-0.5,
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
        names=names | {"embedding": embedding},
        lm_head=lm_head,
        repeated=repeated,
        paired=False,
    )
    fields.refuse_others(hub_config.HARMLESS, f"model_type {model_type}")
    return spec


def _biases(fields: Fields, model_type: str) -> tuple[bool, bool]:
    """Whether attention, and the feed-forward part, have biases that the configuration decides."""
    if model_type == "llama":
        return fields.boolean("attention_bias", False), fields.boolean("mlp_bias", False)
    # The other classes have the biases that they have: Qwen2 those of Q, K and V, Mistral none.
    fields.expect("attention_bias", False, *[True] * (model_type == "qwen2"))
    fields.expect("mlp_bias", False)
    return False, False


def _window(fields: Fields, model_type: str, num_layers: int) -> int | None:
    """The tokens that a layer with a sliding window sees, or None where all layers see everything.

    Llama's class knows no window, Mistral's has one in all layers, Qwen2's in those that `layer_types` or
    else `max_window_layers` say.
    """
    keys = ("layer_types", "use_sliding_window", "max_window_layers", "sliding_window")
    types, _, _, window = (fields.get(key) for key in keys)
    if types is not None:
        kinds = ("full_attention", "sliding_attention")[: 1 if model_type == "llama" else 2]
        if not isinstance(types, list) or len(types) != num_layers or any(t not in kinds for t in types):
            raise fields.error(
                "layer_types", types, f"a list of {num_layers}, each one of {', '.join(kinds)}"
            )
    slides = types is not None and "sliding_attention" in types
    if model_type == "llama" or ("sliding_window" in fields.values and window is None):
        if slides:
            raise fields.error("layer_types", types, "full_attention alone where sliding_window is null")
        return None
    window = fields.integer("sliding_window", _DEFAULT_WINDOW, maximum=1 << 30)
    if model_type == "mistral":
        return window
    enabled = fields.boolean("use_sliding_window", False)
    if slides and not enabled:
        raise fields.error("layer_types", types, "full_attention alone where use_sliding_window is false")
    if types is None:
        first = fields.get("max_window_layers", _DEFAULT_FIRST_WINDOW_LAYER)
        if type(first) is not int:
            raise fields.error("max_window_layers", first, "an integer")
        slides = enabled and first < num_layers
    return window if slides else None


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture llama or qwen2."""
    fields = gguf_metadata.read_metadata(checkpoint)
    architecture = str(checkpoint.config["general.architecture"])
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    for name, expected in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("embedding_length_out", hidden),
    ):
        if fields.integer(name, expected) != expected:
            raise fields.error(name, fields.get(name), str(expected))
    frequencies = rope.frequencies(head_dim, fields.number("rope.freq_base", rope.DEFAULT_THETA))
    factor = _linear_factor(fields)
    frequencies = tuple(frequency / factor for frequency in frequencies)
    if architecture == "llama" and "rope_freqs.weight" in checkpoint.tensors:
        divisors = _rope_divisors(checkpoint, len(frequencies))
        frequencies = tuple(f / d for f, d in zip(frequencies, divisors, strict=True))
    vocab = gguf_metadata.vocabulary(checkpoint, _GGUF["embedding"])
    lm_head = _GGUF["lm_head"] if _GGUF["lm_head"] in checkpoint.tensors else None
    # llama.cpp multiplies queries and keys, all of whose dimensions are rotated, by this.
    rotated_scale = fields.number("rope.scaling.attn_factor", 1.0)
    spec = _spec(
        architecture=architecture,
        num_layers=count_layers(fields, "block_count", checkpoint),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate=fields.integer("feed_forward_length"),
        vocab=vocab,
        max_positions=fields.integer("context_length", maximum=1 << 30),
        window=fields.integer_or_none("attention.sliding_window", maximum=1 << 30),
        epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        rope_table=RopeTable(frequencies),
        attention_scale=head_dim**-0.5 * rotated_scale**2,
        qkv_bias="blk.0.attn_q.bias" in checkpoint.tensors,
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
        mlp_bias="blk.0.ffn_down.bias" in checkpoint.tensors,
        names=_GGUF,
        lm_head=lm_head,
        # Tensors that are read here and not by the loader.
        repeated=("rope_freqs.weight",) if architecture == "llama" else (),
        # llama.cpp's converter stores Llama's rotary dimensions as neighbouring pairs, Qwen2's it leaves.
        paired=architecture == "llama",
    )
    fields.refuse_others(gguf_metadata.HARMLESS, f"architecture {architecture}")
    return spec


def _linear_factor(fields: Fields) -> float:
    """What positions are divided by, by llama.cpp's rules: linear where no type is named; 0 is no scaling."""
    kind = fields.choice("rope.scaling.type", {"none": "none", "linear": "linear"}, "linear")
    old, new = fields.get("rope.scale_linear", 0), fields.get("rope.scaling.factor")
    name, value = ("rope.scale_linear", old) if new is None else ("rope.scaling.factor", new)
    if kind == "none" or (isinstance(value, int | float) and value == 0):
        return 1.0
    return fields.number(name)


def _rope_divisors(checkpoint: Checkpoint, size: int) -> list[float]:
    """What llama.cpp's converter makes of the llama3 scaling: a divisor for each frequency."""
    tensor = checkpoint.tensors["rope_freqs.weight"]
    if tensor.shape != (size,):
        raise CheckpointError(
            f"{checkpoint.path}: tensor rope_freqs.weight has shape {tensor.shape}, expected ({size},)"
        )
    divisors: list[float] = tensor.rows(0, size).tolist()
    for index, divisor in enumerate(divisors):
        if not 0 < divisor < math.inf:
            raise CheckpointError(
                f"{checkpoint.path}: tensor rope_freqs.weight: found {divisor} at {index}, expected a number "
                "above zero"
            )
    return divisors


def _spec(
    *,
    architecture: str,
    num_layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    max_positions: int,
    epsilon: float,
    rope_table: RopeTable,
    window: int | None,
    attention_scale: float,
    lm_head: str | None,
    repeated: tuple[str, ...],
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    names: dict[str, str],
    paired: bool,
) -> ModelSpec:
    def layer(index: int) -> Parts:
        prefix = names["layer"].format(index)

        def linear(name: str, outputs: int, inputs: int, paired_heads: int = 0) -> Source:
            tensor = f"{prefix}{names[name]}.weight"
            return Source(tensor, (outputs, inputs), paired_heads=paired_heads if paired else 0)

        def bias(name: str, outputs: int, paired_heads: int = 0) -> Source:
            tensor = f"{prefix}{names[name]}.bias"
            return Source(tensor, (outputs,), paired_heads=paired_heads if paired else 0)

        q_size, kv_size = heads * head_dim, kv_heads * head_dim
        parts = {
            "attention_norm": (Source(f"{prefix}{names['attention_norm']}.weight", (hidden,)),),
            "qkv": (
                linear("q", q_size, hidden, heads),
                linear("k", kv_size, hidden, kv_heads),
                linear("v", kv_size, hidden),
            ),
            "output": (linear("output", hidden, q_size),),
            "mlp_norm": (Source(f"{prefix}{names['mlp_norm']}.weight", (hidden,)),),
            "up": (linear("gate", intermediate, hidden), linear("up", intermediate, hidden)),
            "down": (linear("down", hidden, intermediate),),
        }
        if qkv_bias:
            parts["qkv_b"] = (bias("q", q_size, heads), bias("k", kv_size, kv_heads), bias("v", kv_size))
        if output_bias:
            parts["output_b"] = (bias("output", hidden),)
        if mlp_bias:
            parts["up_b"] = (bias("gate", intermediate), bias("up", intermediate))
            parts["down_b"] = (bias("down", hidden),)
        return parts

    rest = {
        "embedding": (Source(names["embedding"], (vocab, hidden)),),
        "final_norm": (Source(names["final_norm"], (hidden,)),),
    }
    if lm_head is not None:
        rest["lm_head"] = (Source(lm_head, (vocab, hidden)),)
    return ModelSpec(
        architecture=architecture,
        arch=Architecture(
            hidden_size=hidden,
            vocab_size=vocab,
            num_positions=0,
            tied=lm_head is None,
            layer_norm=False,
            norm_epsilon=epsilon,
            layers=layer_rows(
                num_layers,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                attention_scale=attention_scale,
                rope_table=0,
                intermediate_size=intermediate,
                activation=activation.SILU,
                gated=True,
            ),
        ),
        max_positions=max_positions if window is None else min(max_positions, window),
        sliding_window=window,
        rope_tables=(rope_table,),
        layers=tuple(layer(index) for index in range(num_layers)),
        rest=rest,
        repeated=repeated,
    )
