"""What tells models apart: a few numbers for all of a model, a row for each layer, and the parts it has.

A layer is a row of `LAYER`: its features are numbers that the compiled step reads, so layers may differ in
any of them and one step serves them all. `PARTS` names what a model has weights for; where each lies, which
formats it can have and what a checkpoint must bring follow from this table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.activation import CLAMPED_SWIGLU
from pagellm.kernels.jit import shared
from pagellm.kernels.packing import FLOAT32, PANEL, padded, panel_words
from pagellm.kernels.simd import LANES

# The features of a layer, which the step reads. Those with a default are what not every layer has.
LAYER = np.dtype(
    [
        ("num_heads", np.int64),
        ("num_kv_heads", np.int64),
        ("head_dim", np.int64),
        ("attention_scale", np.float64),  # of queries times keys
        ("rope_table", np.int64),  # of `Weights`, or -1: queries and keys are not rotated
        # Of the feed-forward that every token passes through: beside experts the shared ones, or 0.
        ("intermediate_size", np.int64),
        ("activation", np.int64),  # of kernels.activation
        ("gated", np.int64),  # whether the activated gate multiplies a linear half
        ("window", np.int64),  # tokens that a token sees, itself included; 0: all before it
        ("attention_softcap", np.float64),  # scores become cap * tanh(score / cap); 0: they stay as they are
        ("qk_norm", np.int64),  # of queries and keys before they are rotated: NONE, PER_HEAD or WHOLE
        ("value_norm", np.int64),  # whether each head of values is divided by its root mean square
        ("pre_norm", np.int64),  # whether attention and feed-forward each read a normalised state,
        ("post_norm", np.int64),  # and whether what each gives is normalised before it is added
        ("sub_norm", np.int64),  # whether the inputs of the products that end both are normalised
        ("parallel", np.int64),  # whether the feed-forward reads what attention read, not what it gave
        ("residual_scale", np.float64),  # of what attention and feed-forward give
        ("layer_scale", np.int64),  # whether the hidden state is multiplied by a number where the layer ends
        # Of multi-head latent attention (kernels.latent), whose one KV head has keys of `head_dim`: the
        # rotated dimensions that all heads share and the latent ones, which are the values, too.
        ("latent_dim", np.int64),  # 0: this is none
        ("nope_dim", np.int64),  # of each head's query, those that are not rotated
        ("value_dim", np.int64),  # of what each head gives
        ("query_rank", np.int64),  # what queries are compressed to before; 0: they are not
        ("latent_epsilon", np.float64),  # of the norms of what is compressed
        ("sinks", np.int64),  # whether each head gives a learned share of its weights to nothing
        ("qkv_clip", np.float64),  # queries, keys and values stay within +- this; 0: they stay as they are
        ("num_experts", np.int64),  # feed-forwards of which each token passes through a few; 0: none
        ("experts_per_token", np.int64),
        ("expert_size", np.int64),  # what `intermediate_size` is, of each expert
        ("router", np.int64),  # what experts are scored by: SOFTMAX, TOP_SOFTMAX or SIGMOID
        ("renormalize", np.int64),  # whether the scores of a token's experts are divided by their sum,
        ("score_floor", np.float64),  # or by this, if the sum is less,
        ("router_scale", np.float64),  # and what they are multiplied by
        ("selection_bias", np.int64),  # whether experts are chosen by their scores plus a bias of each
        ("expert_groups", np.int64),  # neighbouring experts are in so many groups,
        ("groups_per_token", np.int64),  # of which a token's experts are in so many,
        ("group_best", np.int64),  # that are best by the sum of so many best experts
        ("expert_bias", np.int64),  # whether the products of experts have biases
        ("shared_gate", np.int64),  # whether the shared experts' part is times a sigmoid of the router's
        # Whether the router and the experts read through norms of their own, and what the experts and the
        # feed-forward beside them give is normalised, each by itself, before it is added up.
        ("expert_norms", np.int64),
        ("logit_scale", np.float64),  # of the router's logits
        ("expert_scale", np.int64),  # whether what an expert gives is multiplied by a number of its own
    ],
    align=True,
)
_DEFAULTS: dict[str, Any] = {
    "window": 0,
    "attention_softcap": 0.0,
    "qk_norm": 0,
    "value_norm": 0,
    "pre_norm": 1,
    "post_norm": 0,
    "sub_norm": 0,
    "parallel": 0,
    "residual_scale": 1.0,
    "layer_scale": 0,
    "latent_dim": 0,
    "nope_dim": 0,
    "value_dim": 0,
    "query_rank": 0,
    "latent_epsilon": 0.0,
    "sinks": 0,
    "qkv_clip": 0.0,
    "num_experts": 0,
    "experts_per_token": 0,
    "expert_size": 0,
    "router": 0,
    "renormalize": 0,
    "score_floor": 0.0,
    "router_scale": 1.0,
    "selection_bias": 0,
    "expert_groups": 1,
    "groups_per_token": 1,
    "group_best": 1,
    "expert_bias": 0,
    "shared_gate": 0,
    "expert_norms": 0,
    "logit_scale": 1.0,
    "expert_scale": 0,
}

# Of `qk_norm`: none, each head by itself, or a token's heads together.
NONE, PER_HEAD, WHOLE = range(3)
# Of `router`: a softmax of all logits, one of the chosen experts' logits alone, or a sigmoid of each.
SOFTMAX, TOP_SOFTMAX, SIGMOID = range(3)


def layer_rows(num_layers: int, **features: Any) -> NDArray[np.void]:
    """[num_layers] of `LAYER` from features by their names: a number for all layers, or one for each.

    Raises `TypeError` for a feature that has no default and is not named, or that there is not, and
    `ValueError` for features that exclude each other.
    """
    required = [name for name in LAYER.names or () if name not in _DEFAULTS]
    if not set(required) <= features.keys() <= set(LAYER.names or ()):
        raise TypeError(
            f"features: found {sorted(features)}, expected {required} and some of {sorted(_DEFAULTS)}"
        )
    rows = np.zeros(num_layers, LAYER)
    for name, value in (_DEFAULTS | features).items():
        rows[name] = value
    if (rows["parallel"] & rows["post_norm"]).any():
        raise ValueError("features: found post_norm in a parallel layer, expected one of the two")
    if ((rows["latent_dim"] > 0) & (rows["sinks"] != 0)).any():
        raise ValueError("features: found sinks beside latent_dim, expected one of the two")
    if ((rows["activation"] == CLAMPED_SWIGLU) & (rows["gated"] == 0)).any():
        raise ValueError("features: found clamped_swiglu without a gate, expected one")
    of_heads = (rows["qk_norm"] != NONE) | (rows["value_norm"] != 0) | (rows["sub_norm"] != 0)
    if ((rows["latent_dim"] > 0) & of_heads).any():
        raise ValueError("features: found qk_norm, value_norm or sub_norm beside latent_dim, expected none")
    both = (rows["pre_norm"] != 0) & (rows["post_norm"] != 0) & (rows["intermediate_size"] > 0)
    if ((rows["expert_norms"] != 0) & ~both).any():
        raise ValueError(
            "features: found expert_norms, expected pre_norm, post_norm and a feed-forward beside experts"
        )
    return rows


@shared
def adds_at_once(row: Any) -> bool:
    """Whether what attention and feed-forward give is added to the hidden state as it is computed."""
    return bool(
        row["post_norm"] == 0
        and row["parallel"] == 0
        and row["residual_scale"] == 1.0
        and row["layer_scale"] == 0
    )


@shared
def attended_dim(row: Any) -> Any:
    """Dimensions of the values that attention adds up, for each head."""
    return row["latent_dim"] if row["latent_dim"] > 0 else row["head_dim"]


@shared
def cached_value_dim(row: Any) -> Any:
    """Dimensions of the values that the cache keeps beside the keys."""
    return 0 if row["latent_dim"] > 0 else row["head_dim"]


@shared
def latent_query_dim(row: Any) -> Any:
    """Of latent attention: dimensions of a head's query before it meets the latents."""
    return row["nope_dim"] + row["head_dim"] - row["latent_dim"]


@shared
def latent_query_stride(row: Any) -> int:
    """Of latent attention: room for a head's query, rotated dimensions and whole panels of latent ones."""
    return padded(row["head_dim"] - row["latent_dim"] + padded(row["latent_dim"]))


class Architecture(NamedTuple):
    """The numbers that tell one model's step from another's."""

    hidden_size: int
    vocab_size: int
    num_positions: int  # rows of the learned position embedding; 0 where there is none
    tied: bool  # the output matrix is the embedding
    layer_norm: bool  # LayerNorm; otherwise RMSNorm
    norm_epsilon: float
    layers: NDArray[np.void]  # [num_layers] of LAYER
    embedding_scale: float = 1.0  # of the embedding's rows
    logits_scale: float = 1.0
    logits_softcap: float = 0.0  # scaled logits become cap * tanh(logit / cap); 0: they stay as they are

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Architecture):
            return NotImplemented
        own, others = self._asdict(), other._asdict()
        return np.array_equal(own.pop("layers"), others.pop("layers")) and own == others

    def __ne__(self, other: object) -> bool:  # that of tuples would compare the rows, too
        return not self == other

    @property
    def num_layers(self) -> int:
        """How many rows there are."""
        return len(self.layers)

    @property
    def group_size(self) -> int:
        """The most query heads of a layer that share a KV head."""
        return int((self.layers["num_heads"] // self.layers["num_kv_heads"]).max())


class Kind(Enum):
    """What is done with a part."""

    MATRIX = "multiplied by, so it is packed in a format"
    VECTOR = "added or multiplied by element; a table if it has rows that are looked up"
    BIAS = "a vector that a model may lack: then it is zeros, so that the step has one path"


class Run(NamedTuple):
    """Neighbouring output columns of a matrix in one format; all but a part's last are whole panels."""

    columns: int
    format: int  # of kernels.packing
    ordered: bool = False  # whether the inputs have an order of their own, as all of a part's runs have then


class Part(NamedTuple):
    """One part of a layer, or of what belongs to no layer."""

    name: str
    # [outputs, inputs] or [size], by the layer's row; size 0 where the row has no such part.
    shape: Callable[[Architecture, Any], tuple[int, ...]]
    kind: Kind
    # Pieces of the outputs that begin on a panel of their own.
    pieces: Callable[[Any], int] = lambda row: 1
    of_experts: bool = False  # whether it is matrices, one of each expert, one behind the other

    def columns(self, arch: Architecture, row: Any) -> int:
        """Output columns, with those that fill up each piece."""
        outputs, pieces = self.shape(arch, row)[0], self.pieces(row)
        return padded(outputs // pieces) * pieces if pieces > 1 else outputs

    def runs(self, arch: Architecture, row: Any, by_part: Mapping[str, tuple[Run, ...]]) -> tuple[Run, ...]:
        """The formats of a matrix."""
        return by_part.get(self.name) or (Run(self.columns(arch, row), FLOAT32),)

    def size(self, arch: Architecture, row: Any) -> int:
        """Words that a vector or a table takes: whole panels."""
        return padded(int(np.prod([self.columns(arch, row), *self.shape(arch, row)[1:]])))


@shared
def qkv_size(row: Any) -> Any:
    """Outputs of the first product of attention: queries, keys and values, or what they are made of."""
    if row["latent_dim"] > 0:
        queries = row["num_heads"] * latent_query_dim(row)
        return (row["query_rank"] if row["query_rank"] > 0 else queries) + row["head_dim"]
    return (row["num_heads"] + 2 * row["num_kv_heads"]) * row["head_dim"]


@shared
def heads_size(row: Any) -> Any:
    """Inputs of the last product of attention."""
    return row["num_heads"] * (row["value_dim"] if row["latent_dim"] > 0 else row["head_dim"])


def _latent_heads(row: Any) -> int:
    return int(row["num_heads"]) if row["latent_dim"] else 1


def _rank_to_queries(arch: Architecture, row: Any) -> tuple[int, ...]:
    rank = int(row["query_rank"])
    return (int(row["num_heads"] * latent_query_dim(row)) if rank else 0, rank)


def _up_pieces(row: Any) -> int:
    return 2 if row["gated"] else 1


def _up_size(row: Any) -> int:
    return int(row["intermediate_size"]) * _up_pieces(row)


def _norm(name: str, feature: str, size: Callable[[Architecture, Any], int]) -> tuple[Part, Part]:
    """A norm that is there if the row has the feature: its weights, and its bias."""

    def shape(arch: Architecture, row: Any) -> tuple[int, ...]:
        return (size(arch, row) if row[feature] else 0,)

    return Part(name, shape, Kind.VECTOR), Part(f"{name}_b", shape, Kind.BIAS)


def _linear(
    name: str,
    shape: Callable[[Architecture, Any], tuple[int, ...]],
    pieces: Callable[[Any], int] = lambda row: 1,
) -> tuple[Part, Part]:
    """A matrix, and its bias."""
    return (
        Part(name, shape, Kind.MATRIX, pieces),
        Part(f"{name}_b", lambda arch, row: shape(arch, row)[:1], Kind.BIAS, pieces),
    )


def _hidden_size(arch: Architecture, row: Any) -> int:
    return arch.hidden_size


def _query_norm_size(arch: Architecture, row: Any) -> int:
    return int(row["head_dim"] * (row["num_heads"] if row["qk_norm"] == WHOLE else 1))


def _key_norm_size(arch: Architecture, row: Any) -> int:
    return int(row["head_dim"] * (row["num_kv_heads"] if row["qk_norm"] == WHOLE else 1))


def _router_size(row: Any) -> int:
    """Logits of the experts, and behind them that of the shared experts' gate."""
    return int(row["num_experts"] + row["shared_gate"])


def _expert_pieces(row: Any) -> int:
    return max(1, int(row["num_experts"]) * _up_pieces(row))


def _biased_experts(row: Any) -> int:
    """Those that have biases of their own; without, all have the same zeros."""
    return int(row["num_experts"]) if row["expert_bias"] else min(1, int(row["num_experts"]))


# The parts of a layer, in the order in which the step reads them; "_b" is the bias of the part before.
LAYER_PARTS = (
    *_norm("attention_norm", "pre_norm", _hidden_size),
    *_linear("qkv", lambda arch, row: (int(qkv_size(row)), arch.hidden_size)),
    *_norm("q_norm", "qk_norm", _query_norm_size),
    *_norm("k_norm", "qk_norm", _key_norm_size),
    *_norm("latent_norm", "latent_dim", lambda arch, row: int(row["latent_dim"])),
    *_norm("query_norm", "query_rank", lambda arch, row: int(row["query_rank"])),
    *_linear("query_up", _rank_to_queries),
    # Of each head, from the part of a query that is not rotated to one that meets the latents.
    *_linear(
        "key_up",
        lambda arch, row: (int(row["num_heads"] * row["latent_dim"]), int(row["nope_dim"])),
        _latent_heads,
    ),
    # And from what it adds up of the latents to what it gives.
    *_linear(
        "value_up",
        lambda arch, row: (int(row["num_heads"] * row["value_dim"]), int(row["latent_dim"])),
        _latent_heads,
    ),
    *_norm("attention_sub_norm", "sub_norm", lambda arch, row: int(heads_size(row))),
    Part("sinks", lambda arch, row: (int(row["num_heads"]) if row["sinks"] else 0,), Kind.VECTOR),
    *_linear("output", lambda arch, row: (arch.hidden_size, int(heads_size(row)))),
    *_norm("attention_post_norm", "post_norm", _hidden_size),
    *_norm("mlp_norm", "pre_norm", _hidden_size),
    # The gate, if there is one, and the linear half.
    *_linear("up", lambda arch, row: (_up_size(row), arch.hidden_size), _up_pieces),
    *_norm("mlp_sub_norm", "sub_norm", lambda arch, row: int(row["intermediate_size"])),
    *_linear(
        "down",
        lambda arch, row: (
            arch.hidden_size if row["intermediate_size"] else 0,
            int(row["intermediate_size"]),
        ),
    ),
    *_norm("shared_post_norm", "expert_norms", _hidden_size),
    *_norm("router_norm", "expert_norms", _hidden_size),
    # Always in float32.
    *_linear("router", lambda arch, row: (_router_size(row), arch.hidden_size)),
    Part(
        "selection_bias",
        lambda arch, row: (int(row["num_experts"]) if row["selection_bias"] else 0,),
        Kind.VECTOR,
    ),
    Part(
        "expert_scale",
        lambda arch, row: (int(row["num_experts"]) if row["expert_scale"] else 0,),
        Kind.VECTOR,
    ),
    *_norm("expert_norm", "expert_norms", _hidden_size),
    Part(
        "expert_up",
        lambda arch, row: (int(row["num_experts"] * row["expert_size"]) * _up_pieces(row), arch.hidden_size),
        Kind.MATRIX,
        _expert_pieces,
        of_experts=True,
    ),
    Part(
        "expert_up_b",
        lambda arch, row: (_biased_experts(row) * int(row["expert_size"]) * _up_pieces(row),),
        Kind.BIAS,
        lambda row: max(1, _biased_experts(row) * _up_pieces(row)),
    ),
    Part(
        "expert_down",
        lambda arch, row: (int(row["num_experts"]) * arch.hidden_size, int(row["expert_size"])),
        Kind.MATRIX,
        lambda row: max(1, int(row["num_experts"])),
        of_experts=True,
    ),
    Part(
        "expert_down_b",
        lambda arch, row: (_biased_experts(row) * arch.hidden_size,),
        Kind.BIAS,
        lambda row: max(1, _biased_experts(row)),
    ),
    *_norm("expert_post_norm", "expert_norms", _hidden_size),
    *_norm("mlp_post_norm", "post_norm", _hidden_size),
    Part("layer_scale", lambda arch, row: (1 if row["layer_scale"] else 0,), Kind.VECTOR),
)
# The parts that belong to no layer. One without rows is not there.
REST_PARTS = (
    Part("embedding", lambda arch, row: (arch.vocab_size, arch.hidden_size), Kind.MATRIX),
    Part("position_embedding", lambda arch, row: (arch.num_positions, arch.hidden_size), Kind.VECTOR),
    Part("final_norm", lambda arch, row: (arch.hidden_size,), Kind.VECTOR),
    Part("final_norm_b", lambda arch, row: (arch.hidden_size,), Kind.BIAS),
    Part("lm_head", lambda arch, row: (0 if arch.tied else arch.vocab_size, arch.hidden_size), Kind.MATRIX),
    Part("lm_head_b", lambda arch, row: (arch.vocab_size,), Kind.BIAS),
)
PARTS = {part.name: part for part in LAYER_PARTS + REST_PARTS}

# Where a part begins in the weights' buffer, in words. For a matrix also which of `Weights.panels` is its
# first, and that one's format: the other panels take their activations in the same form; and from which word
# on the order of its inputs is kept, an int32 each, or -1 where they are in the model's.
_PLACE = np.dtype([(name, np.int64) for name in ("start", "format", "panel", "order")], align=True)
LAYER_PLACES = np.dtype([(part.name, _PLACE) for part in LAYER_PARTS], align=True)
REST_PLACES = np.dtype([(part.name, _PLACE) for part in REST_PARTS], align=True)


class Weights(NamedTuple):
    """What stays the same from step to step."""

    values: NDArray[np.float32]  # [everything], packed words of every format among the floats
    layers: NDArray[np.void]  # [num_layers] of LAYER_PLACES
    rest: NDArray[np.void]  # [1] of REST_PLACES
    panels: NDArray[np.int64]  # [panels of all matrices, 2]: where each begins in `values`, and its format
    cos: NDArray[np.float32]  # [RoPE tables, max_model_len, half the rotated dimensions of the widest]
    sin: NDArray[np.float32]
    rope_halves: NDArray[np.int64]  # [RoPE tables], half the dimensions that each rotates
    query_scale: NDArray[np.float32]  # [RoPE tables, max_model_len], of whole queries, after they are rotated


# The formats by part, a mapping for each layer and then one for the rest; FLOAT32 where none is named.
Formats = Sequence[Mapping[str, tuple[Run, ...]]]


class Places(NamedTuple):
    """Where everything lies in the weights' buffer: fields of `Weights`, and its size in words."""

    layers: NDArray[np.void]
    rest: NDArray[np.void]
    panels: NDArray[np.int64]
    size: int


def lay_out(arch: Architecture, formats: Formats) -> Places:
    """Gives every part its place; all that belongs to one expert is one run of memory."""
    layers, rest = np.zeros(arch.num_layers, LAYER_PLACES), np.zeros(1, REST_PLACES)
    panels: list[NDArray[np.int64]] = []
    end = num_panels = 0

    def place(parts: Iterable[Part], row: Any, places: Any, by_part: Mapping[str, tuple[Run, ...]]) -> None:
        nonlocal end
        for part in parts:
            if part.kind is not Kind.MATRIX:
                places[part.name] = end, FLOAT32, 0, -1
                end += part.size(arch, row)
            elif not part.of_experts:
                place_matrices({part.name: _panels_of(part, arch, row, by_part)}, places, 1)
                if part.runs(arch, row, by_part)[0].ordered:
                    places[part.name]["order"] = end
                    end += -(-part.shape(arch, row)[1] // LANES) * LANES
        experts = {part.name: _panels_of(part, arch, row, by_part) for part in parts if part.of_experts}
        if experts:
            place_matrices(experts, places, max(1, int(row["num_experts"])))

    def place_matrices(tables: Mapping[str, NDArray[np.int64]], places: Any, num_turns: int) -> None:
        """Parts take turns: of each an equal number of its panels, [panels, 2] sizes and formats."""
        nonlocal end, num_panels
        sizes = [table[:, 0].reshape(num_turns, -1) for table in tables.values()]
        starts = np.concatenate(sizes, axis=1)
        starts = end + np.cumsum(starts).reshape(starts.shape) - starts
        columns = np.cumsum([size.shape[1] for size in sizes])[:-1]
        for (name, table), own in zip(tables.items(), np.split(starts, columns, axis=1), strict=True):
            placed = np.stack([own.ravel(), table[:, 1]], axis=1)
            places[name] = *(placed[0] if len(placed) else (end, FLOAT32)), num_panels, -1
            panels.append(placed)
            num_panels += len(table)
        end += sum(int(size.sum()) for size in sizes)

    for index in range(arch.num_layers):
        place(LAYER_PARTS, arch.layers[index], layers[index], formats[index])
        if not arch.layers[index]["expert_norms"]:  # router and experts read what a feed-forward reads
            for name in ("router_norm", "expert_norm"):
                for suffix in ("", "_b"):
                    layers[index][f"{name}{suffix}"] = layers[index][f"mlp_norm{suffix}"]
    place(REST_PARTS, None, rest[0], formats[-1])
    if arch.tied:
        rest["lm_head"] = rest["embedding"]
    return Places(layers, rest, np.concatenate(panels), end + LANES)


def _panels_of(
    part: Part, arch: Architecture, row: Any, by_part: Mapping[str, tuple[Run, ...]]
) -> NDArray[np.int64]:
    """The words and the format of each panel of a matrix, [panels, 2]; runs are whole vectors."""
    K, tables = part.shape(arch, row)[1], [np.zeros((0, 2), np.int64)]
    for run in part.runs(arch, row, by_part):
        count = padded(run.columns) // PANEL
        table = np.tile(np.array([panel_words(run.format, K), run.format], np.int64), (count, 1))
        table[-1:, 0] += -table[:, 0].sum() % LANES
        tables.append(table)
    return np.concatenate(tables)
