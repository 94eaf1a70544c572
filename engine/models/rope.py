"""Rotary embeddings from a checkpoint's configuration: plain, linear and llama3 scalings."""

import math
import re
from dataclasses import dataclass

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models.fields import Fields

# What transformers takes where a config.json names none.
DEFAULT_THETA = 10000.0

# Keys of a section that belong to other scalings than its own; transformers passes over them.
_OTHER_SCALINGS = re.compile(
    "type|factor|original_max_position_embeddings|attention_factor|beta_fast|beta_slow|short_factor"
    "|long_factor|low_freq_factor|high_freq_factor|mscale|mscale_all_dim|truncate|mrope_section|finetuned"
)


@dataclass(frozen=True)
class RopeTable:
    """How one kind of layer turns its queries and keys by their position (Su et al. 2021).

    frequencies: radians a position for each pair of dimensions, scaling included. attention_factor: what
    queries and keys are multiplied by where they are rotated (YaRN, Peng et al. 2023). query_scale: (beta,
    original): whole queries are multiplied by 1 + beta * log(1 + floor(position / original)).
    """

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    query_scale: tuple[float, int] | None = None

    @property
    def rotary_dim(self) -> int:
        """The dimensions of a head that are rotated: its first ones."""
        return 2 * len(self.frequencies)

    def check(self, where: str) -> None:
        """Refuses frequencies with which a position's angle means nothing.

        Above a whole turn a position, float32 angles of far positions have no exact digits left.
        """
        for index, frequency in enumerate(self.frequencies):
            if not 0 < frequency <= 2 * math.pi:
                raise CheckpointError(
                    f"{where}: rotary pair {index}: found {frequency:.6g} radians a position, expected more "
                    "than 0 and at most a whole turn"
                )


def frequencies(rotary_dim: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i / rotary_dim) for each pair i of rotated dimensions (Su et al. 2021)."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(f"rotary embeddings: found {rotary_dim} dimensions, expected an even number")
    if theta < 1:
        raise CheckpointError(f"rotary embeddings: found theta {theta}, expected a number from 1 on")
    return tuple(theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2))


def of_config(fields: Fields, head_dim: int, max_positions: int) -> RopeTable:
    """The rotary embeddings that transformers computes from a config.json of the Llama family.

    Its rules: a `rope_scaling` that is not empty replaces `rope_parameters`; what a section does not say, the
    top level says; for llama3 the top level's `original_max_position_embeddings` goes first; plain rotary
    embeddings rotate whole heads, whatever `partial_rotary_factor` says. Where one section would drop what
    the other says, both are named instead.
    """
    current, legacy = fields.section("rope_parameters"), fields.section("rope_scaling")
    section = legacy or current or Fields(fields.path, {}, "rope_parameters.")
    fields.get("rope_theta")  # known, even where the section's goes first
    has_theta = "rope_theta" in section.values
    theta = section.number("rope_theta") if has_theta else fields.number("rope_theta", DEFAULT_THETA)
    key = "rope_type" if "rope_type" in section.values else "type"
    kind = section.choice(key, {"default": "default", "linear": "linear", "llama3": "llama3"}, "default")
    if current is not None and legacy is not None:
        _check_agreement(current, legacy, theta)
    partial = fields.get("partial_rotary_factor")
    partial = section.get("partial_rotary_factor", partial)
    if kind != "default" and partial is not None and partial != 1:
        raise section.error("partial_rotary_factor", partial, f"none beside {key} {kind}")
    plain = frequencies(head_dim, theta)
    original = fields.get("original_max_position_embeddings")
    if kind == "linear":
        factor = section.number("factor")
        plain = tuple(frequency / factor for frequency in plain)
    elif kind == "llama3":
        where = section if original is None else fields
        plain = _llama3(plain, section, where.integer("original_max_position_embeddings", max_positions))
    section.refuse_others(_OTHER_SCALINGS, f"rope_type {kind}")
    return RopeTable(plain)


def _check_agreement(current: Fields, legacy: Fields, theta: float) -> None:
    """Refuses `rope_parameters` that say anything but the default where `rope_scaling` replaces them."""
    replaced = {"rope_type": legacy.get("type", "default"), "rope_theta": theta} | dict(legacy.values)
    for name, value in current.values.items():
        if value is not None and value != "default" and value != replaced.get(name):
            raise current.error(
                name,
                value,
                f"{found(replaced.get(name))}, as rope_scaling has it, which is there, too",
            )


def _llama3(plain: tuple[float, ...], section: Fields, original: int) -> tuple[float, ...]:
    """Llama 3.1's scaling: long waves are stretched by the factor, short ones kept, those between mixed."""
    factor = section.number("factor")
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.error("high_freq_factor", high, f"more than low_freq_factor, {low}")
    result = []
    for frequency in plain:
        periods = original * frequency / (2 * math.pi)
        keep = min(max((periods - low) / (high - low), 0.0), 1.0)
        result.append(frequency * keep + frequency / factor * (1 - keep))
    return tuple(result)
