"""Rotary embeddings as a GGUF file describes them, by the rules of llama.cpp (`llama_context`, `ggml_rope`).

Knows keys and tensors; the arithmetic is in `rope`.
"""

import math

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import rope
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.rope import RopeTable

_DIVISORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# Tensors that are read here and not by the loader.
TENSORS = (_DIVISORS, _LONG, _SHORT)

# A divisor from which on a pair does not turn.
STILL = 1e30
_KINDS = {kind: kind for kind in ("none", "linear", "yarn", "longrope")}


def table(
    checkpoint: Checkpoint,
    fields: Fields,
    head_dim: int,
    max_positions: int,
    *,
    partial: bool = False,
    scales_queries: bool = False,
    scales_scores: bool = False,
) -> RopeTable:
    """The rotary embeddings of the layers that see everything.

    max_positions: the file's context_length. partial: whether the architecture rotates a part of a head where
    rope.dimension_count says so. scales_queries: whether it obeys attention.temperature_scale. scales_scores:
    whether YaRN's log_multiplier is for `score_factor`, and nothing to do with magnitudes. Keys of YaRN are
    obeyed for every architecture; llama.cpp reads some of them for a few alone. Raises `CheckpointError`.
    """
    dim = fields.integer("rope.dimension_count", head_dim)
    if dim % 2 or dim > head_dim or not (partial or dim == head_dim):
        expected = head_dim if dim != head_dim and not partial else f"an even number up to {head_dim}"
        raise fields.error("rope.dimension_count", dim, str(expected))
    theta = fields.number("rope.freq_base", rope.DEFAULT_THETA)
    kind = fields.choice("rope.scaling.type", _KINDS, "linear")
    original = fields.integer("rope.scaling.original_context_length", max_positions, 1 << 30)
    factor = _factor(fields, kind)
    magnitude = fields.number("rope.scaling.attn_factor", 1.0)
    turned, reach = rope.linear(rope.frequencies(dim, theta), factor), 0
    if kind == "yarn":
        turned, own = _yarn(fields, dim, theta, factor, original, scales_scores)
        magnitude *= own
        reach = int(factor * original)
    query_scale = None
    if scales_queries and fields.has("attention.temperature_scale"):
        query_scale = fields.number("attention.temperature_scale"), original
    short, long, divisors = (_read(checkpoint, name, dim // 2) for name in (_SHORT, _LONG, _DIVISORS))
    if divisors is not None and (short or long):
        raise CheckpointError(f"{checkpoint.path}: tensor {_DIVISORS}: found beside {_LONG}, expected one")
    if divisors is not None:
        turned = rope.divided(turned, divisors)
    if short is None and long is None:
        return RopeTable(turned, magnitude, query_scale, reach)
    if short is None or long is None:
        missing = _SHORT if short is None else _LONG
        raise CheckpointError(f"{checkpoint.path}: tensor {missing} is missing beside the other factors")
    return rope.LongRope(
        rope.divided(turned, short),
        magnitude,
        query_scale,
        reach,
        long_frequencies=rope.divided(turned, long),
        original=original,
    )


def score_factor(fields: Fields, table: RopeTable) -> float:
    """What scores of architecture deepseek2 are multiplied by for YaRN's sake.

    Its files have a tenth of the logarithm's multiplier that others have, and no other scaling.
    """
    kind = fields.choice("rope.scaling.type", _KINDS, "linear")
    factor = _factor(fields, kind)
    if kind != "yarn":
        if factor != 1.0:
            raise fields.error("rope.scaling.factor", factor, "1, or rope.scaling.type yarn")
        return table.attention_factor**2
    name = "rope.scaling.yarn_log_multiplier"
    weight = 10 * fields.number(name) if fields.number_or_zero(name) else 0.0
    return (table.attention_factor * rope.yarn_magnitude(factor, weight)) ** 2


def _factor(fields: Fields, kind: str) -> float:
    """What positions are divided by: the new key goes first, and 0 is no scaling."""
    old, new = fields.get("rope.scale_linear", 0), fields.get("rope.scaling.factor")
    name, value = ("rope.scale_linear", old) if new is None else ("rope.scaling.factor", new)
    if kind == "none" or (isinstance(value, int | float) and value == 0):
        return 1.0
    return fields.number(name)


def _yarn(
    fields: Fields, dim: int, theta: float, factor: float, original: int, scales_scores: bool
) -> tuple[tuple[float, ...], float]:
    """YaRN's frequencies, and what queries and keys are multiplied by."""

    def number(name: str, default: float) -> float:
        value = fields.get(f"rope.scaling.yarn_{name}", default)
        is_zero = isinstance(value, int | float) and value == 0
        return 0.0 if is_zero else fields.number(f"rope.scaling.yarn_{name}", default)

    asked = fields.get("rope.scaling.yarn_ext_factor")
    is_unset = isinstance(asked, int | float) and asked < 0
    extrapolation = 1.0 if is_unset else number("ext_factor", 1.0)
    turned = rope.yarn(
        dim,
        theta,
        factor,
        original,
        fields.number("rope.scaling.yarn_beta_fast", rope.BETA_FAST),
        fields.number("rope.scaling.yarn_beta_slow", rope.BETA_SLOW),
        extrapolation=extrapolation,
    )
    weight = number("log_multiplier", 0.0)
    # llama.cpp obeys this key for frequencies that are not interpolated by YaRN, and else computes its own.
    said = fields.number("rope.scaling.yarn_attn_factor", 1.0)
    if extrapolation == 0:
        return turned, said
    magnitude = rope.yarn_magnitude(factor)
    if weight:
        magnitude = 1.0 if scales_scores else magnitude / rope.yarn_magnitude(factor, weight)
    return turned, magnitude


def _read(checkpoint: Checkpoint, name: str, size: int) -> list[float] | None:
    """A divisor for each frequency, if the file has such a tensor."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        return None
    if tensor.shape != (size,):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} has shape {tensor.shape}, expected ({size},)"
        )
    divisors: list[float] = tensor.rows(0, size).tolist()
    for index, divisor in enumerate(divisors):
        if not 0 < divisor < math.inf:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name}: found {divisor} at {index}, expected a number above zero"
            )
    return [math.inf if divisor >= STILL else divisor for divisor in divisors]
