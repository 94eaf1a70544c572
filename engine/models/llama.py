"""The Llama family: RMSNorm, rotary embeddings, SwiGLU, grouped-query attention (Touvron et al. 2023).

Llama, Mistral and Qwen2 differ here only in which projections have a bias.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import rope
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.spec import ModelSpec, Parts, Source


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type llama, mistral or qwen2."""
    fields = Fields(checkpoint.path, checkpoint.config)
    model_type = fields.values["model_type"]
    fields.choice("hidden_act", {"silu": "silu_gated", "swish": "silu_gated"}, "silu")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden // heads or None)
    scaling = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if scaling is not None and scaling.has("rope_theta"):
        theta = scaling.number("rope_theta")
    rotary_factor = fields.number("partial_rotary_factor", 1.0)
    if rotary_factor > 1:
        raise fields.error("partial_rotary_factor", rotary_factor, "a number up to 1")
    rotary_dim = int(head_dim * rotary_factor)
    max_positions = fields.integer("max_position_embeddings", 2048, maximum=1 << 30)
    windowed = model_type == "mistral" or fields.boolean("use_sliding_window", False)
    if windowed and fields.has("sliding_window"):
        # Within the window, sliding attention is full attention.
        max_positions = min(max_positions, fields.integer("sliding_window", maximum=1 << 30))
    attention_bias = fields.boolean("attention_bias", False)
    return _spec(
        checkpoint,
        architecture=str(model_type),
        num_layers=fields.integer("num_hidden_layers", maximum=len(checkpoint.tensors)),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size", maximum=1 << 30),
        max_positions=max_positions,
        epsilon=fields.number("rms_norm_eps", 1e-6),
        frequencies=rope.scaled(rope.frequencies(rotary_dim, theta), scaling),
        tied=fields.boolean("tie_word_embeddings", False),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        names=_HUGGINGFACE,
        paired=False,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture llama or qwen2."""
    architecture = checkpoint.config["general.architecture"]
    fields = Fields(checkpoint.path, checkpoint.config, f"{architecture}.")
    if fields.values.get(f"{architecture}.expert_count"):
        raise fields.error("expert_count", fields.values[f"{architecture}.expert_count"], "no experts")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads or None)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.value_length", fields.integer("attention.value_length"), str(head_dim))
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    if rotary_dim > head_dim or (architecture == "llama" and rotary_dim != head_dim):
        raise fields.error("rope.dimension_count", rotary_dim, f"{head_dim}, the size of a head")
    frequencies = rope.frequencies(rotary_dim, fields.number("rope.freq_base", 10000.0))
    if fields.choice("rope.scaling.type", {"none": "none", "linear": "linear"}, "none") == "linear":
        factor = fields.number("rope.scaling.factor")
        frequencies = tuple(frequency / factor for frequency in frequencies)
    if "rope_freqs.weight" in checkpoint.tensors:  # how llama.cpp stores the llama3 scaling
        tensor = checkpoint.tensors["rope_freqs.weight"]
        if tensor.shape != (len(frequencies),):
            raise fields.error("rope_freqs.weight", tensor.shape, f"shape ({len(frequencies)},)")
        divisors = tensor.rows(0, len(frequencies))
        frequencies = tuple(f / float(d) for f, d in zip(frequencies, divisors, strict=True))
    embedding = checkpoint.tensors.get(_GGUF["embedding"])
    return _spec(
        checkpoint,
        architecture=str(architecture),
        num_layers=fields.integer("block_count", maximum=len(checkpoint.tensors)),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate=fields.integer("feed_forward_length"),
        vocab=embedding.shape[0] if embedding is not None else fields.integer("vocab_size", maximum=1 << 30),
        max_positions=fields.integer("context_length", maximum=1 << 30),
        epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        frequencies=frequencies,
        tied=_GGUF["lm_head"] not in checkpoint.tensors,
        qkv_bias="blk.0.attn_q.bias" in checkpoint.tensors,
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
        mlp_bias="blk.0.ffn_down.bias" in checkpoint.tensors,
        names=_GGUF,
        # llama.cpp's converter stores Llama's rotary dimensions as neighbouring pairs, Qwen2's it leaves.
        paired=architecture == "llama",
    )


_HUGGINGFACE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layer": "model.layers.{}.",
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


def _spec(
    checkpoint: Checkpoint,
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
    frequencies: tuple[float, ...],
    tied: bool,
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
    if not tied:
        rest["lm_head"] = (Source(names["lm_head"], (vocab, hidden)),)
    return ModelSpec(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_positions=max_positions,
        layer_norm=False,
        norm_epsilon=epsilon,
        activation="silu_gated",
        attention_scale=head_dim**-0.5,
        rope_frequencies=frequencies,
        layers=tuple(layer(index) for index in range(num_layers)),
        rest=rest,
    )
