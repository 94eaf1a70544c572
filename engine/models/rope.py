"""Rotary embeddings (Su et al. 2021): a table of frequencies, and how scalings for longer contexts change it.

Knows the arithmetic; which of it a checkpoint asks for is read in `hub_rope` and `gguf_rope`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pagellm.engine.errors import CheckpointError

# What transformers and llama.cpp take where a checkpoint names none.
DEFAULT_THETA = 10000.0
# YaRN's bounds, in turns over the original context, where a checkpoint names none.
BETA_FAST, BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class RopeTable:
    """How one kind of layer turns its queries and keys by their position.

    frequencies: radians a position for each pair of dimensions, scaling included; 0 where a pair does not
    turn. attention_factor: what queries and keys are multiplied by where they are rotated (YaRN).
    query_scale: (beta, original): whole queries are multiplied by
    1 + beta * log(1 + floor(position / original)). max_positions: the context that a scaling is made for,
    where that can be longer than the model's own; otherwise 0.
    """

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    query_scale: tuple[float, int] | None = None
    max_positions: int = 0

    @property
    def rotary_dim(self) -> int:
        """The dimensions of a head that are rotated: its first ones."""
        return 2 * len(self.frequencies)

    def at(self, max_model_len: int) -> "RopeTable":
        """The table with which sequences of up to `max_model_len` tokens are computed, all of them."""
        return self

    def choice(self, max_model_len: int) -> str:
        """What there is to say about `at`; empty where the length does not matter."""
        return ""

    def check(self, where: str) -> None:
        """Refuses frequencies with which a position's angle means nothing.

        Above a whole turn a position, float32 angles of far positions have no exact digits left.
        """
        for index, frequency in enumerate(self.frequencies):
            if not 0 <= frequency <= 2 * math.pi:
                raise CheckpointError(
                    f"{where}: rotary pair {index}: found {frequency:.6g} radians a position, expected 0 to "
                    "a whole turn"
                )


@dataclass(frozen=True, kw_only=True)
class LongRope(RopeTable):
    """LongRoPE (Ding et al. 2024): other frequencies for contexts that are longer than the original one.

    transformers chooses by the length that a sequence has so far, and computes with keys of both kinds once
    it grows past the original context. Here the frequencies are those of the longest sequence that may come,
    so that a token's key is the same for every sequence; llama.cpp chooses by its context size, too.
    """

    long_frequencies: tuple[float, ...]
    original: int

    def at(self, max_model_len: int) -> RopeTable:
        chosen = self.long_frequencies if max_model_len > self.original else self.frequencies
        return RopeTable(chosen, self.attention_factor, self.query_scale, self.max_positions)

    def choice(self, max_model_len: int) -> str:
        if max_model_len > self.original:
            return (
                f"LongRoPE: every sequence is computed with the long factors, because max_model_len "
                f"{max_model_len} is beyond {self.original}; up to that, the short ones serve"
            )
        return f"LongRoPE: max_model_len {max_model_len} is served with the short factors"

    def check(self, where: str) -> None:
        super().check(where)
        RopeTable(self.long_frequencies).check(f"{where}: long factors")


@dataclass(frozen=True, kw_only=True)
class DynamicRope(RopeTable):
    """Dynamic NTK scaling: the longer the context, the slower the turns.

    transformers lets the frequencies follow a sequence as it grows, whose earlier keys stay as they were.
    Here they are those of the longest sequence that may come, for every sequence.
    """

    theta: float
    original: int
    factor: float

    def at(self, max_model_len: int) -> RopeTable:
        if max_model_len <= self.original:
            return RopeTable(self.frequencies, max_positions=self.max_positions)
        dim = self.rotary_dim
        stretched = self.factor * max_model_len / self.original - (self.factor - 1)
        theta = self.theta * stretched ** (dim / (dim - 2))
        return RopeTable(frequencies(dim, theta), max_positions=self.max_positions)

    def choice(self, max_model_len: int) -> str:
        if max_model_len <= self.original:
            return (
                f"Dynamic NTK scaling: none, because max_model_len {max_model_len} is within {self.original}"
            )
        return f"Dynamic NTK scaling: every sequence is computed as one of max_model_len {max_model_len}"


def plain(rotary_dim: int, theta: float = DEFAULT_THETA) -> RopeTable:
    """Rotary embeddings without scaling, of a head's first `rotary_dim` dimensions."""
    return RopeTable(frequencies(rotary_dim, theta))


def frequencies(rotary_dim: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i / rotary_dim) for each pair i of rotated dimensions.

    Of an odd number, which a part of a head can be, the last one's partner is the dimension behind.
    """
    if rotary_dim < 1:
        raise CheckpointError(f"rotary embeddings: found {rotary_dim} dimensions, expected at least one")
    if theta < 1:
        raise CheckpointError(f"rotary embeddings: found theta {theta}, expected a number from 1 on")
    return tuple(theta ** (-2.0 * i / rotary_dim) for i in range((rotary_dim + 1) // 2))


def proportional(head_dim: int, theta: float, share: float, factor: float) -> tuple[float, ...]:
    """Of all pairs of a head, of which only the first ones turn, a share of them (Gemma 4).

    Raises `CheckpointError` if that share is more than the head.
    """
    turning = int(share * head_dim // 2)
    if turning > head_dim // 2:
        raise CheckpointError(f"rotary embeddings: found a share of {share} of a head, expected at most 1")
    turned = linear(frequencies(head_dim, theta)[:turning], factor)
    return turned + (0.0,) * (head_dim // 2 - turning)


def linear(plain: Sequence[float], factor: float) -> tuple[float, ...]:
    """Positions divided by the factor (Chen et al. 2023)."""
    return tuple(frequency / factor for frequency in plain)


def llama3(
    plain: Sequence[float], factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Llama 3.1's scaling: long waves are stretched by the factor, short ones kept, those between mixed.

    low, high: turns over the original context, below and above which a wave is long or short.
    """
    result = []
    for frequency in plain:
        turns = original * frequency / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        result.append(frequency * keep + frequency / factor * (1 - keep))
    return tuple(result)


def yarn(
    rotary_dim: int,
    theta: float,
    factor: float,
    original: int,
    beta_fast: float = BETA_FAST,
    beta_slow: float = BETA_SLOW,
    truncate: bool = True,
    extrapolation: float = 1.0,
) -> tuple[float, ...]:
    """YaRN (Peng et al. 2023): stretched by the factor where a pair turns less than `beta_slow` times.

    The turns are those over the original context; a pair that turns more than `beta_fast` times is kept, and
    pairs between are mixed by their index. truncate: the two bounds are rounded outwards to whole pairs.
    extrapolation: how much of a kept pair is kept. Raises `CheckpointError` if there are no such bounds.
    """

    def pair(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    kept = frequencies(rotary_dim, theta)
    low, high = (pair(beta_fast), pair(beta_slow)) if theta > 1 else (1.0, 0.0)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if high < low or rotary_dim % 2:
        raise CheckpointError(
            f"YaRN: found {rotary_dim} dimensions, theta {theta}, an original context of {original} and "
            f"bounds of {beta_fast} and {beta_slow} turns, expected some with pairs between them"
        )
    width = high - low or 0.001
    result = []
    for i, frequency in enumerate(kept):
        keep = (1 - min(max((i - low) / width, 0.0), 1.0)) * extrapolation
        result.append(frequency / factor * (1 - keep) + frequency * keep)
    return tuple(result)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by, to sharpen attention over a longer context."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original: int) -> float:
    """What LongRoPE multiplies queries and keys by; raises `CheckpointError` if nothing is defined."""
    if original < 2:
        raise CheckpointError(f"LongRoPE: found an original context of {original} tokens, expected 2 or more")
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def divided(plain: Sequence[float], divisors: Sequence[float]) -> tuple[float, ...]:
    """Each frequency by a divisor of its own."""
    return tuple(f / d for f, d in zip(plain, divisors, strict=True))
