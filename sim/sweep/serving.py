"""What serves in the replays of a sweep: step times and a fleet, as the settings of a point change them.

Beside settings of an engine and of a replay a point may have another device (`hardware`, NAME or NAME*N),
other stages and ranks (`pipeline_parallel`, `data_parallel`), prefill and decode apart (`disaggregate`, P:D,
over `link`), and other values in a fleet's file: GROUP.KEY, such as large.count, large.hardware or
large.engine.max_num_seqs, failures.KEY, and migration_limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import product
from typing import Any, get_type_hints

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, PagellmError, found
from pagellm.sim.costs.cost_model import CostModel
from pagellm.sim.costs.source import CostSource, hash_of
from pagellm.sim.fleet.file import TIMES, read_fleet
from pagellm.sim.fleet.fleet import Fleet, disaggregated, known_link, parse_disaggregation
from pagellm.sim.simulator import Simulator

Value = int | float | bool | str | None
Settings = Mapping[str, Value]

REPLAY_SETTINGS = ("rate_factor", "clients", "replicas", "router", "timeout_s", "price_per_h")
# Of step times and of which replicas there are; and the order of the gaps between arrivals, 0 as they are.
SOURCE_SETTINGS = {"hardware": str, "pipeline_parallel": int, "data_parallel": int}
SWEEP_SETTINGS = {
    **SOURCE_SETTINGS,
    "disaggregate": str,
    "link": str,
    "migration_limit": int | None,
    "seed": int,
}
REPLAY_TYPES = {name: kind for name, kind in get_type_hints(Simulator).items() if name in REPLAY_SETTINGS}
# No step log: every point would write the same file. And nothing is sampled in a simulation.
CONFIG_TYPES = {
    name: kind
    for name, kind in get_type_hints(EngineConfig).items()
    if name not in ("step_log", "generation_config", "reasoning_markers", "tool_call_parser")
}

load_costs = cache(CostSource.load)


def is_of_fleet(name: str) -> bool:
    """Whether a setting is a key of a fleet's file."""
    return "." in name or name == "migration_limit"


def decides_what_serves(name: str) -> bool:
    """Whether a setting is one of step times or of which replicas there are, not of engines or the load."""
    return is_of_fleet(name) or (name in SWEEP_SETTINGS and name != "seed")


@dataclass(frozen=True)
class Serving:
    """What serves where settings do not say otherwise.

    costs: step times; None where each group of a fleet has its own. fleet: the file of one. Raises
    `ConfigError` where there is neither.
    """

    costs: CostSource | None
    fleet: str | None = None

    def __post_init__(self) -> None:
        if self.costs is None and self.fleet is None:
            raise ConfigError("step times: found none, expected a profile, a roofline, or a fleet")

    def simulator(
        self, settings: Settings, *, skip_bad: bool = False, slo: Mapping[str, float] | None = None
    ) -> Simulator:
        """What replays with these settings. slo: as in `Simulator`. Raises `ConfigError`."""
        config = {name: value for name, value in settings.items() if name in CONFIG_TYPES}
        options: dict[str, Any] = {name: value for name, value in settings.items() if name in REPLAY_TYPES}
        # Whether a profile's error is accepted was asked once, for the whole sweep.
        options |= {"skip_bad": skip_bad, "slo": slo, "accept_profile_error": True}
        costs = self._costs(settings)
        if self.fleet is not None:
            for name in ("disaggregate", "link"):
                if settings.get(name) is not None:
                    value = settings[name]
                    raise ConfigError(f"{name}: found {value!r} with a fleet, whose groups say that")
            return Simulator.of_fleet(self._read_fleet(settings, costs, config), **options)
        for name, value in settings.items():
            if is_of_fleet(name) and value is not None:
                raise ConfigError(f"{name}: found {value!r} without a fleet, expected one whose file has it")
        assert costs is not None
        split, link = settings.get("disaggregate"), settings.get("link")
        if (split is None) != (link is None):
            missing, other = ("disaggregate", "link") if split is None else ("link", "disaggregate")
            raise ConfigError(f"{missing}: found nothing with {other}, expected a value")
        complete = costs.settings(config)
        if split is None:
            return Simulator(complete, costs, **options)
        price = options.pop("price_per_h", None)
        prefill, decode = parse_disaggregation(str(split))
        fleet = disaggregated(costs, complete, prefill, decode, known_link(str(link)), price)
        return Simulator.of_fleet(fleet, **options)

    def cost_models(self, settings: Settings) -> list[CostModel]:
        """The step times of a replay with these settings, each once. Raises as `simulator`."""
        costs = self._costs(settings)
        if self.fleet is None:
            return [] if costs is None else [costs]
        return self._read_fleet(settings, costs, {"num_blocks": 1}).cost_models

    def hash(self, axes: Mapping[str, Iterable[Value]]) -> str:
        """SHA-256 of all that step times and replicas follow from, beside the settings.

        axes: the values of settings; those of step times may name files.
        """
        sources: dict[CostSource, None] = {} if self.costs is None else {self.costs: None}
        names = [name for name in axes if name in SOURCE_SETTINGS or set(TIMES) & set(name.split("."))]
        for values in product(*(axes[name] for name in names)):
            settings = dict(zip(names, values, strict=True))
            try:
                if self.costs is not None:
                    sources[self._source(settings)] = None
                if self.fleet is not None:
                    self._read_fleet(settings, self._costs(settings), {"num_blocks": 1}, sources)
            except PagellmError:
                continue  # the point says so
        parts = [source.hash() for source in sources]
        if self.fleet is not None:
            parts.append(hash_of(self.fleet))
        return parts[0] if len(parts) == 1 else sha256(" ".join(parts).encode()).hexdigest()

    def full_settings(self, settings: Settings) -> dict[str, Value]:
        """These settings and the defaults of all others that are known, by name: equal for equal replays."""
        given = {name: settings.get(name, getattr(Simulator, name)) for name in REPLAY_TYPES}
        given |= {name: value for name, value in settings.items() if name in CONFIG_TYPES}
        if self.fleet is None:  # else they are those of each group
            try:
                costs = self._costs(settings)
                assert costs is not None
                defaults = costs.settings({})
                given = {name: getattr(defaults, name) for name in CONFIG_TYPES} | given
            except PagellmError:
                pass  # there will be no replay
        given |= {
            name: value
            for name, value in settings.items()
            if name not in given and value is not None and (name != "seed" or value)
        }
        return dict(sorted(given.items()))

    def _source(self, settings: Settings) -> CostSource:
        assert self.costs is not None
        source = self.costs
        if settings.get("hardware") is not None:
            source = source.on(str(settings["hardware"]))
        ways = ("pipeline_parallel", "data_parallel")
        given: dict[str, Any] = {name: settings[name] for name in ways if name in settings}
        return replace(source, **given) if given else source

    def _costs(self, settings: Settings) -> CostModel | None:
        if self.costs is None:
            for name in SOURCE_SETTINGS:
                if settings.get(name) is not None:
                    expected = f"a fleet without step times of its own; else GROUP.{name}"
                    raise ConfigError(f"{name}: found {found(settings[name])}, expected {expected}")
            return None
        return load_costs(self._source(settings))

    def _read_fleet(
        self,
        settings: Settings,
        costs: CostModel | None,
        config: Mapping[str, Any],
        sources: dict[CostSource, None] | None = None,
    ) -> Fleet:
        def load(source: CostSource) -> CostModel:
            if sources is not None:
                sources[source] = None
            return load_costs(source)

        assert self.fleet is not None
        others = {name: value for name, value in settings.items() if is_of_fleet(name)}
        return read_fleet(self.fleet, costs, config, others, load)
