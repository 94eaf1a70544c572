"""Step times in the order in which they were measured, and what a step of each shape takes by them.

What else goes on at a machine slows it down for seconds at a time, whatever it computes, and now and then
holds up a single step. The first shows where several steps in a row took longer than steps of their shapes
otherwise do: these are left out wherever there are others, unless they took most of the time, for then the
machine is mostly so slow. The second is cut to what scatter explains.
"""

from collections.abc import Iterable
from math import fsum
from statistics import fmean, median

from pagellm.sim.calibration.staged_steps import StepShape
from pagellm.sim.quantiles import quantiles

_UNDISTURBED_SHARE = 0.25  # of the times of a shape: so many are expected to be as the machine has them
_WINDOW = 15  # steps whose median slowness says whether the machine was disturbed
_MOST_SLOWNESS = 1.1
_MOST_DISTURBED = 0.5  # of the time, to be an exception
_MOST_SCATTER = 1.3  # of a single time, relative to the median


class StepTimes:
    """What steps took, less what is accounted for by the step and by the sequence.

    step_s, sequence_s: these two, in seconds, once they are known.
    """

    def __init__(self) -> None:
        self.step_s = self.sequence_s = 0.0
        self._steps: list[tuple[StepShape, float]] = []
        self._seconds: dict[StepShape, float] | None = None  # all of it, once somebody asks
        self._disturbed_share = 0.0

    def add(self, shape: StepShape, times: Iterable[float]) -> None:
        """Takes in steps that were measured after all others."""
        self._steps += ((shape, seconds) for seconds in times)
        self._seconds = None

    @property
    def disturbed_share(self) -> float:
        """The share of the time in which the machine was slower than it can be."""
        self._settle()
        return self._disturbed_share

    @property
    def least_sequence_s(self) -> float:
        """The least seconds for a sequence of any step: no more can be accounted for by the sequence."""
        return min((s - self.step_s) / shape.num_sequences for shape, s in self._settle().items())

    def seconds(self, shape: StepShape) -> float | None:
        """What a step of a shape takes, or None if none was measured."""
        seconds = self._settle().get(shape)
        if seconds is None:
            return None
        return max(0.0, seconds - self.step_s - self.sequence_s * shape.num_sequences)

    def _settle(self) -> dict[StepShape, float]:
        if self._seconds is None:
            calm = _undisturbed(self._steps)
            all_s, calm_s = (fsum(seconds for _, seconds in steps) for steps in (self._steps, calm))
            self._disturbed_share = 1 - calm_s / all_s if all_s else 0.0
            times = _by_shape(self._steps)
            if self._disturbed_share < _MOST_DISTURBED:
                times |= _by_shape(calm)
            self._seconds = {shape: _without_outliers(found) for shape, found in times.items()}
        return self._seconds


def _undisturbed(steps: list[tuple[StepShape, float]]) -> list[tuple[StepShape, float]]:
    """The steps at whose time the machine was not disturbed.

    Prompts wait for its arithmetic, decodes for its memory, and what slows one may leave the other alone.
    """
    fast = {
        shape: quantiles(sorted(times), [_UNDISTURBED_SHARE])[0] for shape, times in _by_shape(steps).items()
    }
    calm = []
    for has_chunks in (True, False):
        alike = [step for step in steps if bool(step[0].chunks) is has_chunks]
        slowness = [seconds / fast[shape] for shape, seconds in alike]
        for i, step in enumerate(alike):
            around = slowness[max(0, i - _WINDOW // 2) : i + _WINDOW // 2 + 1]
            if median(around) <= _MOST_SLOWNESS:
                calm.append(step)
    return calm


def _by_shape(steps: Iterable[tuple[StepShape, float]]) -> dict[StepShape, list[float]]:
    times: dict[StepShape, list[float]] = {}
    for shape, seconds in steps:
        times.setdefault(shape, []).append(seconds)
    return times


def _without_outliers(times: list[float]) -> float:
    """The mean, to which no time adds more than scatter explains."""
    most = _MOST_SCATTER * median(times)
    return fmean(min(seconds, most) for seconds in times)
