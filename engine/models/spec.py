"""What an architecture's file says about a checkpoint: a `ModelSpec`, the only thing the loader reads.

Knows the parts of the compiled step and which tensors each is made of; does not know how tensors are stored
or how the kernels lay them out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pagellm.engine.errors import CheckpointError
from pagellm.engine.models.rope import RopeTable
from pagellm.kernels.architecture import LAYER_PARTS, REST_PARTS, Architecture, Kind, Part

# Features that a layer without experts must not have.
OF_EXPERTS = (
    "num_experts",
    "experts_per_token",
    "shared_gate",
    "selection_bias",
    "expert_norms",
    "expert_scale",
)


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint and how its rows become output columns of a part.

    shape: as the checkpoint stores it, [outputs, inputs], or [inputs, outputs] where `transposed`; one number
    for vectors. rows: the ranges of outputs that are taken, in this order; None: all. step: of a range every
    step-th output is, from the first on. inputs_taken: the range of inputs, where `transposed`; None:
    all. paired_heads: the outputs are so many heads, of each of which rotary_dim (0: all), from rotary_start
    on, are stored as rotary pairs (0, 1), (2, 3), ... and not as (0, D/2), (1, D/2 + 1), ...; a range holds
    whole heads. add: what is added to each element. stack: which of how many is meant where the tensor has
    several of this shape, one after the other: [count, *shape], or [count * shape[0], ...].
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    rows: tuple[tuple[int, int], ...] | None = None
    step: int = 1
    inputs_taken: tuple[int, int] | None = None
    paired_heads: int = 0
    rotary_dim: int = 0
    rotary_start: int = 0
    add: float = 0.0
    stack: tuple[int, int] | None = None

    @property
    def stored_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the tensor may have, the likeliest first: the numbers in it are the same."""
        if self.stack is not None:
            count, (first, *rest) = self.stack[1], self.shape
            return (count, *self.shape), (count * first, *rest)
        row = (self.shape[1:],) if len(self.shape) > 1 and self.shape[0] == 1 else ()
        return (self.shape, (1, *self.shape), *row)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The outputs of the tensor that are taken, first and end of each range."""
        return ((0, self.shape[1 if self.transposed else 0]),) if self.rows is None else self.rows

    @property
    def outputs(self) -> int:
        """The output columns that it becomes."""
        return sum(-(-(end - first) // self.step) for first, end in self.ranges)

    @property
    def size(self) -> int:
        """The numbers that it takes from the tensor."""
        return self.outputs * (self.inputs or 1)

    @property
    def inputs(self) -> int | None:
        """Of a matrix; a vector has none."""
        if self.transposed:
            first, end = self.input_range
            return end - first
        return None if len(self.shape) == 1 else self.shape[1]

    @property
    def input_range(self) -> tuple[int, int]:
        """The rows of a transposed tensor that are taken, first and end."""
        return self.inputs_taken or (0, self.shape[0])


# A part of `kernels.architecture.PARTS` to the tensors that are stacked, along the outputs, to make it.
Parts = Mapping[str, tuple[Source, ...]]


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of the GPT-2 or Llama family, whatever its checkpoint called things.

    architecture: its name; arch: its numbers. rope_tables: what a layer's `rope_table` is the index of.
    layers, rest: the tensors of every part; biases that are not named are zeros. repeated: tensors whose
    values another one has, or the other fields have. left_alone: what there is to say of tensors that belong
    to more than a language model; empty where there are none.
    """

    architecture: str
    arch: Architecture
    max_positions: int
    rope_tables: tuple[RopeTable, ...]
    layers: tuple[Parts, ...] = field(repr=False)
    rest: Parts = field(repr=False)
    repeated: tuple[str, ...] = ()
    left_alone: str = ""

    def __post_init__(self) -> None:
        for rope_table in self.rope_tables:
            rope_table.check(self.architecture)
        for index, row in enumerate(self.arch.layers):
            where = f"{self.architecture}: layer {index}"
            heads, kv_heads = row["num_heads"], row["num_kv_heads"]
            self._check_experts(where, row)
            if heads % kv_heads:
                raise CheckpointError(
                    f"{where}: {heads} attention heads cannot share {kv_heads} KV heads; expected a multiple"
                )
            table = int(row["rope_table"])
            rotary_dim = self.rope_tables[table].rotary_dim if table >= 0 else 0
            if rotary_dim > row["head_dim"]:
                raise CheckpointError(
                    f"{where}: {rotary_dim} dimensions of a head are rotated, expected at most "
                    f"{row['head_dim']}, its size"
                )
            if row["latent_dim"]:
                _check_latent(where, row, rotary_dim if table >= 0 else None)
            self._check_parts(where, LAYER_PARTS, row, self.layers[index])
        self._check_parts(self.architecture, REST_PARTS, None, self.rest)

    def _check_experts(self, where: str, row: Any) -> None:
        """The numbers of a mixture's layer fit each other; another layer has none."""
        if row["num_experts"] == 0:
            for name in OF_EXPERTS:
                if row[name]:
                    raise CheckpointError(f"{where}: {name}: found {row[name]}, expected 0 without experts")
            if row["intermediate_size"] < 1:
                raise CheckpointError(f"{where}: found neither a feed-forward nor experts")
            return
        in_group = row["num_experts"] // max(1, row["expert_groups"])
        for name, low, high in (
            ("expert_groups", 1, row["num_experts"]),
            ("groups_per_token", 1, row["expert_groups"]),
            ("group_best", 1, in_group),
            ("experts_per_token", 1, row["groups_per_token"] * in_group),
            ("expert_size", 1, None),
            ("intermediate_size", int(row["shared_gate"]), None),
        ):
            if row[name] < low or (high is not None and row[name] > high):
                of = f"from {low} to {high}" if high is not None else f"{low} or more"
                raise CheckpointError(
                    f"{where}: {name}: found {row[name]} with {row['num_experts']} experts in "
                    f"{row['expert_groups']} groups, expected {of}"
                )
        if row["num_experts"] % row["expert_groups"]:
            raise CheckpointError(
                f"{where}: {row['num_experts']} experts cannot be in {row['expert_groups']} equal groups"
            )

    def _check_parts(self, where: str, expected: tuple[Part, ...], row: Any, parts: Parts) -> None:
        """Every part is there, as large as the architecture's numbers say, and no other."""
        known = {part.name for part in expected}
        for name in parts.keys() - known:
            raise CheckpointError(f"{where}: found part {name}, expected one of {', '.join(sorted(known))}")
        for part in expected:
            shape = part.shape(self.arch, row)
            if part.name not in parts and (part.kind is Kind.BIAS or shape[0] == 0):
                continue
            sources = parts.get(part.name, ())
            inputs = {source.inputs for source in sources} - {None}
            if (sum(source.outputs for source in sources), *inputs) != shape:
                shapes = [source.shape for source in sources]
                raise CheckpointError(
                    f"{where}: {part.name}: found tensors of {shapes}, expected {shape} in all"
                )

    def at(self, max_model_len: int) -> "ModelSpec":
        """The model as it serves sequences of up to `max_model_len` tokens: see `RopeTable.at`."""
        return replace(self, rope_tables=tuple(table.at(max_model_len) for table in self.rope_tables))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, and logits of a token."""
        return self.arch.vocab_size

    @property
    def window(self) -> int:
        """Tokens that a token sees in the layer that sees the most, itself included; 0: one sees all."""
        windows = self.arch.layers["window"]
        return int(windows.max()) if (windows > 0).all() else 0


def _check_latent(where: str, row: Any, rotary_dim: int | None) -> None:
    """The numbers of latent attention fit each other. rotary_dim: of the layer's RoPE table, if any."""
    latent, rotary = int(row["latent_dim"]), int(row["head_dim"] - row["latent_dim"])
    for name in ("num_heads", "latent_dim", "nope_dim", "value_dim"):
        if row[name] < 1:
            raise CheckpointError(f"{where}: {name}: found {row[name]}, expected a number from 1 on")
    if row["num_kv_heads"] != 1:
        raise CheckpointError(
            f"{where}: found {row['num_kv_heads']} KV heads, expected one for all with latent attention"
        )
    if rotary < 0 or rotary % 2 or rotary_dim not in (None, rotary):
        raise CheckpointError(
            f"{where}: found {rotary} dimensions of a key beside {latent} latent ones, expected "
            + (f"{rotary_dim}, which are rotated" if rotary_dim is not None else "an even number")
        )
