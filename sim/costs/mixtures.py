"""The shape of mixtures of experts, and of models with latent attention, read of their config.json.

The engine reads the others. Sizes alone are read here, by the names that the models' own configurations have
for them; what changes the work of a step and is not known is refused by its name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError
from pagellm.sim.fields import Fields, read_json

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token")
# More than any model has: no file can ask for endless work.
_MAX_LAYERS, _MAX_EXPERTS = 1 << 14, 1 << 17
_WHOLE, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def read_mixture(path: Path) -> dict[str, Any] | None:
    """The shape of a model as `decoder.Model` has it; None where the engine is to be asked.

    That is so of one without experts and latent attention, and of one that may have recurrent layers or not.

    path: a config.json, or a directory that has one. Raises `CheckpointError`.
    """
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        return None
    whole = Fields(read_json(path, "a configuration", CheckpointError), str(path), CheckpointError)
    config = whole.section("text_config") if whole.has("text_config") else whole
    num_experts = _first(config, _EXPERTS, 0, high=_MAX_EXPERTS)
    if num_experts < 2 and not config.has("kv_lora_rank"):
        return None
    # One has the sizes of recurrent layers even where it has no such layers; in the other, layers differ in
    # their heads.
    if config.get("model_type") in ("granitemoehybrid", "gemma4_text"):
        return None
    for name in ("index_topk", "linear_num_key_heads", "mamba_d_state", "state_size"):
        if config.has(name):
            raise config.bad(name, config.get(name), "attention over all or the latest tokens in each layer")
    layers = list(_layers(config, num_experts))
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in layers:
        key = tuple(layer.items())
        kinds[key] = kinds.get(key, 0) + 1
    hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size")
    tied = bool(config.get("tie_word_embeddings") or whole.get("tie_word_embeddings"))
    products = sum(layer["product_parameters"] for layer in layers)
    experts = sum(layer["num_experts"] * layer["expert_parameters"] for layer in layers)
    others = (1 if tied else 2) * vocab * hidden + (2 * len(layers) + 1) * hidden
    return {
        "num_parameters": products + experts + others,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "tied_embeddings": tied,
        "max_model_len": config.integer("max_position_embeddings"),
        "layers": [{"count": count} | dict(kind) for kind, count in kinds.items()],
        "layer_bytes": None,
        "head_bytes": None,
    }


def _first(
    config: Fields,
    names: tuple[str, ...],
    default: int | None = None,
    low: int = 0,
    high: int | None = None,
) -> int:
    """The first of some names that there is."""
    for name in names:
        if config.has(name):
            return config.integer(name, low, high)
    if default is None:
        raise config.bad(names[0], None, "a number")
    return default


def _layers(config: Fields, num_experts: int) -> Iterator[dict[str, Any]]:
    """The layers one by one, as `decoder.Layers` has them."""
    hidden, attention = config.integer("hidden_size"), _attention(config)
    inner = config.integer("intermediate_size")
    expert_size = config.integer("moe_intermediate_size") if config.has("moe_intermediate_size") else inner
    shared = _first(config, ("n_shared_experts",), 0) * expert_size
    gated = _first(config, ("shared_expert_intermediate_size",), 0)
    shared += gated + _first(config, ("shared_intermediate_size",), 0)
    if config.get("model_type") == "llama4_text":  # each expert layer has one that all tokens pass
        shared += expert_size
    # A layer without experts may be wider.
    dense = config.integer("intermediate_size_mlp") if config.has("intermediate_size_mlp") else inner
    per_token = _first(config, _PER_TOKEN, low=1, high=num_experts) if num_experts > 1 else 0
    for index, window in enumerate(_windows(config)):
        layer = dict(attention) | {"window": window}
        if num_experts > 1 and _has_experts(config, index):
            layer |= {
                "intermediate_size": shared + per_token * expert_size,
                "num_experts": num_experts,
                "experts_per_token": per_token,
                "expert_parameters": 3 * hidden * expert_size,
            }
            # What the experts share may have a gate, which is a row of the router's.
            layer["product_parameters"] += (num_experts + bool(gated)) * hidden + 3 * hidden * shared
        else:
            layer |= {"intermediate_size": dense, "num_experts": 0, "experts_per_token": 0}
            layer |= {"expert_parameters": 0}
            layer["product_parameters"] += 3 * hidden * dense
        yield layer


def _attention(config: Fields) -> dict[str, Any]:
    """What all layers have alike."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.has("kv_lora_rank"):
        latent, rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
        nope, values = config.integer("qk_nope_head_dim"), config.integer("v_head_dim")
        queries = heads * (nope + rope)
        rank = _first(config, ("q_lora_rank",), 0)
        products = rank * (hidden + queries) if rank else hidden * queries
        products += hidden * (latent + rope) + latent * heads * (nope + values) + heads * values * hidden
        return {
            "num_heads": heads, "num_kv_heads": 1, "head_dim": nope + rope, "value_dim": values,
            "latent_dim": latent, "rope_dim": rope, "product_parameters": products,
        }  # fmt: skip
    kv_heads = _first(config, ("num_key_value_heads",), heads, low=1)
    head_dim = _first(config, ("head_dim",), hidden // heads, low=1)
    products = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    return {
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "product_parameters": products
    }  # fmt: skip


def _windows(config: Fields) -> list[int]:
    """The tokens that each layer sees; 0: all before it."""
    count = config.integer("num_hidden_layers", high=_MAX_LAYERS)
    sliding = _first(config, ("sliding_window",), 0) if config.get("use_sliding_window") is not False else 0
    types = config.get("layer_types")
    chunk = _first(config, ("attention_chunk_size",), 0)
    if types is None and chunk and isinstance(no_rope := config.get("no_rope_layers"), list) and no_rope:
        types = [_CHUNKED if rope else _WHOLE for rope in no_rope]
    if types is None and chunk:  # the default of Llama 4: every fourth layer sees all
        types = [_WHOLE if index % 4 == 3 else _CHUNKED for index in range(count)]
    if types is None:
        return [sliding] * count
    if not isinstance(types, list) or len(types) != count:
        raise config.bad("layer_types", types, f"{count} of them")
    windows = {_WHOLE: 0, _SLIDING: sliding, _CHUNKED: chunk}
    for kind in types:
        if not isinstance(kind, str) or kind not in windows:
            raise config.bad("layer_types", kind, " or ".join(windows))
    return [windows[kind] for kind in types]


def _has_experts(config: Fields, index: int) -> bool:
    kinds = config.entries("mlp_layer_types")
    if index < len(kinds):
        return bool(kinds[index] == "sparse")
    if index < _first(config, ("first_k_dense_replace",), 0):
        return False
    if index in config.entries("mlp_only_layers"):
        return False
    if config.has("moe_layers"):
        return index in config.entries("moe_layers")
    if config.has("moe_layer_freq"):
        return index % config.integer("moe_layer_freq") == 0
    return (index + 1) % _first(config, ("decoder_sparse_step", "interleave_moe_layer_step"), 1, low=1) == 0
