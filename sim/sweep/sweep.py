"""Sweeps: many replays of one trace, on all cores: a grid of settings, and the highest load of each point.

Every replay is a function of its settings, so where and when it runs makes no difference, and one that stands
in the results file is not done again. Workers are processes that are started afresh and read trace and step
times themselves; a program that sweeps needs `if __name__ == "__main__":` around its own start.
"""

import json
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from pagellm.engine.checks import integer
from pagellm.engine.config import usable_cores
from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.engine.user_policy import import_policy
from pagellm.sim.costs.cost_model import CostModel, FitError, StepTimeError
from pagellm.sim.costs.source import CostSource, hash_of
from pagellm.sim.sweep.capacity import Bracket, search
from pagellm.sim.sweep.file import Identity, Point, ResultsFile
from pagellm.sim.sweep.grid import POLICY_SETTINGS, Grid, Slo
from pagellm.sim.sweep.ray_workers import start_ray_workers
from pagellm.sim.sweep.serving import Serving, Settings, load_costs
from pagellm.sim.sweep.workers import Worker, start_workers
from pagellm.sim.traces.trace import Trace

# Requests in the system, on average, from which on nearly all are alone there.
_ALONE = 0.02
# Between two looks at whether there was an interrupt.
_PATIENCE_S = 0.1

_Result = TypeVar("_Result")
# Yields the settings of a replay, is sent its point, and returns what came of all of them.
_Task = Generator[dict[str, Any], Point, _Result]


@dataclass(frozen=True)
class TraceFile:
    """A trace by where it stands and how it is read: format, skip_bad and sort as in `Trace.load`.

    limit: how many of its first requests, all if None. With skip_bad, requests that can never be computed are
    counted as rejected.
    """

    path: str
    limit: int | None = None
    format: str | None = None
    skip_bad: bool = False
    sort: bool = False
    output_len: int | None = None

    def load(self) -> Trace:
        """Raises `TraceError`."""
        trace = Trace.load(
            self.path,
            format=self.format,
            skip_bad=self.skip_bad,
            sort=self.sort,
            output_len=self.output_len,
        )
        return trace if self.limit is None else trace.limited(self.limit)

    def hash(self) -> str:
        """SHA-256 of the file."""
        return hash_of(self.path)

    def reading(self) -> str:
        """All but the path, in words."""
        parts = [
            "all requests" if self.limit is None else f"the first {self.limit} requests",
            "" if self.format is None else f"read as {self.format}",
            "sorted" if self.sort else "",
            "without bad ones" if self.skip_bad else "",
            "" if self.output_len is None else f"{self.output_len} tokens where none are said",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Capacity:
    """The highest load at which the SLO holds with some settings.

    settings: without a rate_factor. probes: every replay that was made for it, in order. bracket: what they
    showed, None where one of them failed.
    """

    settings: dict[str, Any]
    probes: list[Point]
    bracket: Bracket | None

    @property
    def at(self) -> Point | None:
        """The probe at the highest load at which the SLO holds, if there is one."""
        factor = None if self.bracket is None else self.bracket.holds
        return next((probe for probe in self.probes if probe.settings["rate_factor"] == factor), None)

    @property
    def transient(self) -> str | None:
        """Why the highest load at which the SLO holds is no answer: the replay there had no steady state."""
        highest = self.at
        if highest is None or highest.summary is None or "steady" not in highest.summary:
            return None
        steady = highest.summary["steady"]
        if steady["verdict"] == "steady":
            return None
        return f"{steady['offered_per_s']:.4g} requests/s offered are no steady state: {steady['reason']}"

    @property
    def error(self) -> str | None:
        """Why there is no bracket."""
        return self.probes[-1].error


@dataclass(frozen=True)
class SweepResult:
    """All points of a grid in its order; capacities likewise, None if they were not asked for.

    profile_error: how far the profile's step times were from measured ones; fit: the same of constants that
    were fitted; None where that is not known.
    """

    trace: str
    cost_model: str
    grid: Grid
    slo: Slo | None
    points: list[Point]
    capacities: list[Capacity] | None = None
    profile_error: StepTimeError | None = None
    fit: FitError | None = None


class _Checked(NamedTuple):
    """What a sweep replays, and the step times of it; where they are an axis, of the first of them."""

    identity: Identity
    costs: list[CostModel]


@dataclass(frozen=True)
class Sweep:
    """A grid of replays.

    slo: what a good point keeps. results: the file of finished replays, which is read first. jobs: processes;
    1 replays in this one, None takes a process for each usable core. progress: called with each point, as it
    is finished or found in the file. accept_profile_error: as in `Simulator`.
    ray: the address of a Ray cluster, on whose cores replays run then; they read the files themselves.
    fleet: the file of one; costs are of its groups that have no step times then, None if all have.
    """

    trace: TraceFile
    costs: CostSource | None
    grid: Grid
    slo: Slo | None = None
    results: Path | None = None
    jobs: int | None = None
    progress: Callable[[Point], None] | None = field(default=None, compare=False)
    accept_profile_error: bool = False
    ray: str | None = None
    fleet: str | None = None

    @cached_property
    def serving(self) -> Serving:
        """What serves. Raises `ConfigError` where nothing does."""
        return Serving(self.costs, self.fleet)

    def run(self) -> SweepResult:
        """Replays every point. A point that fails has its error, and the others go on.

        Raises `ConfigError` for a bad value, `TraceError`, `ProfileError` and `ReportError` for a bad file.
        """
        checked = self._checked()
        points = self._drive(checked, [_replayed(settings) for settings in self.grid])
        return self._result(checked, points)

    def run_capacity(self, tolerance: float = 0.02) -> SweepResult:
        """Searches the highest rate_factor at which the SLO holds at each point; see `capacity.search`.

        Each search begins at 1, so the grid itself is replayed as well. Raises as `run` does.
        """
        self.needed_slo()
        self._check_searched()
        next(search(tolerance))
        checked = self._checked()
        capacities = self._drive(checked, self._searches(list(self.grid), tolerance))
        points = [
            Point(capacity.settings, first.summary, first.extrapolated, first.error)
            for capacity in capacities
            for first in capacity.probes[:1]
        ]
        return self._result(checked, points, capacities)

    def run_searches(self, points: list[dict[str, Any]], tolerance: float = 0.02) -> list[Capacity]:
        """The same for some points, whatever the grid's are. Raises as `run` does."""
        self._check_searched()
        next(search(tolerance))
        return self._drive(self._checked(), self._searches(points, tolerance))

    def run_tasks(self, tasks: list[_Task[_Result]]) -> list[_Result]:
        """Drives tasks of one's own, which yield the settings of replays. Raises as `run` does."""
        self._check_searched()
        return self._drive(self._checked(), tasks)

    def needed_slo(self) -> Slo:
        """The SLO. Raises `ConfigError` where there is none."""
        if self.slo is None:
            raise ConfigError("slo: found none, expected limits that the capacity is to keep")
        return self.slo

    def step_time_errors(self) -> tuple[StepTimeError | None, FitError | None]:
        """As `SweepResult` has them. Raises as `run` does."""
        return _errors(self._cost_models())

    def trace_rate(self) -> float:
        """Requests a second of the trace as it is. Raises `TraceError` and `ConfigError`."""
        times = [request.arrival_time for request in self.trace.load()]
        if times[-1] <= times[0]:
            raise ConfigError(f"rate: found {self.trace.path}, whose requests come at once, expected times")
        return (len(times) - 1) / (times[-1] - times[0])

    def _searches(self, points: list[dict[str, Any]], tolerance: float) -> list[_Task[Capacity]]:
        slo = self.needed_slo()
        return [_searched(settings, slo, tolerance) for settings in points]

    def _check_searched(self) -> None:
        if "rate_factor" in self.grid.axes:
            raise ConfigError("rate_factor: found values, expected none where the capacity is searched")
        for clients in self.grid.axes.get("clients", ()):
            if clients is not None:
                raise ConfigError(f"clients: found {clients}, expected none where the capacity is searched")

    def _result(
        self, checked: _Checked, points: list[Point], capacities: list[Capacity] | None = None
    ) -> SweepResult:
        identity, costs = checked
        return SweepResult(
            identity.trace,
            identity.cost_model,
            self.grid,
            self.slo,
            points,
            capacities,
            *_errors(costs),
        )

    def _checked(self) -> _Checked:
        """What is replayed, if all of it can be read and every value alone is good."""
        if self.jobs is not None:
            integer("jobs", self.jobs, 1, error=ConfigError)
        _load_trace.cache_clear()
        load_costs.cache_clear()
        trace = self.trace.load()
        next(iter(trace))
        costs = self._cost_models()
        reading = self.trace.reading()
        if self.slo is not None and self.slo.joint:
            each = " and ".join(f"{name} {seconds:g} s" for name, seconds in self.slo.joint)
            reading += f", each within {each}"
        name = " and ".join(dict.fromkeys(one.name for one in costs))
        name = name if self.fleet is None else f"{self.fleet}: {name}"
        content = self.trace.hash(), reading, name, self.serving.hash(self.grid.axes)
        return _Checked(Identity(trace.name, *content), costs)

    def _cost_models(self) -> list[CostModel]:
        """The step times; where they are an axis, the first of them. Every value alone is good then."""
        serves = self.grid.check(self.serving)
        try:
            costs = self.serving.cost_models({})
        except PagellmError:  # a fleet may need other values
            if self.fleet is None:
                raise
            costs = self.serving.cost_models(serves)
        for one in costs:
            one.check_error(self.accept_profile_error)
        return costs

    def _drive(self, checked: _Checked, tasks: list[_Task[_Result]]) -> list[_Result]:
        """Runs tasks side by side, each a replay at a time, as many as there are workers."""
        done: dict[int, _Result] = {}
        ready = deque((number, next(task)) for number, task in enumerate(tasks))
        running: dict[Future[Point], tuple[int, dict[str, Any], Worker]] = {}

        def advance(number: int, point: Point) -> None:
            if self.progress is not None:
                self.progress(point)
            try:
                # Before all others, so that what was begun is finished first.
                ready.appendleft((number, tasks[number].send(point)))
            except StopIteration as end:
                done[number] = end.value

        with ExitStack() as stack:
            file = ResultsFile(self.results, checked.identity, self.serving.full_settings)
            stack.callback(file.close)
            if self.ray is not None:
                started = start_ray_workers(self.ray, self.jobs)
            else:
                started = start_workers(self.jobs or usable_cores())
            workers, check_interrupts = stack.enter_context(started)
            while ready or running:
                while ready:
                    number, settings = ready[0]
                    known = file.get(settings)
                    if known is None and not workers:
                        break
                    ready.popleft()
                    if known is not None:
                        advance(number, known)
                        continue
                    worker = workers.pop()
                    each = None if self.slo is None else self.slo.each
                    future = worker.submit(_replay, self.trace, self.serving, settings, each)
                    running[future] = number, settings, worker
                for future in wait(running, _PATIENCE_S, return_when=FIRST_COMPLETED).done:
                    number, settings, worker = running.pop(future)
                    workers.append(worker)
                    point = _point_of(future, settings)
                    if point.error is None:
                        file.add(point)
                    advance(number, point)
                check_interrupts()
        return [done[number] for number in range(len(tasks))]


def _errors(costs: list[CostModel]) -> tuple[StepTimeError | None, FitError | None]:
    """Those of the first step times of which they are known."""
    errors = (one.error for one in costs if one.error is not None)
    return next(errors, None), next((one.fit for one in costs if one.fit is not None), None)


def _replayed(settings: dict[str, Any]) -> _Task[Point]:
    return (yield settings)


def _searched(settings: dict[str, Any], slo: Slo, tolerance: float) -> _Task[Capacity]:
    probes: list[Point] = []
    steps = search(tolerance)
    factor = next(steps)
    while True:
        probe = yield settings | {"rate_factor": factor}
        probes.append(probe)
        if probe.summary is None:
            return Capacity(settings, probes, None)
        try:
            factor = steps.send(_answer(slo, probe.summary))
        except StopIteration as end:
            return Capacity(settings, probes, end.value)


def _answer(slo: Slo, summary: Mapping[str, Any]) -> bool | None:
    """Whether a load can be served; None: neither can any lower one."""
    if slo.holds(summary):
        return True
    steady = summary.get("steady")
    return None if steady is not None and max(steady["in_system"]) < _ALONE else False


def _point_of(future: "Future[Point]", settings: Settings) -> Point:
    try:
        return future.result()
    except BrokenProcessPool:
        return Point(dict(settings), error="its process ended: killed, or out of memory")


# In the worker: what it has read is kept for its next replay.

_load_trace = cache(TraceFile.load)


def _replay(
    trace: TraceFile, serving: Serving, settings: dict[str, Any], slo: Mapping[str, float] | None
) -> Point:
    """A replay; whatever goes wrong in it is the point's error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # extrapolation is counted
            for name in POLICY_SETTINGS:
                import_policy(settings.get(name), name)
            replayer = serving.simulator(settings, skip_bad=trace.skip_bad, slo=slo)
            report = replayer.replay(_reordered(_load_trace(trace), settings.get("seed") or 0))
    except PagellmError as error:
        return Point(settings, error=" ".join(str(error).split()))
    except Exception as error:  # a policy of the user's may do anything
        return Point(settings, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    fleet = {name: value for name, value in report["fleet"].items() if name not in ("links", "scaling")}
    # As it comes back from the results file.
    summary = json.loads(json.dumps({**report.summary, "fleet": fleet}))
    del summary["wall_s"]
    return Point(settings, summary, report.data["extrapolated"])


def _reordered(trace: Trace, seed: int) -> Trace:
    """The same requests; with a seed the gaps between their arrivals come in another order."""
    if seed == 0:
        return trace
    times = [request.arrival_time for request in trace]
    gaps = [after - before for before, after in pairwise(times)]
    Random(seed).shuffle(gaps)
    return trace.retimed(lambda: accumulate(gaps, initial=times[0]))
