"""The steps of a recorded run, from its step log: what each took, and the settings that it ran with."""

import math
import os
import warnings
from array import array
from collections.abc import Mapping
from typing import Any

from pagellm.engine import checks
from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.config import CompleteConfig, EngineConfig
from pagellm.engine.errors import ConfigError, ProfileError
from pagellm.engine.scheduling.batch import PreemptionCosts, ScheduledBatch
from pagellm.engine.scheduling.policies import KINDS
from pagellm.engine.step_log import NO_DECISIONS
from pagellm.sim.costs.cost_model import CostModel
from pagellm.sim.fields import Fields, read_lines

# Settings of a recorded run, and those which make the recorded value of another one void.
_DECISIONS = tuple(name for name in EngineConfig.__dataclass_fields__ if name not in NO_DECISIONS)
_FOLLOWS = {
    "max_prefill_chunk": ("max_num_batched_tokens",),
    "num_swap_blocks": ("preemption", "num_blocks", "block_size", "swap_dir", "enable_hierarchical_cache"),
}


class RecordedCostModel(CostModel):
    """The steps of a recorded run, from a step log: each starts and takes as long as it did.

    A simulation of the same requests with the same settings then takes the same decisions. The settings are
    in the log's first record; logs of older versions have none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = checks.path("profile", path, ProfileError)
        self.name = f"steps of {path}"
        self._path = path
        self._next = 0
        self._config: CompleteConfig | None = None
        columns = [array("d") for _ in range(4)]
        arrivals = array("d")  # of the first request that each step took in
        for number, line in enumerate(read_lines(path, ProfileError)):
            record = _step(f"{path}:{number + 1}", number, line)
            if number == 0 and record.has("config"):
                self._config = _recorded_config(record)
                self.max_model_len = self._config.max_model_len
            costs = record.section("costs")
            values = (
                record.seconds("start_s"),
                record.seconds("duration_s"),
                costs.seconds("recompute_token_s"),
                costs.seconds("swap_block_s"),
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            arrivals.append(_first_arrival(record))
        self._start_s, self._duration_s, self._recompute_token_s, self._swap_block_s = columns
        self._start_before(arrivals)

    def _start_before(self, arrivals: "array[float]") -> None:
        """Lets steps start before those requests came which they did not take in.

        A real engine looks for requests a few microseconds before it schedules. The steps end when they did,
        because requests may come some time after that.
        """
        upcoming = math.inf
        for step in reversed(range(len(arrivals))):
            if (start_s := self._start_s[step]) >= upcoming:
                self._start_s[step] = math.nextafter(upcoming, 0.0)
                self._duration_s[step] += start_s - self._start_s[step]
            upcoming = min(upcoming, arrivals[step])

    def settings(self, given: Mapping[str, Any]) -> EngineConfig:
        if self._config is None:
            return super().settings(given)
        recorded = {name: getattr(self._config, name) for name in _DECISIONS}
        for name in KINDS:
            if ":" in (recorded[name] or "") and name not in given:
                raise ConfigError(
                    f"{name}: found nothing, expected {recorded[name]!r}, with which {self._path} was "
                    "recorded: code that a file names is not run"
                )
        # What follows from other settings follows from those given: blocks from their size, say.
        del recorded["num_blocks"], recorded["max_model_len"]
        for name, others in _FOLLOWS.items():
            if given.keys() & set(others):
                del recorded[name]
        return EngineConfig(**(recorded | dict(given)))

    def num_blocks(self, config: EngineConfig) -> int | None:
        return None if self._config is None else max(1, self._config.capacity_tokens // config.block_size)

    def begin(self, config: EngineConfig, num_replicas: int = 1) -> None:
        if num_replicas != 1:
            raise ConfigError(f"replicas: found {num_replicas} with a recorded run, expected 1")
        self._next = 0
        if self._config is not None:
            complete = config.complete()
            differing = [n for n in _DECISIONS if getattr(complete, n) != getattr(self._config, n)]
            if differing:
                found = ", ".join(f"{name} {getattr(complete, name)}" for name in differing)
                recorded = ", ".join(f"{name} {getattr(self._config, name)}" for name in differing)
                warnings.warn(
                    f"{self._path}: recorded with {recorded}, replayed with {found}: decisions differ, and "
                    "the step times are those of other steps",
                    stacklevel=3,
                )

    def next_start(self, now: float) -> float:
        if self._next == len(self._start_s):
            raise ProfileError(f"{self._path}: found {self._next} steps, expected more for this replay")
        costs = self._recompute_token_s[self._next], self._swap_block_s[self._next]
        self.costs = PreemptionCosts(*costs)
        return max(now, self._start_s[self._next])

    def empty_step_time(self) -> float:
        self._next += 1
        return self._duration_s[self._next - 1]

    def step_time(self, batch: ScheduledBatch) -> float:
        self._next += 1
        return self._duration_s[self._next - 1]


def _step(place: str, number: int, line: str) -> Fields:
    """The record of a step, if it is the one that comes next."""
    try:
        record = Fields(parse_json(line), place, ProfileError, name="step")
    except JsonError as error:
        raise ProfileError(f"{place}: found {error}, expected a step as JSON") from None
    if record.get("step") != number:
        raise record.bad("step", record.get("step"), str(number))
    return record


def _recorded_config(record: Fields) -> CompleteConfig:
    settings = record.get("config")
    # One that is missing is newer than the log, and its default is what there was before.
    if not isinstance(settings, dict) or not {"num_blocks", "max_model_len"} <= set(settings) <= set(
        _DECISIONS
    ):
        raise record.bad("config", settings, f"an object of {', '.join(_DECISIONS)}")
    try:
        return EngineConfig(**settings).complete()
    except ConfigError as error:
        raise ProfileError(f"{record.place}: config: {error}") from None


def _first_arrival(record: Fields) -> float:
    """Of the requests that a step took in; infinite if it took none in."""
    requests = (
        Fields(values, record.place, ProfileError, f"added[{index}].")
        for index, values in enumerate(record.entries("added"))
    )
    return min((request.number("arrival_s", None) for request in requests), default=math.inf)
