"""A fleet from a file: TOML, or JSON of the same form. Every key is known, or refused by its name.

    [[group]]
    name = "large"                  # one for each group; default: group 1, group 2, ...
    count = 2                       # replicas; default: 1. Of 0 the group is not there
    hardware = "h100-sxm"           # a name in hardware.json, or a file of that form
    model = "llama-3.1-8b"          # a name there, a config.json, or a GGUF file
    tensor_parallel = 2             # devices that share each layer; default: 1
    pipeline_parallel = 2           # stages of so many devices; default: 1
    data_parallel = 4               # ranks of all these; default: 1
    set_cost = {product_flops = 0.7}    # constants of its step times
    costs = "costs.json"            # constants that `pagellm fit` has written
    profile = "profile.json"        # in the place of hardware and model
    serves = ["gpt-4"]              # what requests call its model; default: its own name
    engine = {max_num_seqs = 64}    # settings of its engine
    price_per_h = 2.5               # of a device, in any unit
    power_w = 700                   # of a device while it computes; default: as hardware.json has it
    idle_power_w = 140              # and while it does not
    role = "prefill"                # or "decode", beside each other; default: "both"
    link = "infiniband-ndr"         # which KV goes over between them: one of [[link]], or of hardware.json
    start_s = 60                    # from starting a replica to its being ready; default: 0
    autoscale = {rule = "concurrency", target = 32, min = 1, max = 8, interval_s = 15, down_after_s = 300}

    [[link]]
    name = "slow"
    bytes_per_s = 1e9               # of each device, as they are reached
    latency_s = 1e-4
    shared = false                  # one transfer at a time in all, not one to and one from each replica

    [[failure]]                     # of a replica, counted from 0 in its group
    time_s = 100
    group = "large"
    replica = 1
    down_s = 30                     # until it is repaired; then it starts

    [failures]                      # exponential ones, of all replicas or those of some groups
    mtbf_s = 86400
    mttr_s = 600
    seed = 1
    groups = ["large"]

At the top, before all tables:

    migration_limit = 3             # how often a request goes on elsewhere after failures; default: always

A group that says neither what its hardware and model are nor its profile has the step times of the caller.
Paths are looked for beside the file first.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, TypeVar

from pagellm.engine.checks import flag
from pagellm.engine.checks import path as checked_path
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, PagellmError, found
from pagellm.engine.step_log import NO_DECISIONS
from pagellm.sim.costs.constants import FILES
from pagellm.sim.costs.cost_model import CostModel
from pagellm.sim.costs.source import CostSource
from pagellm.sim.fields import Fields, read_bounded, read_json
from pagellm.sim.fleet.fleet import Autoscale, Failure, Fleet, Group, Link, RandomFailures, known_link

_Made = TypeVar("_Made", Link, Failure, RandomFailures, Autoscale)
_WAYS = ("tensor_parallel", "pipeline_parallel", "data_parallel")
TIMES = ("hardware", "model", *_WAYS, "set_cost", "costs", "profile")  # what says what step times are
_NUMBERS = ("price_per_h", "power_w", "idle_power_w")
_GROUP = ("name", "count", "role", "serves", "engine", "link", "start_s", "autoscale", *TIMES, *_NUMBERS)
_TOP = ("group", "link", "failure", "failures", "migration_limit")
# Settings of an engine that a group may have: those which decisions follow from.
_ENGINE = tuple(name for name in EngineConfig.__dataclass_fields__ if name not in NO_DECISIONS)


def read_fleet(
    file: str,
    costs: CostModel | None = None,
    settings: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
    load: Callable[[CostSource], CostModel] = CostSource.load,
) -> Fleet:
    """The fleet that a file describes.

    costs: step times of groups that say nothing of theirs. settings: of all engines, where a group does not
    say otherwise. others: values of keys in the place of the file's, such as large.count and failures.mtbf_s;
    None takes a key away. load: makes step times. Raises `ConfigError`, and what reading models and profiles
    raises.
    """
    reader = _Reader(checked_path("fleet", file, ConfigError), costs, settings or {}, others or {}, load)
    return reader.fleet()


@dataclass
class _Reader:
    path: Path
    costs: CostModel | None
    settings: Mapping[str, Any]
    others: Mapping[str, Any]
    load: Callable[[CostSource], CostModel]

    def __post_init__(self) -> None:
        self._loaded: dict[CostSource, CostModel] = {}

    def fleet(self) -> Fleet:
        top = self._section(self._changed(self._read()), "", _TOP, "a fleet")
        links = [self._made(Link, values, f"link[{n}]") for n, values in enumerate(top.entries("link"))]
        self._links: dict[str, Link] = {}
        for link in links:
            if link.name in self._links:
                raise ConfigError(
                    f"{self.path}: link: found two called {found(link.name)}, expected one name for each"
                )
            self._links[link.name] = link
        groups = [
            self._group(number, values)
            for number, values in enumerate(top.entries("group"))
            if not _is_empty(values)
        ]
        if not groups:
            found_ = "groups of no replica" if top.entries("group") else "nothing"
            raise ConfigError(
                f"{self.path}: group: found {found_}, expected at least one [[group]] with some"
            )
        if self.costs is not None and all(map(_has_step_times, top.entries("group"))):
            raise ConfigError(
                f"{self.path}: found step times of its own in every group, expected none given beside it"
            )
        failures = [
            self._made(Failure, values, f"failure[{n}]") for n, values in enumerate(top.entries("failure"))
        ]
        at_random = None
        if top.has("failures"):
            at_random = self._made(RandomFailures, top.get("failures"), "failures")
        limit = top.integer("migration_limit", 0) if top.has("migration_limit") else None
        try:
            return Fleet(tuple(groups), tuple(failures), at_random, limit)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {str(error).removeprefix('fleet: ')}") from None

    def _read(self) -> Any:
        if self.path.suffix == ".json":
            return read_json(self.path, "a fleet", ConfigError)
        import tomllib  # others have no use for it, and a replay without a fleet should start at once

        content = read_bounded(self.path, ConfigError)
        try:
            return tomllib.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path}: found {error}, expected a fleet as TOML") from None

    def _changed(self, document: Any) -> Any:
        """The document with other values of some keys."""
        if not self.others or not isinstance(document, dict):
            return document
        if any(key.startswith("failures.") for key in self.others):
            document.setdefault("failures", {})
        places = {str(name): values for name, values in document.items() if isinstance(values, dict)}
        groups = document.get("group")
        for number, values in enumerate(groups if isinstance(groups, list) else ()):
            if isinstance(values, dict):
                places[str(values.get("name") or _default_name(number))] = values
        for key, value in self.others.items():
            # Of a group called "a.b" the keys begin with that, and not with a group's called "a".
            name = max((name for name in places if key.startswith(f"{name}.")), key=len, default=None)
            inner, path = document, [key]
            if name is not None:
                inner, path = places[name], key.removeprefix(f"{name}.").split(".")
            elif "." in key:
                expected = f"a key of one of {', '.join(places)}"
                raise ConfigError(f"{self.path}: found no place for {found(key)}, expected {expected}")
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    raise ConfigError(
                        f"{self.path}: {key}: found {found(inner)} before its end, expected keys"
                    )
            inner[path[-1]] = value
        if self.others.get("failures.mtbf_s", 0) is None:  # without them there are none at random
            del document["failures"]
        return document

    def _section(self, values: Any, prefix: str, names: tuple[str, ...], what: str) -> Fields:
        fields = Fields(values, str(self.path), ConfigError, prefix, what)
        for name in fields.values:
            if name not in names:
                raise fields.bad(str(name), fields.get(name), f"no such key: one of {', '.join(names)}")
        return fields

    def _made(self, kind: type[_Made], values: Any, place: str) -> _Made:
        """One of the small parts, whose keys are the fields of its class."""
        known = fields_of(kind)
        fields = self._section(values, f"{place}.", tuple(one.name for one in known), place)
        given: dict[str, Any] = {}
        for one in known:
            if one.default is MISSING and not fields.has(one.name):
                raise fields.bad(one.name, None, "a value")
            if fields.has(one.name):
                given[one.name] = self._typed(fields, one.name, one.type)
        try:
            return kind(**given)
        except ConfigError as error:
            raise _placed(error, f"{self.path}: {place}") from None

    def _typed(self, fields: Fields, name: str, kind: Any) -> Any:
        if kind is str:
            return fields.text(name)
        if kind is bool:
            return flag(f"{fields.place}: {fields.prefix}{name}", fields.get(name), ConfigError)
        if kind is int:
            return fields.integer(name, 0)
        return fields.number(name) if kind is float else tuple(_texts(fields, name))

    def _link(self, fields: Fields) -> Link | None:
        if not fields.has("link"):
            return None
        try:
            return self._links.get(name := fields.text("link")) or known_link(name, self._links)
        except ConfigError as error:
            raise ConfigError(f"{fields.place}: {fields.prefix}{error}") from None

    def _group(self, number: int, values: Any) -> Group:
        fields = self._section(values, f"group[{number}].", _GROUP, "a group")
        name = fields.text("name") if fields.has("name") else _default_name(number)
        costs = self._costs(fields)
        place = f"group[{number}].autoscale"
        autoscale = self._made(Autoscale, fields.get("autoscale"), place) if fields.has("autoscale") else None
        least = 1 if autoscale is None else max(1, autoscale.min)
        numbers: dict[str, Any] = {key: fields.number(key) if fields.has(key) else None for key in _NUMBERS}
        try:
            return Group(
                costs=costs,
                config=costs.settings({**self.settings, **self._engine(fields, number)}),
                name=name,
                count=fields.integer("count") if fields.has("count") else least,
                role=fields.text("role") if fields.has("role") else "both",
                serves=tuple(_texts(fields, "serves")),
                link=self._link(fields),
                start_s=fields.seconds("start_s") if fields.has("start_s") else 0.0,
                autoscale=autoscale,
                **numbers,
            )
        except ConfigError as error:
            raise _placed(error, f"{self.path}: group[{number}]") from None

    def _engine(self, fields: Fields, number: int) -> Mapping[str, Any]:
        if not fields.has("engine"):
            return {}
        return self._section(fields.get("engine"), f"group[{number}].engine.", _ENGINE, "settings").values

    def _costs(self, fields: Fields) -> CostModel:
        given = [name for name in TIMES if fields.has(name)]
        if not given:
            if self.costs is None:
                raise fields.bad("hardware", None, "the name of a device, or step times from the caller")
            return self.costs
        source = self._source(fields, given)
        if source not in self._loaded:
            try:
                self._loaded[source] = self.load(source)
            except PagellmError as error:
                raise _placed(error, f"{self.path}: {fields.prefix.removesuffix('.')}") from None
        return self._loaded[source]

    def _source(self, fields: Fields, given: list[str]) -> CostSource:
        if "profile" in given:
            if len(given) > 1:
                raise fields.bad(given[0], fields.get(given[0]), "no such key beside a profile")
            return CostSource(profile=self._beside(fields.text("profile")))
        devices, stages, ranks = (fields.integer(way) if fields.has(way) else 1 for way in _WAYS)
        hardware, model = (self._beside(fields.text(name)) for name in ("hardware", "model"))
        constants: Mapping[str, Any] = fields.section("set_cost").values if fields.has("set_cost") else {}
        files = {
            name: self._beside(constants[name]) for name in FILES if isinstance(constants.get(name), str)
        }
        costs = self._beside(fields.text("costs")) if fields.has("costs") else None
        given_constants = tuple({**constants, **files}.items())
        return CostSource(None, (hardware, model, devices), given_constants, costs, stages, ranks)

    def _beside(self, name: str) -> str:
        """A path as it is from here, where the file's own directory has it; else as it is."""
        beside = self.path.parent / checked_path("fleet", name, ConfigError)
        return str(beside) if beside.exists() else name


def _is_empty(group: Any) -> bool:
    """Whether a group has no replicas, and never will."""
    is_fixed = isinstance(group, dict) and group.get("autoscale") is None
    return is_fixed and type(group.get("count")) is int and group["count"] == 0


def _has_step_times(group: Any) -> bool:
    return isinstance(group, dict) and any(group.get(name) is not None for name in TIMES)


def _default_name(number: int) -> str:
    return f"group {number + 1}"


def _texts(fields: Fields, name: str) -> list[str]:
    texts = fields.entries(name)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise fields.bad(name, text, "a list of names")
    return texts


def _placed(error: PagellmError, place: str) -> PagellmError:
    """The same error with the place that it is about."""
    message = str(error)
    return error if message.startswith(place.partition(":")[0]) else type(error)(f"{place}: {message}")
