"""What a step costs: seconds from the shape of a scheduled batch, without computing anything.

Three models: a profile of measured tables (profile.py), the limits of a machine (roofline.py), and the
steps of a recorded run, here. All are plain Python, because they are asked once for each step.
"""

import json
import os
import reprlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, ProfileError
from pagellm.engine.scheduling.scheduler import PreemptionCosts, ScheduledBatch

if TYPE_CHECKING:
    from pagellm.sim.costs.roofline import RooflineCostModel

_context = attrgetter("num_computed_tokens")


class CostModel(ABC):
    """Prices steps.

    name: what the times come from, for reports. costs: what preemption is expected to cost in the step to
    come, for the scheduler.
    """

    name: str
    costs = PreemptionCosts()

    @property
    def extrapolated(self) -> int:
        """Look-ups that fell outside of what was measured, since `begin`."""
        return 0

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "CostModel":
        """A model from a file: a profile, or the step log of a run. Raises `ProfileError`."""
        from pagellm.sim.costs.profile import ProfileCostModel

        path = Path(path)
        first = next(_lines(path), "")
        try:
            is_step_log = "duration_s" in json.loads(first)
        except (ValueError, TypeError):
            is_step_log = False
        return RecordedCostModel(path) if is_step_log else ProfileCostModel.from_file(path)

    @staticmethod
    def roofline(hardware: str, model: str, num_devices: int = 1, **options: float) -> "RooflineCostModel":
        """The limits of a known accelerator for a known model, by their names in hardware.json.

        options: those of `RooflineCostModel`: efficiency, step_overhead_s, sequence_overhead_s.
        Raises `ConfigError`.
        """
        from pagellm.sim.costs.roofline import RooflineCostModel

        return RooflineCostModel.of_names(hardware, model, num_devices, **options)

    def begin(self, config: EngineConfig, num_replicas: int = 1) -> None:  # noqa: B027 (may do nothing)
        """Prepares for a replay with these settings, from its first step. Raises `ConfigError`."""

    def next_start(self, now: float) -> float:
        """When the next step starts, in seconds, if it could start now."""
        return now

    @abstractmethod
    def step_time(self, batch: ScheduledBatch) -> float:
        """Seconds from scheduling a batch, as `schedule` returned it, to having its tokens."""

    def block_bytes(self, block_size: int) -> int | None:
        """Bytes of a KV block of so many tokens, if they are known."""
        return None

    def num_blocks(self, block_size: int) -> int | None:
        """KV blocks of so many tokens that the machine holds, if that is known."""
        return None


class BatchShape(NamedTuple):
    """What of a batch matters for its time.

    num_decodes, decode_context: sequences of which one token is computed, and the tokens before those, in
    all. prefills: (tokens, tokens before them) of each other sequence.
    """

    num_decodes: int
    decode_context: int
    prefills: list[tuple[int, int]]


def shape_of(batch: ScheduledBatch) -> BatchShape:
    """The shape of a batch. Prefills are few and stand at its end, so that decodes cost a sum each."""
    sequences, counts = batch.sequences, batch.num_new_tokens
    num_decodes, context = len(sequences), sum(map(_context, sequences))
    prefills = []
    index, beyond_one = num_decodes, sum(counts) - num_decodes
    while beyond_one:
        index -= 1
        count = counts[index]
        if count > 1:
            before = sequences[index].num_computed_tokens
            prefills.append((count, before))
            beyond_one -= count - 1
            num_decodes -= 1
            context -= before
    return BatchShape(num_decodes, context, prefills)


class RecordedCostModel(CostModel):
    """The steps of a recorded run, from a step log: each starts and takes as long as it did.

    A simulation of the same requests with the same settings then takes the same decisions.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = f"steps of {path}"
        self._path = path
        self._next = 0
        columns = [array("d") for _ in _RECORDED]
        for number, line in enumerate(_lines(Path(path))):
            for column, value in zip(columns, _recorded(f"{path}:{number + 1}", number, line), strict=True):
                column.append(value)
        self._start_s, self._duration_s, self._recompute_token_s, self._swap_block_s = columns

    def begin(self, config: EngineConfig, num_replicas: int = 1) -> None:
        if num_replicas != 1:
            raise ConfigError(f"replicas: found {num_replicas} with a recorded run, expected 1")
        self._next = 0

    def next_start(self, now: float) -> float:
        if self._next == len(self._start_s):
            raise ProfileError(f"{self._path}: found {self._next} steps, expected more for this replay")
        costs = self._recompute_token_s[self._next], self._swap_block_s[self._next]
        self.costs = PreemptionCosts(*costs)
        return max(now, self._start_s[self._next])

    def step_time(self, batch: ScheduledBatch) -> float:
        self._next += 1
        return self._duration_s[self._next - 1]


_RECORDED = ("start_s", "duration_s", "costs.recompute_token_s", "costs.swap_block_s")


def _recorded(place: str, number: int, line: str) -> Iterator[float]:
    """What a recorded step took, as named in `_RECORDED`."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ProfileError(f"{place}: {error}, expected a step as JSON") from None
    if not isinstance(record, dict) or record.get("step") != number:
        raise bad_field(place, "step", record, str(number))
    for field in _RECORDED:
        value: Any = record
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        yield seconds(place, field, value)


def seconds(place: str, field: str, value: Any) -> float:
    """The value, if it is a finite number of seconds from 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise bad_field(place, field, value, "a finite number of seconds from 0")
    return float(value)


def bad_field(place: str, field: str, value: Any, expected: str) -> ProfileError:
    """The error for a field of a file; a value of None is one that is not there."""
    shown = "nothing" if value is None else reprlib.repr(value)
    return ProfileError(f"{place}: {field}: found {shown}, expected {expected}")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ProfileError(f"{path}: cannot be read: {reason}") from None
