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
        ("intermediate_size", np.int64),
        ("activation", np.int64),  # of kernels.activation
        ("gated", np.int64),  # whether the activated gate multiplies a linear half
        ("window", np.int64),  # tokens that a token sees, itself included; 0: all before it
        ("attention_softcap", np.float64),  # scores become cap * tanh(score / cap); 0: they stay as they are
        ("qk_norm", np.int64),  # of queries and keys before they are rotated: NONE, PER_HEAD or WHOLE
        ("pre_norm", np.int64),  # whether attention and feed-forward each read a normalised state,
        ("post_norm", np.int64),  # and whether what each gives is normalised before it is added
        ("sub_norm", np.int64),  # whether the inputs of the products that end both are normalised
        ("parallel", np.int64),  # whether the feed-forward reads what attention read, not what it gave
        ("residual_scale", np.float64),  # of what attention and feed-forward give
        # Of multi-head latent attention (kernels.latent), whose one KV head has keys of `head_dim`: the
        # rotated dimensions that all heads share and the latent ones, which are the values, too.
        ("latent_dim", np.int64),  # 0: this is none
        ("nope_dim", np.int64),  # of each head's query, those that are not rotated
        ("value_dim", np.int64),  # of what each head gives
        ("query_rank", np.int64),  # what queries are compressed to before; 0: they are not
        ("latent_epsilon", np.float64),  # of the norms of what is compressed
    ],
    align=True,
)
_DEFAULTS: dict[str, Any] = {
    "window": 0,
    "attention_softcap": 0.0,
    "qk_norm": 0,
    "pre_norm": 1,
    "post_norm": 0,
    "sub_norm": 0,
    "parallel": 0,
    "residual_scale": 1.0,
    "latent_dim": 0,
    "nope_dim": 0,
    "value_dim": 0,
    "query_rank": 0,
    "latent_epsilon": 0.0,
}

# Of `qk_norm`: none, each head by itself, or a token's heads together.
NONE, PER_HEAD, WHOLE = range(3)


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
    if ((rows["latent_dim"] > 0) & ((rows["qk_norm"] != NONE) | (rows["sub_norm"] != 0))).any():
        raise ValueError("features: found qk_norm or sub_norm beside latent_dim, expected neither")
    return rows


@shared
def adds_at_once(row: Any) -> bool:
    """Whether what attention and feed-forward give is added to the hidden state as it is computed."""
    return bool(row["post_norm"] == 0 and row["parallel"] == 0 and row["residual_scale"] == 1.0)


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


class Part(NamedTuple):
    """One part of a layer, or of what belongs to no layer."""

    name: str
    # [outputs, inputs] or [size], by the layer's row; size 0 where the row has no such part.
    shape: Callable[[Architecture, Any], tuple[int, ...]]
    kind: Kind
    # Pieces of the outputs that begin on a panel of their own.
    pieces: Callable[[Any], int] = lambda row: 1

    def columns(self, arch: Architecture, row: Any) -> int:
        """Output columns, with those that fill up each piece."""
        outputs, pieces = self.shape(arch, row)[0], self.pieces(row)
        return padded(outputs // pieces) * pieces if pieces > 1 else outputs

    def runs(self, arch: Architecture, row: Any, by_part: Mapping[str, tuple[Run, ...]]) -> tuple[Run, ...]:
        """The formats of a matrix."""
        return by_part.get(self.name) or (Run(self.columns(arch, row), FLOAT32),)

    def size(self, arch: Architecture, row: Any, by_part: Mapping[str, tuple[Run, ...]]) -> int:
        """Words that it takes: whole vectors."""
        inputs = self.shape(arch, row)[1:]
        if self.kind is not Kind.MATRIX:
            return padded(int(np.prod([self.columns(arch, row), *inputs])))
        return sum(_run_size(run, *inputs) for run in self.runs(arch, row, by_part))


def _run_size(run: Run, K: int) -> int:
    size = padded(run.columns) // PANEL * panel_words(run.format, K)
    return -(-size // LANES) * LANES


@shared
def qkv_size(row: Any) -> Any:
    """Outputs of the first product of attention: queries, keys and values, or what they are made of."""
    if row["latent_dim"] > 0:
        queries = row["num_heads"] * latent_query_dim(row)
        return (row["query_rank"] if row["query_rank"] > 0 else queries) + row["head_dim"]
    return (row["num_heads"] + 2 * row["num_kv_heads"]) * row["head_dim"]


def heads_size(row: Any) -> int:
    """Inputs of the last product of attention."""
    return int(row["num_heads"] * (row["value_dim"] if row["latent_dim"] else row["head_dim"]))


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


def _hidden_size(arch: Architecture, row: Any) -> int:
    return arch.hidden_size


def _query_norm_size(arch: Architecture, row: Any) -> int:
    return int(row["head_dim"] * (row["num_heads"] if row["qk_norm"] == WHOLE else 1))


def _key_norm_size(arch: Architecture, row: Any) -> int:
    return int(row["head_dim"] * (row["num_kv_heads"] if row["qk_norm"] == WHOLE else 1))


# The parts of a layer, in the order in which the step reads them; "_b" is the bias of the part before.
LAYER_PARTS = (
    *_norm("attention_norm", "pre_norm", _hidden_size),
    Part("qkv", lambda arch, row: (int(qkv_size(row)), arch.hidden_size), Kind.MATRIX),
    Part("qkv_b", lambda arch, row: (int(qkv_size(row)),), Kind.BIAS),
    *_norm("q_norm", "qk_norm", _query_norm_size),
    *_norm("k_norm", "qk_norm", _key_norm_size),
    *_norm("latent_norm", "latent_dim", lambda arch, row: int(row["latent_dim"])),
    *_norm("query_norm", "query_rank", lambda arch, row: int(row["query_rank"])),
    Part("query_up", _rank_to_queries, Kind.MATRIX),
    Part("query_up_b", lambda arch, row: _rank_to_queries(arch, row)[:1], Kind.BIAS),
    # Of each head, from the part of a query that is not rotated to one that meets the latents.
    Part(
        "key_up",
        lambda arch, row: (int(row["num_heads"] * row["latent_dim"]), int(row["nope_dim"])),
        Kind.MATRIX,
        _latent_heads,
    ),
    Part(
        "key_up_b", lambda arch, row: (int(row["num_heads"] * row["latent_dim"]),), Kind.BIAS, _latent_heads
    ),
    # And from what it adds up of the latents to what it gives.
    Part(
        "value_up",
        lambda arch, row: (int(row["num_heads"] * row["value_dim"]), int(row["latent_dim"])),
        Kind.MATRIX,
        _latent_heads,
    ),
    Part(
        "value_up_b", lambda arch, row: (int(row["num_heads"] * row["value_dim"]),), Kind.BIAS, _latent_heads
    ),
    *_norm("attention_sub_norm", "sub_norm", lambda arch, row: heads_size(row)),
    Part("output", lambda arch, row: (arch.hidden_size, heads_size(row)), Kind.MATRIX),
    Part("output_b", lambda arch, row: (arch.hidden_size,), Kind.BIAS),
    *_norm("attention_post_norm", "post_norm", _hidden_size),
    *_norm("mlp_norm", "pre_norm", _hidden_size),
    # The gate, if there is one, and the linear half.
    Part("up", lambda arch, row: (_up_size(row), arch.hidden_size), Kind.MATRIX, _up_pieces),
    Part("up_b", lambda arch, row: (_up_size(row),), Kind.BIAS, _up_pieces),
    *_norm("mlp_sub_norm", "sub_norm", lambda arch, row: int(row["intermediate_size"])),
    Part("down", lambda arch, row: (arch.hidden_size, int(row["intermediate_size"])), Kind.MATRIX),
    Part("down_b", lambda arch, row: (arch.hidden_size,), Kind.BIAS),
    *_norm("mlp_post_norm", "post_norm", _hidden_size),
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
# first, and that one's format: the other panels take their activations in the same form.
_PLACE = np.dtype([("start", np.int64), ("format", np.int64), ("panel", np.int64)], align=True)
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
    """Gives every part its place."""
    layers, rest = np.zeros(arch.num_layers, LAYER_PLACES), np.zeros(1, REST_PLACES)
    panels: list[NDArray[np.int64]] = []
    end = num_panels = 0

    def place(parts: Iterable[Part], row: Any, places: Any, by_part: Mapping[str, tuple[Run, ...]]) -> None:
        nonlocal end, num_panels
        for part in parts:
            if part.kind is not Kind.MATRIX:
                places[part.name] = end, FLOAT32, 0
                end += part.size(arch, row, by_part)
                continue
            runs, K = part.runs(arch, row, by_part), part.shape(arch, row)[1]
            places[part.name] = end, runs[0].format, num_panels
            for run in runs:
                starts = end + np.arange(padded(run.columns) // PANEL) * panel_words(run.format, K)
                panels.append(np.stack([starts, np.full_like(starts, run.format)], axis=1))
                num_panels += len(starts)
                end += _run_size(run, K)

    for index in range(arch.num_layers):
        place(LAYER_PARTS, arch.layers[index], layers[index], formats[index])
    place(REST_PARTS, None, rest[0], formats[-1])
    if arch.tied:
        rest["lm_head"] = rest["embedding"]
    return Places(layers, rest, np.concatenate(panels), end + LANES)
