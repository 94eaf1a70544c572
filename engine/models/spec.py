"""What an architecture's file says about a checkpoint: a `ModelSpec`, the only thing the loader reads.

Knows the parts of the compiled step and which tensors each is made of; does not know how tensors are stored
or how the kernels lay them out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import rope


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint and how its rows become output columns of a part.

    shape: as the checkpoint stores it, [outputs, inputs], or [inputs, outputs] where `transposed`; one number
    for vectors. paired_heads: the rows of each of so many heads are stored as rotary pairs (0, 1),
    (2, 3), ... and not as (0, D/2), (1, D/2 + 1), ...
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    paired_heads: int = 0


# A part of the step to the tensors that are stacked, along the outputs, to make it. Parts that are not named
# (biases) are zeros.
Parts = Mapping[str, tuple[Source, ...]]


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of the GPT-2 or Llama family, whatever its checkpoint called things.

    activation: "silu_gated", "gelu_tanh", "gelu" or "relu". rope_frequencies: radians a position for each
    rotated pair of dimensions, scaling included, or None where positions are learned. Parts of a layer:
    attention_norm, qkv, output, mlp_norm, up (the gate before it where gated), down; of the rest: embedding,
    position_embedding, final_norm, lm_head (absent where tied to the embedding); each with a bias "_b" except
    the embeddings. sliding_window: tokens that attention sees in some layers; up to so many it is full
    attention, and max_positions is no more. repeated: tensors whose values another one has, or the other
    fields have.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    layer_norm: bool
    norm_epsilon: float
    activation: str
    attention_scale: float
    rope_frequencies: tuple[float, ...] | None
    layers: tuple[Parts, ...] = field(repr=False)
    rest: Parts = field(repr=False)
    sliding_window: int | None = None
    repeated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.architecture}: {self.num_heads} attention heads cannot share {self.num_kv_heads} KV "
                "heads; expected a multiple"
            )
        rope.check(self.rope_frequencies or (), self.architecture)
        rotary_dim = 2 * len(self.rope_frequencies or ())
        if rotary_dim > self.head_dim:
            raise CheckpointError(
                f"{self.architecture}: {rotary_dim} dimensions of a head are rotated, expected at most "
                f"{self.head_dim}, its size"
            )

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return "lm_head" not in self.rest
