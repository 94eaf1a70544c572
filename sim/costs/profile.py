"""A profile: tables of measured step times, and the cost model that reads between their lines.

A profile is a JSON object:

    {"format": "pagellm-profile", "version": 1,
     "model": "...", "quantization": "int8", "num_threads": 2, "machine": "...",    what was measured
     "block_size": 16, "block_bytes": 368640,           tokens and bytes of a KV block
     "num_blocks": 4096, "max_model_len": 8192,         blocks that there were, and the model's context
     "window": 0,                                       the widest of the model's layers; 0 where one sees all
     "prefill": {"chunk_tokens": [...],                 of one sequence, computed in one step
                 "context_tokens": [...],               of the same sequence, computed before
                 "seconds": [[...], ...]},              a row for each of chunk_tokens
     "decode": {"num_sequences": [...],                 one token of each
                "context_tokens": [...],                before that token, on average
                "seconds": [[...], ...]},               a row for each of num_sequences
     "mixed": {"chunk_tokens": [...],                   one chunk without context
               "num_sequences": [...],                  that decode in the same step
               "context_tokens": 256,                   of each of these
               "seconds": [[...], ...]},                a row for each of chunk_tokens
     "overhead": {"step_s": x, "sequence_s": x},        of scheduling and sampling
     "transfer": {"copy_block_s": x, "swap_block_s": x},
     "fit": {"num_steps": 60, "mean_error": x,          how far these times were from those of other steps,
             "p90_error": x, "mean_signed_error": x}}   relative to them; more, for people: see calibrate.py

Axes increase and have two points or more. "mixed" may be missing; the two parts of a step then add up. So may
"num_blocks", "max_model_len", "window" and "fit", which are then not known.
"""

import json
import os
import warnings
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pagellm.engine.checks import LARGEST, number
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, ProfileError
from pagellm.engine.scheduling.batch import PreemptionCosts, ScheduledBatch
from pagellm.sim.costs.cost_model import CostModel, StepTimeError, decode_contexts, shape_of
from pagellm.sim.fields import Fields, read_json
from pagellm.sim.outputs import write_whole

FORMAT = "pagellm-profile"
VERSION = 1


class Table:
    """Seconds on a grid of two axes, bilinear between its points.

    Outside of the grid it goes on as in the nearest cell, counts that in `num_outside`, and warns once.
    """

    def __init__(self, name: str, xs: list[float], ys: list[float], rows: list[list[float]]) -> None:
        self.name = name
        self.xs, self.ys, self.rows = xs, ys, rows
        self.num_outside = 0

    def __call__(self, x: float, y: float) -> float:
        xs, ys = self.xs, self.ys
        if not (xs[0] <= x <= xs[-1] and ys[0] <= y <= ys[-1]):
            self._note_outside(x, y)
        i = bisect_right(xs, x, 1, len(xs) - 1)
        j = bisect_right(ys, y, 1, len(ys) - 1)
        low, high = self.rows[i - 1], self.rows[i]
        u = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
        v = (y - ys[j - 1]) / (ys[j] - ys[j - 1])
        below = low[j - 1] + v * (low[j] - low[j - 1])
        above = high[j - 1] + v * (high[j] - high[j - 1])
        return below + u * (above - below)

    def _note_outside(self, x: float, y: float) -> None:
        if self.num_outside == 0:
            measured = f"{self.xs[0]:g} to {self.xs[-1]:g} by {self.ys[0]:g} to {self.ys[-1]:g}"
            warnings.warn(
                f"{self.name}: asked for {x:g} by {y:g}, measured {measured}; continued linearly",
                stacklevel=4,
            )
        self.num_outside += 1


@dataclass(frozen=True)
class _Overheads:
    step_s: float
    sequence_s: float
    copy_block_s: float
    swap_block_s: float


class ProfileCostModel(CostModel):
    """Step times from a profile.

    Several chunks of one step count as one of as many tokens, with the context that gives it as many pairs of
    a query and a key. A step with decodes as well takes what both parts take alone, less what the table of
    mixed steps says is saved, and never less than the longer part. Blocks of another size than the measured
    ones are moved in time proportional to their size.

    path: its file, if it is from one. Raises `ProfileError`.
    """

    def __init__(self, profile: dict[str, Any], path: str | None = None) -> None:
        self.place = path
        place = "profile" if path is None else path
        fields = Fields(profile, place, ProfileError, name="profile")
        check_version(fields)
        self._profile = profile
        self.model = self.model_name = fields.text("model")
        self.name = ", ".join(
            (
                self.model,
                fields.text("quantization"),
                f"{fields.integer('num_threads')} threads",
                fields.text("machine"),
            )
        )
        self.block_size = fields.integer("block_size")
        self._measured_block_bytes = fields.integer("block_bytes")
        self._num_blocks, self.max_model_len = (
            fields.integer(name) if fields.has(name) else None for name in ("num_blocks", "max_model_len")
        )
        self.window = fields.integer("window", 0) if fields.has("window") else None
        if fields.has("fit"):
            self.error = _error_of(fields.section("fit"))
        else:
            self.name += ", of unknown error"
        self._prefill = read_table(fields, "prefill", "chunk_tokens", "context_tokens")
        self._decode = read_table(fields, "decode", "num_sequences", "context_tokens")
        self._least_decode_s = min(map(min, self._decode.rows))
        self._saved = self._read_saved(fields) if fields.has("mixed") else None
        overhead, transfer = fields.section("overhead"), fields.section("transfer")
        self._measured = _Overheads(
            overhead.seconds("step_s"),
            overhead.seconds("sequence_s"),
            transfer.seconds("copy_block_s"),
            transfer.seconds("swap_block_s"),
        )
        self._window = self.window or 0
        self._begin(1.0)

    @classmethod
    def from_file(cls, path: Path) -> "ProfileCostModel":
        """A model from a file. Warns if that does not say how right it is. Raises `ProfileError`."""
        model = cls(read_json(path, "a profile", ProfileError), str(path))
        if model.error is None:
            warnings.warn(f"{path}: found no fit: how right its step times are is unknown", stacklevel=2)
        return model

    def begin(self, config: EngineConfig, num_replicas: int = 1) -> None:
        for name, found, no_wish in (
            ("quantization", config.quantization, "auto"),
            ("num_threads", config.num_threads, None),
        ):
            if found not in (no_wish, self._profile[name]):
                raise ConfigError(
                    f"{name}: found {found!r}, expected {self._profile[name]!r}, as in the profile"
                )
        self._window = config.window or 0
        self._begin(config.block_size / self.block_size)

    def block_bytes(self, block_size: int) -> int:
        return self._measured_block_bytes * block_size // self.block_size

    def num_blocks(self, config: EngineConfig) -> int | None:
        if self._num_blocks is None:
            return None
        return max(1, self._num_blocks * self.block_size // config.block_size)

    def step_time(self, batch: ScheduledBatch) -> float:
        num_decodes, context, prefills = shape_of(batch, self._window)
        total = self._measured.step_s + self._measured.sequence_s * len(batch.sequences)
        if batch.transfers:
            total += self.transfer_time(batch, self._copy_block_s)
        decode_s = self._decode(num_decodes, context / num_decodes) if num_decodes else 0.0
        if not prefills:
            return total + max(0.0, decode_s)
        chunk, context_before = _as_one_chunk(prefills)
        prefill_s = self._prefill(chunk, context_before)
        both_s = prefill_s + decode_s
        if num_decodes and self._saved is not None:
            both_s -= self._saved(chunk, num_decodes)
        return total + max(0.0, prefill_s, decode_s, both_s)

    def stride_times(self, batch: ScheduledBatch, duration_s: float, most: int, span_s: float) -> list[float]:
        """Steps whose shapes lie within what was measured; each other one is looked up, and counted."""
        decode, count = self._decode, len(batch.sequences)
        if not decode.xs[0] <= count <= decode.xs[-1]:
            return []
        total = self._measured.step_s + self._measured.sequence_s * count
        least_s = total + self._least_decode_s
        num_more = most - 1
        if least_s > 0:
            num_more = int(min(num_more, (span_s - duration_s) / least_s + 1))
        times = [duration_s]
        for context in decode_contexts(batch, self._window, num_more):
            if not decode.ys[0] <= context / count <= decode.ys[-1]:
                break
            times.append(total + max(0.0, decode(count, context / count)))
        return times

    @property
    def extrapolated(self) -> int:
        return sum(table.num_outside for table in self._tables)

    @property
    def _tables(self) -> list[Table]:
        return [self._prefill, self._decode] + ([self._saved] if self._saved else [])

    def _begin(self, block_scale: float) -> None:
        for table in self._tables:
            table.num_outside = 0
        self._copy_block_s = self._measured.copy_block_s * block_scale
        chunk = self._prefill.xs[-1]
        recompute_token_s = self._prefill(chunk, self._prefill.ys[0]) / chunk
        self.costs = PreemptionCosts(recompute_token_s, self._measured.swap_block_s * block_scale)

    def _read_saved(self, profile: Fields) -> Table:
        """What mixed steps take less than their two parts alone."""
        table = read_table(profile, "mixed", "chunk_tokens", "num_sequences")
        context = profile.section("mixed").integer("context_tokens")
        saved = [
            [
                self._prefill(chunk, 0) + self._decode(number, context) - together
                for number, together in zip(table.ys, row, strict=True)
            ]
            for chunk, row in zip(table.xs, table.rows, strict=True)
        ]
        return Table(table.name, table.xs, table.ys, saved)


def write_profile(profile: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a profile, whole or not at all. Raises `ProfileError`."""
    text = json.dumps(profile, indent=1, allow_nan=False) + "\n"
    write_whole("profile", path, text, ProfileError)


def check_version(profile: Fields) -> None:
    """Raises `ProfileError` for what is no profile of this version."""
    for field, expected in (("format", FORMAT), ("version", VERSION)):
        if profile.get(field) != expected:
            raise profile.bad(field, profile.get(field), repr(expected))


def read_table(profile: Fields, name: str, x_name: str, y_name: str) -> Table:
    """A table of a profile by the names of its axes. Raises `ProfileError`."""
    part = profile.section(name)
    xs, ys = (_axis(part, axis) for axis in (x_name, y_name))
    rows = part.get("seconds")
    if not isinstance(rows, list) or len(rows) != len(xs):
        raise part.bad("seconds", rows, f"{len(xs)} rows, one for each of {x_name}")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(ys):
            raise part.bad(f"seconds[{i}]", row, f"{len(ys)} numbers, one for each of {y_name}")
        for j, value in enumerate(row):
            expected = "a finite number of seconds from 0"
            number(f"{part.place}: {name}.seconds[{i}][{j}]", value, 0, None, ProfileError, expected)
    return Table(f"{part.place}: {name} ({x_name} by {y_name})", xs, ys, rows)


def _error_of(fit: Fields) -> StepTimeError:
    return {
        "mean": fit.number("mean_error"),
        "p90": fit.number("p90_error"),
        "mean_signed": fit.number("mean_signed_error", None),
        "num_steps": fit.integer("num_steps"),
    }


def _axis(part: Fields, name: str) -> list[float]:
    values = part.get(name)
    are_numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
    if not are_numbers or len(values) < 2 or not all(0 <= a < b < LARGEST for a, b in pairwise(values)):
        raise part.bad(name, values, "two or more increasing numbers from 0")
    return list(values)


def _as_one_chunk(prefills: list[tuple[int, int]]) -> tuple[int, float]:
    """(tokens, tokens before them) of one chunk that costs as much as several."""
    if len(prefills) == 1:
        return prefills[0]
    tokens = sum(count for count, _ in prefills)
    pairs = sum(count * (before + count / 2) for count, before in prefills)
    return tokens, max(0.0, pairs / tokens - tokens / 2)
