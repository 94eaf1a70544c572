"""Rotary frequencies from a checkpoint's configuration: plain, linear and llama3 scalings."""

import math

from pagellm.engine.errors import CheckpointError
from pagellm.engine.models.fields import Fields


def frequencies(rotary_dim: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i / rotary_dim) for each pair i of rotated dimensions (Su et al. 2021)."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(f"rotary embeddings: found {rotary_dim} dimensions, expected an even number")
    return tuple(theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2))


def scaled(plain: tuple[float, ...], scaling: Fields | None) -> tuple[float, ...]:
    """Frequencies under the `rope_scaling` (or `rope_parameters`) section of a Hugging Face config."""
    if scaling is None:
        return plain
    key = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.choice(key, {"default": "default", "linear": "linear", "llama3": "llama3"}, "default")
    if kind == "default":
        return plain
    factor = scaling.number("factor")
    if kind == "linear":
        return tuple(frequency / factor for frequency in plain)
    return _llama3(plain, factor, scaling)


def _llama3(plain: tuple[float, ...], factor: float, scaling: Fields) -> tuple[float, ...]:
    """Llama 3.1's scaling: long waves are stretched by the factor, short ones kept, those between mixed."""
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    original = scaling.integer("original_max_position_embeddings")
    if high <= low:
        raise scaling.error("high_freq_factor", high, f"more than low_freq_factor, {low}")
    result = []
    for frequency in plain:
        periods = original * frequency / (2 * math.pi)
        keep = min(max((periods - low) / (high - low), 0.0), 1.0)
        result.append(frequency * keep + frequency / factor * (1 - keep))
    return tuple(result)
