"""Constants fitted to a recorded run: the run is replayed with them, and they are moved until it agrees.

What is held against each other are the figures of one half of the run: the logarithms of simulated over
measured, each weighed by how well a simulation can hit it. A constant is moved in logarithms as well, and
held to its default by a weak spring, so that one of which a run says nothing stays where it was. The search
is Levenberg's and Marquardt's, with derivatives by differences, from the defaults and from slower constants:
a derivative does not see beyond the point where arithmetic takes over from traffic. Requests that are far off
when all others agree had something else happen to them: they are left out, and the search is repeated; they
count where constants are scored. Nothing in it is random.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pagellm.engine.errors import ConfigError, found
from pagellm.sim.costs.constants import CLIENT_FRONTEND_S, CONSTANTS, SORT_S, SWITCHES, Constants
from pagellm.sim.costs.cost_model import FIT_METRICS, FitError
from pagellm.sim.costs.decoder import Model, load_model
from pagellm.sim.costs.devices import Hardware, load_hardware
from pagellm.sim.costs.fitted import FittedCosts
from pagellm.sim.costs.roofline import RooflineCostModel
from pagellm.sim.fit.recorded_run import Experiment, Half, RecordedRun, Served, figures
from pagellm.sim.simulator import Simulator
from pagellm.sim.traces.trace import Trace

MIN_CONSTANTS, MAX_CONSTANTS = 2, 6
# What a search may move: a switch has nothing between on and off.
FITTABLE = tuple(name for name in CONSTANTS if name not in SWITCHES)
# The error of a figure that weighs as much as a constant that is off by a factor of e.
# A half's throughput is decided by whichever request ends last, and of a quantile by a few.
_TOLERANCES = {"throughput": 0.03, "ttft": 0.04, "tpot": 0.01, "e2e": 0.03}
# Times that of the mean: of the largest hundredth, which follows from a few requests, and of other quantiles.
_TAIL_TOLERANCE, _QUANTILE_TOLERANCE = 8.0, 2.0
# How far off a request is that is left out: in deviations of the others, and at least by such a factor; and
# which share of them is, at most.
_FAR, _FAR_RATIO, _MAX_FAR = 6.0, 1.5, 0.1
_SPRING = 2.0  # how many factors of e a constant may be off before it weighs
_STEP = 0.05  # of a logarithm, for derivatives: steps of a replay are too coarse for a small one
_MAX_ROUNDS = 6
_MAX_SEARCHES = 3
_SLOWER = (0.5, 1.0, 2.0, 3.0)  # of a logarithm: of these the second search begins at the best
_ENOUGH = 1e-2  # of the sum of squares: no round that brings less is followed by another


class Fit:
    """Constants for a run, found by `search`.

    hardware, model: names or files, as in `CostModel.roofline`. constants: names of those that are fitted;
    none: as fits the run. given: constants that are held. settings: of the engine, beside those that the run
    has. progress: called with the number of replays so far. Raises `ConfigError` and `CheckpointError`.
    """

    def __init__(
        self,
        run: RecordedRun,
        hardware: str,
        model: str,
        num_devices: int = 1,
        *,
        constants: Sequence[str] = (),
        given: Mapping[str, float | str] | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._run, self._given, self._settings = run, dict(given or {}), dict(settings or {})
        self._names = hardware, model, num_devices
        self._hardware, self._model = load_hardware(hardware), load_model(model)
        self.constants = tuple(constants) or tuple(
            name
            for name in _default_constants(run, num_devices, self._model.takes_top)
            if name not in self._given
        )
        _check_constants(self.constants, self._given)
        self._progress = progress
        self._num_replays = 0
        known = dict(run.constants)
        if run.at_client:
            known.setdefault("frontend_s", CLIENT_FRONTEND_S)
        if run.samples_as_model and self._model.takes_top:
            known.setdefault("sort_s", SORT_S)
        self._known = {name: value for name, value in known.items() if name not in self._given}
        self._start = Constants({**self._known, **self._given}, self._hardware.constants)

    def search(self) -> FittedCosts:
        """The constants, and their error on what was held out. Raises `ConfigError` and `TraceError`."""
        fitted = [(one, one.fitted) for one in self._run.experiments if one.fitted is not None]
        if not fitted:
            raise ConfigError(f"{self._run.path}: found one stage, expected two or more: one is to be scored")
        values: dict[str, float | str] = {}
        usual: list[tuple[Experiment, Half]] = []
        for _ in range(_MAX_SEARCHES):
            before, usual = usual, [(one, self._usual(one, half, values)) for one, half in fitted]
            if usual == before:
                break
            values = self._values(self._search(usual))
        return FittedCosts({**self._known, **self._given, **values}, self.score(values), *self._names)

    def _search(self, fitted: Sequence[tuple[Experiment, Half]]) -> list[float]:
        """The point at which halves are met best."""

        def residuals(point: Sequence[float]) -> list[float]:
            values = self._values(point)
            off: list[float] = []
            for one, half in fitted:
                off += _differences(self.replay(one, values), half)
            return off + [x / _SPRING for x in point]

        ways = [-1.0 if CONSTANTS[name].high == 1 else 1.0 for name in self.constants]
        slower = ([slow * way for way in ways] for slow in _SLOWER)
        starts = [0.0] * len(ways), min(slower, key=lambda start: _square(residuals(start)))
        point, _ = min(
            (_levenberg_marquardt(residuals, start) for start in starts), key=lambda found: found[1]
        )
        return point

    def _usual(self, experiment: Experiment, half: Half, values: Mapping[str, float | str]) -> Half:
        """A half without the requests that are far off where most agree; the same where there are none."""
        if experiment.served is None:
            return half
        simulated = self.replay(experiment, values)
        far: set[int] = set()
        for name in ("first_token_s", "last_token_s"):
            off = {
                position: _log_latency(simulated[position], name)
                - _log_latency(experiment.served[position], name)
                for position in half.positions
            }
            middle = median(off.values())
            spread = 1.4826 * median(abs(x - middle) for x in off.values())
            limit = max(_FAR * spread, math.log(_FAR_RATIO))
            far.update(position for position, x in off.items() if abs(x - middle) > limit)
        if not far or len(far) > _MAX_FAR * len(half.positions):
            return half
        kept = [position for position in half.positions if position not in far]
        return Half(kept, figures([experiment.served[i] for i in kept]))

    def score(self, values: Mapping[str, float | str]) -> FitError:
        """The error of constants on the half that is scored, each figure the mean over experiments."""
        off: dict[str, list[float]] = {name: [] for name in FIT_METRICS}
        for one in self._run.experiments:
            if one.scored is not None:
                errors = relative_errors(self.replay(one, values), one.scored)
                for name, error in errors.items():
                    if name in off:
                        off[name].append(error)
        means = {name: sum(errors) / len(errors) if errors else None for name, errors in off.items()}
        return {
            "run": self._run.path,
            "num_fitted": self._run.num_fitted,
            "num_scored": self._run.num_scored,
            **means,  # type: ignore[typeddict-item]
        }

    def replay(self, experiment: Experiment, values: Mapping[str, float | str]) -> list[Served]:
        """An experiment simulated with constants."""
        values = {**self._known, **values, **self._given}
        costs = cost_model(self._hardware, self._model, self._names[2], values)
        served = replayed(experiment, costs, self._settings)
        self._num_replays += 1
        if self._progress is not None:
            self._progress(self._num_replays)
        return served

    def _values(self, point: Sequence[float]) -> dict[str, float | str]:
        """Constants at a point: factors of their defaults, within their limits."""
        values: dict[str, float | str] = {}
        for name, x in zip(self.constants, point, strict=True):
            limits = CONSTANTS[name]
            start = self._start[name] or _TYPICAL.get(name, 1.0)
            values[name] = min(max(start * math.exp(x), limits.low), limits.high)
        return values


def _log_latency(one: Served, name: str) -> float:
    return math.log(max(getattr(one, name) - one.arrival_s, 1e-9))


# Where a search begins of a constant whose default is 0.
_TYPICAL = {"frontend_s": CLIENT_FRONTEND_S, "sort_s": SORT_S, "graph_bytes": 2.0**30}


def cost_model(
    hardware: Hardware, model: Model, num_devices: int, values: Mapping[str, float | str]
) -> RooflineCostModel:
    """The estimate with constants."""
    return RooflineCostModel(hardware, model, num_devices, 1, 1, name="fit", fitted=None, **values)


def replayed(
    experiment: Experiment, costs: RooflineCostModel, settings: Mapping[str, Any] | None = None
) -> list[Served]:
    """An experiment simulated, its requests in order. settings: of the engine, before those of the run."""
    requests = experiment.requests
    config = costs.settings({**experiment.settings, **(settings or {})})
    if config.max_model_len is None and costs.max_model_len is not None:
        longest = max((one.prompt_len or 0) + one.output_len for one in requests)
        if longest > costs.max_model_len:
            raise ConfigError(
                f"{experiment.name}: found a request of {longest} tokens, expected at most "
                f"{costs.max_model_len}, the context of this model"
            )
    served: dict[int, Served] = {}
    with TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        simulator = Simulator(config, costs, results=results, clients=experiment.clients)
        simulator.replay(Trace(lambda: iter(requests), experiment.name))
        with results.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                position = int(record["id"])
                served[position] = Served(
                    record["arrival_s"],
                    record["prompt_tokens"],
                    record["output_tokens"],
                    record["first_token_s"],
                    record["last_token_s"],
                )
    return [served[position] for position in range(len(requests))]


def relative_errors(simulated: Sequence[Served], half: Half) -> dict[str, float]:
    """Simulated / measured - 1 of each figure that was measured."""
    found_ = figures([simulated[position] for position in half.positions])
    return {
        name: found_[name] / measured - 1
        for name, measured in half.measured.items()
        if name in found_ and measured > 0
    }


def _differences(simulated: Sequence[Served], half: Half) -> list[float]:
    """Logarithms of simulated over measured, weighed."""
    off = []
    for name, error in relative_errors(simulated, half).items():
        metric, _, quantile = name.partition("_")
        wider = _TAIL_TOLERANCE if quantile == "p99" else _QUANTILE_TOLERANCE
        tolerance = _TOLERANCES[metric] * (wider if quantile else 1.0)
        off.append(math.log(max(1 + error, 1e-9)) / tolerance)
    return off


def _default_constants(run: RecordedRun, num_devices: int, takes_top: bool) -> list[str]:
    """What a run says most of: products by arithmetic and traffic, attention's traffic, what a step costs.

    Where a client took the times also what was before the engine, and of several devices their links. Where
    tokens are sampled of the most likely, as a model has it, sorting, and be it in the place of arithmetic.
    """
    names = ["product_flops", "product_bytes", "decode_bytes", "step_overhead_s"]
    if num_devices > 1:
        names.append("link_bytes")
    if run.at_client:
        names.append("frontend_s")
    if run.samples_as_model and takes_top:
        names = [*(names if len(names) < MAX_CONSTANTS else names[1:]), "sort_s"]
    return names


def _check_constants(names: Sequence[str], given: Mapping[str, float | str]) -> None:
    for name in names:
        if name not in FITTABLE:
            raise ConfigError(f"constants: found {found(name)}, expected some of {', '.join(FITTABLE)}")
        if name in given:
            raise ConfigError(f"constants: found {name}, which is given, expected one that is to be fitted")
    if len(set(names)) != len(names) or not MIN_CONSTANTS <= len(names) <= MAX_CONSTANTS:
        raise ConfigError(
            f"constants: found {', '.join(names) or 'none'}, expected {MIN_CONSTANTS} to {MAX_CONSTANTS} "
            "different ones"
        )


_Residuals = Callable[[Sequence[float]], list[float]]


def _levenberg_marquardt(residuals: _Residuals, start: Sequence[float]) -> tuple[list[float], float]:
    """The nearest such point, and the sum there."""
    size = len(start)
    point, off = list(start), residuals(start)
    best, damping = _square(off), 1e-2
    for _ in range(_MAX_ROUNDS):
        columns = []
        for place in range(size):
            moved = list(point)
            moved[place] += _STEP
            columns.append([(b - a) / _STEP for a, b in zip(off, residuals(moved), strict=True)])
        before = best
        for _ in range(4):
            step = _solve(columns, off, damping)
            length = max(map(abs, step))
            shorten = min(1.0, 1.0 / length) if length else 1.0
            moved = [x + shorten * dx for x, dx in zip(point, step, strict=True)]
            tried = residuals(moved)
            if _square(tried) < best:
                point, off, best = moved, tried, _square(tried)
                damping = max(damping / 4, 1e-6)
                break
            damping *= 8
        if before - best <= _ENOUGH * before:
            break
    return point, best


def _square(values: Iterable[float]) -> float:
    return sum(value * value for value in values)


def _solve(columns: Sequence[Sequence[float]], off: Sequence[float], damping: float) -> list[float]:
    """The step of least squares, by Gauss's elimination of the damped normal equations."""
    size = len(columns)
    rows = []
    for i, column in enumerate(columns):
        row = [sum(a * b for a, b in zip(column, other, strict=True)) for other in columns]
        row[i] *= 1 + damping
        rows.append([*row, -sum(a * b for a, b in zip(column, off, strict=True))])
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if not rows[i][i]:
            continue  # nothing depends on it
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] / row[i] if row[i] else 0.0 for i, row in enumerate(rows)]
