"""The GPT-2 family: LayerNorm, learned positions, one fused QKV projection (Radford et al. 2019).

GPT-3-shaped configurations are the same architecture at other sizes.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import gguf_metadata, hub_config
from pagellm.engine.models.names import count_layers, embedding_and_head, hub_prefixes
from pagellm.engine.models.spec import ModelSpec, Parts, Source
from pagellm.kernels import activation as activations
from pagellm.kernels.architecture import Architecture, layer_rows

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


# Names of other classes that transformers takes for this one's, too.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gpt2."""
    fields = hub_config.read_config(checkpoint)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    for alias, name in _ALIASES.items():
        if fields.has(alias) and fields.get(alias) != fields.get(name):
            raise fields.error(alias, fields.get(alias), f"{name} alone, or the same as {name}")
    hidden, heads = fields.integer("n_embd", 768), fields.integer("n_head", 12)
    if hidden % heads:
        raise fields.error("n_embd", hidden, f"a multiple of n_head, {heads}")
    # Published checkpoints hold the bare decoder; saved from a language model it has a prefix.
    decoder, wrapper = hub_prefixes(checkpoint, "transformer.", "h.0.ln_1.weight")
    embedding, lm_head, repeated = embedding_and_head(
        checkpoint,
        decoder + _HUGGINGFACE["embedding"],
        f"{wrapper}lm_head.weight",
        fields.boolean("tie_word_embeddings", True),
    )
    spec = _spec(
        prefix=decoder,
        names=_HUGGINGFACE,
        transposed=True,
        num_layers=count_layers(fields, "n_layer", checkpoint, 12),
        hidden=hidden,
        heads=heads,
        intermediate=fields.integer_or_none("n_inner") or 4 * hidden,
        vocab=fields.integer("vocab_size", 50257, maximum=1 << 30),
        max_positions=fields.integer("n_positions", 1024, maximum=1 << 30),
        epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        scaled=fields.boolean("scale_attn_weights", True),
        embedding=embedding,
        lm_head=lm_head,
        repeated=repeated,
    )
    fields.refuse_others(hub_config.HARMLESS, "model_type gpt2")
    return spec


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gpt2."""
    fields = gguf_metadata.read_metadata(checkpoint)
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    if hidden % heads:
        raise fields.error("embedding_length", hidden, f"a multiple of attention.head_count, {heads}")
    for name, expected in (
        ("attention.head_count_kv", heads),
        ("attention.key_length", hidden // heads),
        ("attention.value_length", hidden // heads),
        ("embedding_length_out", hidden),
    ):
        if fields.integer(name, expected) != expected:
            raise fields.error(name, fields.get(name), str(expected))
    spec = _spec(
        prefix="",
        names=_GGUF,
        transposed=False,
        num_layers=count_layers(fields, "block_count", checkpoint),
        hidden=hidden,
        heads=heads,
        intermediate=fields.integer("feed_forward_length"),
        vocab=gguf_metadata.vocabulary(checkpoint, _GGUF["embedding"]),
        max_positions=fields.integer("context_length", maximum=1 << 30),
        epsilon=fields.number("attention.layer_norm_epsilon"),
        activation="gelu_tanh",
        scaled=True,
        embedding=_GGUF["embedding"],
        lm_head="output.weight" if "output.weight" in checkpoint.tensors else None,
        repeated=(),
    )
    fields.refuse_others(gguf_metadata.HARMLESS, "architecture gpt2")
    return spec


def _spec(
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
    embedding: str,
    lm_head: str | None,
    repeated: tuple[str, ...],
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
        "embedding": (Source(embedding, (vocab, hidden)),),
        "position_embedding": (Source(prefix + names["position_embedding"], (max_positions, hidden)),),
        "final_norm": final_norm,
        "final_norm_b": final_norm_b,
    }
    if lm_head is not None:
        rest["lm_head"] = (Source(lm_head, (vocab, hidden)),)
    return ModelSpec(
        architecture="gpt2",
        arch=Architecture(
            hidden_size=hidden,
            vocab_size=vocab,
            num_positions=max_positions,
            tied=lm_head is None,
            layer_norm=True,
            norm_epsilon=epsilon,
            layers=layer_rows(
                num_layers,
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=hidden // heads,
                attention_scale=(hidden // heads) ** -0.5 if scaled else 1.0,
                rope_table=-1,
                intermediate_size=intermediate,
                activation=activations.KINDS[activation],
                gated=False,
            ),
        ),
        max_positions=max_positions,
        rope_tables=(),
        layers=tuple(layer(index) for index in range(num_layers)),
        rest=rest,
        repeated=repeated,
    )
