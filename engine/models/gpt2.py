"""The GPT-2 family: LayerNorm, learned positions, one fused QKV projection (Radford et al. 2019).

GPT-3-shaped configurations are the same architecture at other sizes.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.spec import ModelSpec, Parts, Source

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
_HUGGINGFACE = {
    "embedding": "wte.weight",
    "position_embedding": "wpe.weight",
    "final_norm": "ln_f",
    "layer": "h.{}.",
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_GGUF = {
    "embedding": "token_embd.weight",
    "position_embedding": "position_embd.weight",
    "final_norm": "output_norm",
    "layer": "blk.{}.",
    "attention_norm": "attn_norm",
    "qkv": "attn_qkv",
    "output": "attn_output",
    "mlp_norm": "ffn_norm",
    "up": "ffn_up",
    "down": "ffn_down",
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gpt2."""
    fields = Fields(checkpoint.path, checkpoint.config)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if fields.boolean(name, False):
            raise fields.error(name, True, "false: this variant is not supported")
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    if hidden % heads:
        raise fields.error("n_embd", hidden, f"a multiple of n_head, {heads}")
    # Published checkpoints hold the bare decoder; saved from a language model it has a prefix.
    prefix = "" if "wte.weight" in checkpoint.tensors else "transformer."
    return _spec(
        checkpoint,
        prefix=prefix,
        names=_HUGGINGFACE,
        transposed=True,
        num_layers=fields.integer("n_layer", maximum=len(checkpoint.tensors)),
        hidden=hidden,
        heads=heads,
        intermediate=fields.integer("n_inner", 4 * hidden),
        vocab=fields.integer("vocab_size", maximum=1 << 30),
        max_positions=fields.integer("n_positions", maximum=1 << 30),
        epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        scaled=fields.boolean("scale_attn_weights", True),
        lm_head="" if fields.boolean("tie_word_embeddings", True) else "lm_head.weight",
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gpt2."""
    fields = Fields(checkpoint.path, checkpoint.config, "gpt2.")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    if hidden % heads:
        raise fields.error("embedding_length", hidden, f"a multiple of attention.head_count, {heads}")
    embedding = checkpoint.tensors.get(_GGUF["embedding"])
    return _spec(
        checkpoint,
        prefix="",
        names=_GGUF,
        transposed=False,
        num_layers=fields.integer("block_count", maximum=len(checkpoint.tensors)),
        hidden=hidden,
        heads=heads,
        intermediate=fields.integer("feed_forward_length"),
        vocab=embedding.shape[0] if embedding is not None else fields.integer("vocab_size", maximum=1 << 30),
        max_positions=fields.integer("context_length", maximum=1 << 30),
        epsilon=fields.number("attention.layer_norm_epsilon"),
        activation="gelu_tanh",
        scaled=True,
        lm_head="output.weight" if "output.weight" in checkpoint.tensors else "",
    )


def _spec(
    checkpoint: Checkpoint,
    *,
    prefix: str,
    names: dict[str, str],
    transposed: bool,
    num_layers: int,
    hidden: int,
    heads: int,
    intermediate: int,
    vocab: int,
    max_positions: int,
    epsilon: float,
    activation: str,
    scaled: bool,
    lm_head: str,
) -> ModelSpec:
    def linear(name: str, outputs: int, inputs: int) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        return (
            (Source(f"{name}.weight", shape, transposed=transposed),),
            (Source(f"{name}.bias", (outputs,)),),
        )

    def norm(name: str) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
        return (Source(f"{name}.weight", (hidden,)),), (Source(f"{name}.bias", (hidden,)),)

    def layer(index: int) -> Parts:
        start = prefix + names["layer"].format(index)
        both = {
            "attention_norm": norm(start + names["attention_norm"]),
            "qkv": linear(start + names["qkv"], 3 * hidden, hidden),
            "output": linear(start + names["output"], hidden, hidden),
            "mlp_norm": norm(start + names["mlp_norm"]),
            "up": linear(start + names["up"], intermediate, hidden),
            "down": linear(start + names["down"], hidden, intermediate),
        }
        weights = {part: sources[0] for part, sources in both.items()}
        return weights | {f"{part}_b": sources[1] for part, sources in both.items()}

    final_norm, final_norm_b = norm(prefix + names["final_norm"])
    rest = {
        "embedding": (Source(prefix + names["embedding"], (vocab, hidden)),),
        "position_embedding": (Source(prefix + names["position_embedding"], (max_positions, hidden)),),
        "final_norm": final_norm,
        "final_norm_b": final_norm_b,
    }
    if lm_head:
        rest["lm_head"] = (Source(lm_head, (vocab, hidden)),)
    return ModelSpec(
        architecture="gpt2",
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_positions=max_positions,
        layer_norm=True,
        norm_epsilon=epsilon,
        activation=activation,
        attention_scale=(hidden // heads) ** -0.5 if scaled else 1.0,
        rope_frequencies=None,
        layers=tuple(layer(index) for index in range(num_layers)),
        rest=rest,
    )
