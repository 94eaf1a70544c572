"""Measures this machine and a model into a profile: the step times that the simulator reads.

Every point of the tables is visited again and again in a changing order until the time is up, so that what
disturbs the machine for a while disturbs few of a point's visits. The first time through goes from coarse to
fine, so that where there is little time, what was not measured lies between what was. At the end, steps of
random shapes that no table has seen are held against the profile. What that gave is its "fit":

    {"passes": how often each point was visited, on average,
     "disturbed_share": of the time that took, in which the machine was slower than it can be,
     "num_steps": held against the profile, "mean_signed_error": predicted / measured - 1,
     "mean_error", "p90_error": of its absolute value}
"""

import platform
import random
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pagellm.engine.errors import ConfigError, RequestError
from pagellm.engine.scheduling.block_manager import TransferKind
from pagellm.sim.calibration.staged_steps import Stage, StepShape
from pagellm.sim.calibration.step_times import StepTimes
from pagellm.sim.costs.profile import FORMAT, VERSION, ProfileCostModel
from pagellm.sim.quantiles import quantiles

if TYPE_CHECKING:
    from pagellm.engine.llm_engine import LLMEngine

DEFAULT_SECONDS = 90.0
# Points of the tables, as far as the engine's settings reach; the ends of that reach are points as well. A
# kernel takes 12 rows at a time, which shows where rows are few.
_CHUNK_TOKENS = (2, 8, 12, 13, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_CHUNK_CONTEXTS = (0, 512, 2048)
_NUM_DECODES = (1, 2, 4, 8, 12, 13, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_DECODE_CONTEXTS = (1, 256, 1024)
_MIXED_CHUNKS = (2, 32, 128, 256, 1024)
_MIXED_DECODES = (1, 8, 32, 128)
_MIXED_CONTEXT = 256
_SPLIT_TOKENS = 16  # of each of several prompts in one step
_FIT_SHARE = 0.15  # of the time


@dataclass(frozen=True)
class _Grid:
    """The points of a table: the shape of a step for each pair of `xs` and `ys`."""

    name: str
    x_name: str
    y_name: str
    xs: list[int]
    ys: list[int]
    shape: Callable[[int, int], StepShape]
    others: dict[str, Any] = field(default_factory=dict)  # of the table in the profile

    def points(self, stage: Stage) -> list[tuple[int, StepShape]]:
        """Those that can be measured, each with how fine a table it belongs to."""
        return [
            (max(_level(i, len(self.xs)), _level(j, len(self.ys))), shape)
            for i, x in enumerate(self.xs)
            for j, y in enumerate(self.ys)
            if stage.fits(shape := self.shape(x, y))
        ]

    def table(self, measured: StepTimes) -> dict[str, Any]:
        """As the profile has it. What was not measured continues its row linearly, else its column.

        Mixed steps have few chunks beside many decodes: there columns are first.

        Raises `ConfigError` if too little was measured for that.
        """
        rows = [[measured.seconds(self.shape(x, y)) for y in self.ys] for x in self.xs]
        first_by_column = self.name == "mixed"
        for is_column in (first_by_column, not first_by_column):
            lines, axis = (_transposed(rows), self.xs) if is_column else (rows, self.ys)
            lines = [_continued(axis, line) for line in lines]
            rows = _transposed(lines) if is_column else lines
        if any(value is None for row in rows for value in row):
            raise ConfigError(
                f"seconds, num_blocks: found too few to measure a table of {self.name} steps, expected more"
            )
        return {self.x_name: self.xs, self.y_name: self.ys, **self.others, "seconds": rows}


def calibrate(
    engine: "LLMEngine",
    *,
    model: str = "",
    seconds: float = DEFAULT_SECONDS,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measures an engine that has nothing to do; returns a profile (see costs/profile.py).

    model: what the profile calls it. seconds: how long this takes, give or take the longest step. progress:
    called with each amount of these that has passed. clock: seconds.

    Raises `ConfigError` for settings with which there is too little to measure, or if the time is too short,
    and `RequestError` if the engine is serving.
    """
    _check(engine, seconds)
    stage, start = Stage(engine, clock), clock()
    deadline = start + seconds
    passed = 0.0

    def time_left(until: float) -> bool:
        nonlocal passed
        now = clock()
        if progress is not None:
            share = min(now - start, seconds)
            progress(share - passed)
            passed = share
        return now < until

    profile = _describe(engine, model)
    stage.time(StepShape(chunks=(stage.max_chunk,)))  # pays for the workspace's memory
    copy_s = stage.transfer_s(TransferKind.COPY)
    can_swap = engine.config.num_swap_blocks > 0
    swap_s = stage.transfer_s(TransferKind.SWAP_OUT, TransferKind.SWAP_IN) if can_swap else copy_s
    measured, grids = StepTimes(), _grids(stage)
    measured.step_s = stage.scheduling_s()
    one_prompt, prompts = _split(stage)
    points = [point for grid in grids for point in grid.points(stage)]
    points += [(0, shape) for shape in (one_prompt, prompts) if stage.fits(shape)]
    passes = _visit(stage, points, measured, lambda: time_left(deadline - _FIT_SHARE * seconds))

    measured.sequence_s = _sequence_s(measured, one_prompt, prompts)
    for grid in grids:
        profile[grid.name] = grid.table(measured)
    profile["overhead"] = {"step_s": measured.step_s, "sequence_s": measured.sequence_s}
    profile["transfer"] = {"copy_block_s": copy_s, "swap_block_s": swap_s}
    fit = _fit(stage, ProfileCostModel(profile), lambda: time_left(deadline))
    return profile | {"fit": {"passes": passes, "disturbed_share": measured.disturbed_share} | fit}


def _check(engine: "LLMEngine", seconds: float) -> None:
    if engine.has_unfinished:
        raise RequestError("engine: found requests under way, expected none while it is measured")
    if type(seconds) not in (int, float) or not 0 < seconds < 1e6:
        raise ConfigError(f"seconds: found {seconds!r}, expected a number above 0")
    config, scheduler = engine.config, engine.scheduler
    if scheduler.policies.prefills_alone:
        raise ConfigError(f"policy: found {config.policy}, expected one whose steps mix prompts and decodes")
    for name, found, least in (
        ("max_num_seqs", config.max_num_seqs, 2),
        ("max_num_batched_tokens", config.max_num_batched_tokens, 4),
        ("max_prefill_chunk", scheduler.limits.max_prefill_chunk, 3),
        ("max_model_len", config.max_model_len, 16),
    ):
        if found < least:
            raise ConfigError(f"{name}: found {found}, expected at least {least} to measure anything")


def _describe(engine: "LLMEngine", model: str) -> dict[str, Any]:
    """What is measured, and the axes of the tables."""
    from pagellm.engine.execution.weights import kv_bytes_per_token

    token_bytes = kv_bytes_per_token(engine.spec.arch, engine.runner.cache.format)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model or engine.spec.architecture,
        "quantization": engine.config.quantization,
        "num_threads": engine.config.num_threads,
        "machine": _processor(),
        "block_size": engine.config.block_size,
        "block_bytes": token_bytes * engine.config.block_size,
        "num_blocks": engine.config.num_blocks,
        "max_model_len": engine.spec.max_positions,
        "window": engine.config.window,
    }


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _grids(stage: Stage) -> list[_Grid]:
    """The tables of prefill and decode steps, and of mixed ones if there can be any of several decodes."""
    longest, context = stage.max_context, _mixed_context(stage)
    chunks = _axis(_CHUNK_TOKENS, 2, stage.max_chunk)
    # The last context leaves room for the shortest chunk, the one before for the longest, or half of all.
    contexts = sorted({*_axis(_CHUNK_CONTEXTS, 0, longest - 2), max(longest - stage.max_chunk, longest // 2)})
    decodes = _axis(_NUM_DECODES, 1, stage.max_decodes)
    # A full step is as many decodes as may be and a chunk, or a chunk and as many decodes as it leaves.
    most = max(1, min(stage.max_decodes - 1, stage.max_tokens - 3))
    last = min(stage.max_chunk, stage.max_tokens - 1)
    mixed_chunks = sorted({*_axis(_MIXED_CHUNKS, 2, last), min(last, stage.max_tokens - most)})
    mixed_decodes = _axis(_MIXED_DECODES, 1, most)
    grids = [
        _Grid(
            "prefill", "chunk_tokens", "context_tokens", chunks, contexts,
            lambda chunk, before: StepShape(chunks=(chunk,), before=before),
        ),
        _Grid(
            "decode", "num_sequences", "context_tokens", decodes, _axis(_DECODE_CONTEXTS, 1, longest),
            lambda number, before: StepShape(decodes=(before,) * number),
        ),
    ]  # fmt: skip
    if most > 1:
        grids.append(
            _Grid(
                "mixed", "chunk_tokens", "num_sequences", mixed_chunks, mixed_decodes,
                lambda chunk, number: StepShape(decodes=(context,) * number, chunks=(chunk,)),
                {"context_tokens": context},
            )
        )  # fmt: skip
    return grids


def _mixed_context(stage: Stage) -> int:
    """Tokens before each decode of the mixed steps: so few that as many sequences fit as may run."""
    return max(1, min(_MIXED_CONTEXT, stage.max_context, stage.max_kv_tokens // (2 * stage.max_decodes)))


def _split(stage: Stage) -> tuple[StepShape, StepShape]:
    """As many tokens of one prompt and of several."""
    number = max(1, min(16, stage.max_decodes, stage.max_chunk // _SPLIT_TOKENS))
    tokens = min(_SPLIT_TOKENS, stage.max_chunk)
    return StepShape(chunks=(number * tokens,)), StepShape(chunks=(tokens,) * number)


def _sequence_s(measured: StepTimes, one_prompt: StepShape, prompts: StepShape) -> float:
    """What each sequence beyond the first adds to a step of as many tokens."""
    whole, split = measured.seconds(one_prompt), measured.seconds(prompts)
    if whole is None or split is None or prompts == one_prompt:
        return 0.0
    return max(0.0, min(measured.least_sequence_s, (split - whole) / (len(prompts.chunks) - 1)))


def _axis(points: Iterable[int], first: int, last: int) -> list[int]:
    return sorted({first, last, *(point for point in points if first < point < last)})


def _level(index: int, length: int) -> int:
    """How often an axis must be halved until it has this point: 0 for its ends."""
    first, last, level = 0, length - 1, 0
    while index not in (first, last):
        middle = (first + last) // 2
        level += 1
        if index == middle:
            break
        first, last = (first, middle) if index < middle else (middle, last)
    return level


def _visit(
    stage: Stage, points: list[tuple[int, StepShape]], measured: StepTimes, time_left: Callable[[], bool]
) -> float:
    """Measures the points while there is time; returns how often on average."""
    num_visits, order = 0, random.Random(0)
    order.shuffle(points)
    points.sort(key=lambda point: point[0])
    while True:
        for _, shape in points:
            if not time_left():
                return num_visits / len(points)
            measured.add(shape, (seconds for _, seconds in stage.time(shape)))
            num_visits += 1
        order.shuffle(points)


def _continued(axis: list[int], values: list[float | None]) -> list[float | None]:
    """The values of a line with what is missing taken from a straight line through its neighbours."""
    known = [(x, value) for x, value in zip(axis, values, strict=True) if value is not None]
    if len(known) < 2:
        return values
    xs = [x for x, _ in known]
    line: list[float | None] = []
    for x, value in zip(axis, values, strict=True):
        if value is None:
            i = bisect_right(xs, x, 1, len(xs) - 1)
            (x0, low), (x1, high) = known[i - 1 : i + 1]
            value = max(0.0, low + (high - low) * (x - x0) / (x1 - x0))
        line.append(value)
    return line


def _transposed(rows: list[list[float | None]]) -> list[list[float | None]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _fit(stage: Stage, model: ProfileCostModel, time_left: Callable[[], bool]) -> dict[str, Any]:
    """How well a profile predicts steps of random shapes: the errors relative to what was measured."""
    errors: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what lies outside of the tables is part of the errors
        while not errors or time_left():
            for predicted, seconds in stage.time(_random_shape(stage), model.step_time):
                errors.append(predicted / seconds - 1)
    absolute = sorted(map(abs, errors))
    return {
        "num_steps": len(errors),
        "mean_signed_error": fmean(errors),
        "mean_error": fmean(absolute),
        "p90_error": quantiles(absolute, [0.9])[0],
    }


def _random_shape(stage: Stage) -> StepShape:
    """A step as serving has them: many decodes, or prompts, or both."""
    dice = stage.random
    while True:
        most = int(stage.max_decodes ** dice.random())
        typical = stage.max_context ** dice.uniform(0.3, 1)
        decodes = tuple(1 + int(typical * dice.random()) for _ in range(most))
        chunks = tuple(
            2 + int((stage.max_chunk - 2) * dice.random()) for _ in range(dice.choice((0, 0, 1, 1, 2)))
        )
        before = dice.choice((0, 0, int(typical)))
        shape = StepShape(decodes if dice.random() < 0.8 else (), chunks, before if chunks else 0)
        if shape.num_sequences and stage.fits(shape):
            return shape
