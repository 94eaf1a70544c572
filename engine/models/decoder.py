"""From what a file of an architecture says to a `ModelSpec`: which tensors every part of a layer is made of.

Knows how the outputs of fused tensors are ordered; does not know where sizes and names come from, which the
readers of the two formats, `hub` and `gguf`, find out.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import latent
from pagellm.engine.models.rope import RopeTable
from pagellm.engine.models.spec import OF_EXPERTS, ModelSpec, Parts, Source
from pagellm.kernels.architecture import (
    LAYER_PARTS,
    PER_HEAD,
    REST_PARTS,
    Architecture,
    Kind,
    Part,
    layer_rows,
)

# The tensors of each part of `kernels.architecture.PARTS`, without ".weight": one for each of its pieces (Q,
# K and V; the gate and the linear half), or one that holds them all. Those of a layer come after "layer",
# which has {} in the place of the layer's number. Those of `_NAMED_IN_FULL` come with whatever they end in,
# biases ("_b") among them, and have {} in the place of the expert's number where each expert has its own
# tensors. "shared_up" and "shared_down" are the feed-forward beside experts, where it has other names.
Names = Mapping[str, str | tuple[str, ...]]
_NAMED_IN_FULL = (
    *("expert_up", "expert_down", "expert_up_b", "expert_down_b", "selection_bias", "sinks"),
    *("router_norm", "expert_scale", "layer_scale"),
)
# Of all layers together: more than any model has, and few enough to be listed in a second or two.
_MAX_EXPERTS = 1 << 17


def some_with_experts(
    sparse: Sequence[bool], features: Mapping[str, Any], shared: int, dense: int
) -> dict[str, Any]:
    """These features of experts for each layer: `sparse` says which have them.

    shared: how wide the feed-forward beside the experts is, 0 where there is none; dense: that of the others.
    """
    alone = {name: [features[name] * one for one in sparse] for name in OF_EXPERTS if name in features}
    return {**features, **alone, "intermediate_size": [shared if one else dense for one in sparse]}


class Differences(TypedDict, total=False):
    """How a decoder differs from Llama's, beside the features of its layers; see `Decoder`."""

    biases: Collection[str]
    layer_norm: bool
    norm_add: float
    paired: bool
    grouped_qkv: bool
    transposed: bool
    transposed_experts: Collection[str]
    interleaved_experts: bool
    keys_as_values: Collection[int]
    num_positions: int
    first_position: int
    embedding_scale: float
    logits_scale: float
    logits_softcap: float
    rope_tables: tuple[RopeTable, ...]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder: its sizes, the features of its layers, and how its checkpoint lays out what it is made of.

    features: of `layer_rows`, a number for all layers or one for each. biases: the parts that have one.
    norm_add: added to the weights of norms. paired: Q and K are stored as neighbouring rotary pairs.
    grouped_qkv: a fused QKV tensor has, for each KV head, its queries, the key and the value. transposed:
    the matrices of layers are stored as [inputs, outputs]; transposed_experts: the parts of experts that are;
    interleaved_experts: outputs of an expert's gate and of its linear half take turns in one tensor.
    keys_as_values: the layers whose values are what their keys are made of, too, so that one tensor is both.
    first_position: the row of the learned positions that is position 0's. repeated: of `ModelSpec`.
    max_positions: what the checkpoint says; its RoPE tables may be made for more.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    names: Names
    tied: bool
    features: Mapping[str, Any]
    biases: Collection[str] = ()
    layer_norm: bool = False
    norm_add: float = 0.0
    paired: bool = False
    grouped_qkv: bool = False
    transposed: bool = False
    transposed_experts: Collection[str] = ()
    interleaved_experts: bool = False
    keys_as_values: Collection[int] = ()
    num_positions: int = 0
    first_position: int = 0
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float = 0.0
    rope_tables: tuple[RopeTable, ...] = ()
    repeated: tuple[str, ...] = ()

    def spec(self) -> ModelSpec:
        """What the loader reads; raises `CheckpointError` if the numbers do not fit each other."""
        layers = layer_rows(self.num_layers, **{"expert_bias": "expert_up" in self.biases, **self.features})
        num_experts = int(layers["num_experts"].sum())
        if num_experts > _MAX_EXPERTS:
            raise CheckpointError(
                f"{self.architecture}: {num_experts} experts in all layers, expected at most {_MAX_EXPERTS}"
            )
        arch = Architecture(
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            num_positions=self.num_positions,
            tied=self.tied,
            layer_norm=self.layer_norm,
            norm_epsilon=self.norm_epsilon,
            layers=layers,
            embedding_scale=self.embedding_scale,
            logits_scale=self.logits_scale,
            logits_softcap=self.logits_softcap,
        )
        return ModelSpec(
            architecture=self.architecture,
            arch=arch,
            max_positions=max([self.max_positions, *(table.max_positions for table in self.rope_tables)]),
            rope_tables=self.rope_tables,
            layers=tuple(self._parts(arch, index) for index in range(self.num_layers)),
            rest=self._parts(arch, None),
            repeated=self.repeated,
        )

    def _parts(self, arch: Architecture, index: int | None) -> Parts:
        """The sources of every part of a layer, or of what belongs to no layer, that this decoder has."""
        row = None if index is None else arch.layers[index]
        parts = {}
        for part in REST_PARTS if index is None else LAYER_PARTS:
            shape = part.shape(arch, row)
            name = part.name.removesuffix("_b")
            if shape[0] == 0 or (part.kind is Kind.BIAS and name not in self.biases):
                continue
            if name in ("expert_up", "expert_down"):
                sources = self._expert_sources(part, index, shape, row)
            else:
                sources = self._sources_of(part, self._tensors(part, index, row), shape, row)
            parts[part.name] = tuple(sources)
        return parts

    def _tensors(self, part: Part, index: int | None, row: Any) -> list[str]:
        """The full names of the tensors of a part."""
        name, suffix = part.name, ""
        if name not in _NAMED_IN_FULL:
            name, suffix = name.removesuffix("_b"), ".bias" if part.kind is Kind.BIAS else ".weight"
            if row is not None and row["num_experts"] and f"shared_{name}" in self.names:
                name = f"shared_{name}"
        names = self.names[name]
        if name == "qkv" and index in self.keys_as_values:
            names = (names[0], names[1], names[1])
        prefix = "" if index is None else str(self.names["layer"]).format(index)
        return [f"{prefix}{one}{suffix}" for one in ((names,) if isinstance(names, str) else names)]

    def _expert_sources(
        self, part: Part, index: int | None, shape: tuple[int, ...], row: Any
    ) -> Iterator[Source]:
        """Of each expert, its gate and its linear half, or what it ends with."""
        tensors, experts = self._tensors(part, index, row), int(row["num_experts"])
        halves = 2 if part.name.startswith("expert_up") and row["gated"] else 1
        fused, outputs = len(tensors) < halves, shape[0] // experts // halves
        transposed = part.name in self.transposed_experts
        stored = (outputs * halves if fused else outputs, *shape[1:])
        for expert in range(experts):
            for half in range(halves):
                tensor = tensors[0 if fused else half]
                step = halves if fused and self.interleaved_experts else 1
                first = half if step > 1 else half * outputs
                yield Source(
                    tensor.format(expert),
                    stored[::-1] if transposed else stored,
                    transposed=transposed,
                    rows=((first, first + outputs if step == 1 else halves * outputs),) if fused else None,
                    step=step,
                    stack=None if "{}" in tensor else (expert, experts),
                )

    def _sources_of(
        self, part: Part, tensors: list[str], shape: tuple[int, ...], row: Any
    ) -> Iterator[Source]:
        if row is not None and row["latent_dim"]:
            own = latent.sources(
                part,
                tensors,
                shape,
                row,
                paired=self._paired_dim(row) > 0,
                split=self.names["key_up"] != self.names["value_up"],
            )
            if own is not None:
                return own
        pieces = self._pieces(part.name.removesuffix("_b"), shape[0], row, fused=len(tensors) == 1)
        return self._sources(part, tensors, pieces, shape, row)

    def _sources(
        self, part: Part, tensors: list[str], pieces: list["_Piece"], shape: tuple[int, ...], row: Any
    ) -> Iterator[Source]:
        if part.name == "position_embedding" and self.first_position:
            first, end = self.first_position, self.first_position + shape[0]
            yield Source(tensors[0], (end, *shape[1:]), rows=((first, end),))
            return
        add = self.norm_add if part.kind is Kind.VECTOR and part.name.endswith("norm") else 0.0
        rotary_dim = self._paired_dim(row)
        end = 0
        for number, piece in enumerate(pieces):
            fused = len(tensors) < len(pieces)
            first, end = end, end + piece.outputs
            outputs = shape[0] if fused else piece.outputs
            transposed = self.transposed and part.kind is Kind.MATRIX and row is not None
            yield Source(
                tensors[0 if fused else number],
                (*shape[1:], outputs) if transposed else (outputs, *shape[1:]),
                transposed=transposed,
                rows=(piece.ranges or ((first, end),)) if fused else None,
                paired_heads=piece.heads if rotary_dim else 0,
                rotary_dim=rotary_dim if piece.heads else 0,
                add=add,
            )

    def _paired_dim(self, row: Any) -> int:
        """The dimensions of a head that are stored as rotary pairs."""
        if not self.paired or row is None or row["rope_table"] < 0:
            return 0
        return self.rope_tables[int(row["rope_table"])].rotary_dim

    def _pieces(self, name: str, outputs: int, row: Any, fused: bool) -> list["_Piece"]:
        """What the outputs of a part are, one after the other."""
        if name == "up" and row["gated"]:
            return [_Piece(outputs // 2)] * 2
        if name == "router" and row["shared_gate"]:
            return [_Piece(outputs - 1), _Piece(1)]
        if name != "qkv" or (fused and not self._paired_dim(row) and not self.grouped_qkv):
            return [_Piece(outputs, _norm_heads(name, row))]
        heads, kv_heads, head_dim = (int(row[n]) for n in ("num_heads", "num_kv_heads", "head_dim"))
        if not self.grouped_qkv:
            return [_Piece(n * head_dim, r) for n, r in ((heads, heads), (kv_heads, kv_heads), (kv_heads, 0))]
        if heads % kv_heads:  # which `ModelSpec` refuses
            return [_Piece(outputs)]
        # In each group the queries of a KV head, its key and its value.
        queries = heads // kv_heads * head_dim
        starts = range(0, kv_heads * (queries + 2 * head_dim), queries + 2 * head_dim)
        ends = (0, queries, queries + head_dim, queries + 2 * head_dim)
        ranges = [tuple((s + ends[i], s + ends[i + 1]) for s in starts) for i in range(3)]
        return [
            _Piece(heads * head_dim, heads, ranges[0]),
            _Piece(kv_heads * head_dim, kv_heads, ranges[1]),
            _Piece(kv_heads * head_dim, 0, ranges[2]),
        ]


class _Piece(NamedTuple):
    """Outputs of a part that belong together."""

    outputs: int
    heads: int = 0  # of which RoPE rotates the outputs
    ranges: tuple[tuple[int, int], ...] | None = None  # of the tensor's outputs, if they are not in order


def _norm_heads(name: str, row: Any) -> int:
    """The heads that the weights of a norm of queries or keys belong to."""
    if name not in ("q_norm", "k_norm"):
        return 0
    return 1 if row["qk_norm"] == PER_HEAD else int(row["num_heads" if name == "q_norm" else "num_kv_heads"])
