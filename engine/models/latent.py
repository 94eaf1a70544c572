"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): its sizes, and what parts are made of.

Knows how rows of its tensors become parts of the step (`kernels.latent`); which keys and names the files have
for it is read in `hub_latent` and `gguf_latent`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pagellm.engine.models.fields import Fields
from pagellm.engine.models.spec import Source
from pagellm.kernels.architecture import Part

# Every head has sources of its own: a hostile file cannot ask for endless work.
_MOST_HEADS = 1 << 16


class Sizes(NamedTuple):
    """The numbers of a model's latent attention. query_rank: None where queries are not compressed."""

    num_heads: int
    query_rank: int | None
    latent_dim: int  # what keys and values are made of
    nope_dim: int  # of a query's and a key's dimensions those that are not rotated,
    rotary_dim: int  # and those that are
    value_dim: int

    def features(self, epsilon: float, score_factor: float) -> dict[str, Any]:
        """Of the layers. epsilon: of the norms of what is compressed; score_factor: of scores, besides."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": 1,
            "head_dim": self.rotary_dim + self.latent_dim,
            "attention_scale": (self.nope_dim + self.rotary_dim) ** -0.5 * score_factor,
            "latent_dim": self.latent_dim,
            "nope_dim": self.nope_dim,
            "value_dim": self.value_dim,
            "query_rank": self.query_rank or 0,
            "latent_epsilon": epsilon,
        }

    def check(self, fields: Fields, heads_name: str, num_layers: int, rotary_name: str) -> None:
        """Raises `CheckpointError` for what no model can have."""
        if self.rotary_dim % 2:
            raise fields.error(rotary_name, self.rotary_dim, "an even number")
        if self.num_heads * num_layers > _MOST_HEADS:
            expected = f"at most {_MOST_HEADS // num_layers} in each of {num_layers} layers"
            raise fields.error(heads_name, self.num_heads, expected)


def sources(
    part: Part, tensors: list[str], shape: tuple[int, ...], row: Any, paired: bool, split: bool
) -> Iterator[Source] | None:
    """The tensors of a part of a layer with latent attention, or of its bias; None of a part like any other.

    tensors: for qkv those of the queries and of what is kept; for key_up and value_up one that has for each
    head the rows of its key and then those of its value, or, where `split`, one each, with a matrix a head.
    shape: of the part. paired: as in `Decoder`; what is rotated are the last dimensions of a query and of
    what is kept.
    """
    name = part.name.removesuffix("_b")
    if name not in ("qkv", "query_up", "key_up", "value_up"):
        return None
    heads, rank, latent = (int(row[one]) for one in ("num_heads", "query_rank", "latent_dim"))
    nope, value = int(row["nope_dim"]), int(row["value_dim"])
    rotary = int(row["head_dim"]) - latent
    queries = Source(
        tensors[0],
        (heads * (nope + rotary), *(shape[1:])),
        paired_heads=heads if paired else 0,
        rotary_dim=rotary if paired else 0,
        rotary_start=nope if paired else 0,
    )
    if name == "query_up":
        return iter([queries])
    if name == "qkv":
        kept = (latent + rotary, *shape[1:])
        first = Source(tensors[0], (rank, *shape[1:])) if rank else queries
        rotated = Source(tensors[1], kept, rows=((latent, latent + rotary),), paired_heads=int(paired))
        return iter([first, rotated, Source(tensors[1], kept, rows=((0, latent),))])
    if split:
        own = (latent, nope) if name == "key_up" else (value, latent)
        return (Source(tensors[0], own, stack=(head, heads)) for head in range(heads))
    whole = (heads * (nope + value), latent)
    starts = range(0, whole[0], nope + value)
    if name == "key_up":
        return (
            Source(tensors[0], whole, transposed=True, inputs_taken=(start, start + nope)) for start in starts
        )
    return (Source(tensors[0], whole, rows=((start + nope, start + nope + value),)) for start in starts)
