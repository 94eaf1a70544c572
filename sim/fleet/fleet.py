"""What serves: groups of replicas, each with its model, step times, settings and role; links and failures.

A description, checked when it is made; what happens to it in a replay is the business of others.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pagellm.engine.checks import SMALLEST, flag, integer, number
from pagellm.engine.config import CompleteConfig, EngineConfig
from pagellm.engine.errors import ConfigError, found
from pagellm.sim.costs.cost_model import CostConstant, CostModel
from pagellm.sim.costs.devices import known

_MOST_POWER = "the most that a device may draw, so an upper bound"
ROLES = ("both", "prefill", "decode")
RULES = ("concurrency", "waiting", "kv_usage")
# Each takes some 200 kB; and events of each that are closer together than this are no replay to wait for.
MAX_ENGINES = 1 << 14
_SHORTEST_S = 1e-3


@dataclass(frozen=True)
class Link:
    """What KV travels over: of each device that sends or receives.

    bytes_per_s: as it is reached. latency_s: of a transfer, however small. shared: one transfer at a time
    goes over it in all, else one from each replica and one to each.
    """

    name: str
    bytes_per_s: float
    latency_s: float = 0.0
    shared: bool = False

    def __post_init__(self) -> None:
        place = f"link {self.name}"
        number(f"{place}: bytes_per_s", self.bytes_per_s, SMALLEST, error=ConfigError, expected="above 0")
        number(f"{place}: latency_s", self.latency_s, 0, error=ConfigError)
        flag(f"{place}: shared", self.shared, ConfigError)


def known_link(name: str, others: Iterable[str] = ()) -> Link:
    """A link by its name in hardware.json. others: names that there are beside. Raises `ConfigError`."""
    links = known()["links"]
    if name not in links:
        raise ConfigError(f"link: found {found(name)}, expected one of {', '.join((*others, *links))}")
    return Link(name, float(links[name]["bytes_per_s"]), float(links[name]["latency_s"]))


@dataclass(frozen=True)
class Autoscale:
    """How many replicas of a group there are, from `min` to `max`.

    Every interval_s seconds there shall be as many as keep the rule's figure, of one replica on average, at
    `target`: unfinished requests ("concurrency"), those that wait ("waiting"), or the share of KV blocks in
    use ("kv_usage"). Fewer only if no interval in the last down_after_s seconds wanted more.
    """

    max: int
    target: float
    min: int = 1
    rule: str = "concurrency"
    interval_s: float = 15.0
    down_after_s: float = 300.0

    def __post_init__(self) -> None:
        integer("autoscale: min", self.min, 0, error=ConfigError)
        integer("autoscale: max", self.max, max(1, self.min), error=ConfigError)
        if self.rule not in RULES:
            raise ConfigError(
                f"autoscale: rule: found {found(self.rule)}, expected one of {', '.join(RULES)}"
            )
        number("autoscale: target", self.target, SMALLEST, error=ConfigError, expected="above 0")
        number("autoscale: interval_s", self.interval_s, _SHORTEST_S, error=ConfigError)
        number("autoscale: down_after_s", self.down_after_s, 0, error=ConfigError)


@dataclass(frozen=True)
class Failure:
    """A replica of a group, by its place there from 0, fails and is repaired after down_s seconds."""

    time_s: float
    group: str
    replica: int = 0
    down_s: float = 0.0


@dataclass(frozen=True)
class RandomFailures:
    """Each replica fails mtbf_s seconds after it was ready, and is repaired after mttr_s: exponential, both.

    groups: whose replicas do; none: all. seed: of the times, which are each replica's own.
    """

    mtbf_s: float
    mttr_s: float = 0.0
    seed: int = 0
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number("failures: mtbf_s", self.mtbf_s, _SHORTEST_S, error=ConfigError)
        number("failures: mttr_s", self.mttr_s, 0, error=ConfigError)
        integer("failures: seed", self.seed, 0, error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Replicas that are alike.

    costs, config: their step times and settings. count: how many there are, at first if they are scaled.
    role: "both", or whether they compute prompts and the first token ("prefill") or what follows ("decode").
    serves: the names by which requests ask for its model; none: the model's own. link: which KV goes over, to
    and from them. start_s: seconds from starting one to its being ready. autoscale: None for a fixed count.
    price_per_h: of a device, in any unit. power_w, idle_power_w: of a device while it computes and while it
    does not; None: as the hardware has it.
    """

    costs: CostModel
    config: EngineConfig
    name: str = "all"
    count: int = 1
    role: str = "both"
    serves: tuple[str, ...] = ()
    link: Link | None = None
    start_s: float = 0.0
    autoscale: Autoscale | None = None
    price_per_h: float | None = None
    power_w: float | None = None
    idle_power_w: float | None = None

    def __post_init__(self) -> None:
        place = f"group {self.name}"
        integer(f"{place}: count", self.count, 1, error=ConfigError)
        if self.role not in ROLES:
            raise ConfigError(f"{place}: role: found {found(self.role)}, expected one of {', '.join(ROLES)}")
        scale = self.autoscale
        if scale is not None and not scale.min <= self.count <= scale.max:
            expected = f"a number from autoscale's min {scale.min} to its max {scale.max}"
            raise ConfigError(f"{place}: count: found {self.count}, expected {expected}")
        number(f"{place}: start_s", self.start_s, 0, error=ConfigError)
        for name in ("price_per_h", "power_w", "idle_power_w"):
            if getattr(self, name) is not None:
                number(f"{place}: {name}", getattr(self, name), 0, error=ConfigError)
        object.__setattr__(self, "config", self.costs.fill(self.config))

    @cached_property
    def complete(self) -> CompleteConfig:
        """The settings with nothing left open."""
        return self.config.complete()

    @property
    def max_count(self) -> int:
        """The most replicas that there may be."""
        return self.count if self.autoscale is None else self.autoscale.max

    @property
    def model(self) -> str:
        """The name of its model."""
        return self.costs.model_name or self.costs.name

    @property
    def names(self) -> tuple[str, ...]:
        """What requests call its model."""
        return self.serves or (self.model,)

    @property
    def num_devices(self) -> int:
        """Devices of one replica."""
        return self.costs.num_devices

    @property
    def engine_devices(self) -> int:
        """Of these, those that have the KV of one engine."""
        return max(1, self.costs.num_devices // self.costs.data_parallel)

    @property
    def powers_w(self) -> tuple[float, float] | None:
        """Of one of its devices, while it does not compute and while it does, if that is known."""
        idle = self.costs.idle_power_w if self.idle_power_w is None else self.idle_power_w
        busy = self.costs.power_w if self.power_w is None else self.power_w
        return None if busy is None else (idle or 0.0, busy)

    @property
    def powers(self) -> list[CostConstant]:
        """The same as constants, with where they are from; none where nothing is known."""
        if self.powers_w is None:
            return []
        idle_w, busy_w = self.powers_w
        table: list[CostConstant] = []
        for name, watts, given, device, source in (
            ("power_w", busy_w, self.power_w, self.costs.power_w, _MOST_POWER),
            ("idle_power_w", idle_w, self.idle_power_w, self.costs.idle_power_w, ""),
        ):
            origin: Literal["given", "device", "assumed"] = "device"
            assumed = self.costs.assumed_powers.get(name)
            if given is not None:
                origin, source = "given", ""
            elif device is None:
                origin, source = "assumed", "nothing is known of it"
            elif assumed is not None:
                origin, source = "assumed", assumed
            table.append({"name": name, "value": watts, "origin": origin, "source": source})
        return table

    def block_token_bytes(self) -> float | None:
        """Bytes of a token in a KV block, if they are known."""
        size = self.config.block_size
        block_bytes = self.costs.block_bytes(size)
        return None if block_bytes is None else block_bytes / size


@dataclass(frozen=True)
class Fleet:
    """Groups of replicas, and what befalls them. Raises `ConfigError` for what cannot be.

    migration_limit: how often a request whose replica fails goes on elsewhere with its prompt and what it has
    of its answer (Dynamo's --migration-limit); 0: never. None: always.
    """

    groups: tuple[Group, ...]
    failures: tuple[Failure, ...] = ()
    random_failures: RandomFailures | None = None
    migration_limit: int | None = None

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("fleet: found no group, expected at least one")
        if self.max_engines > MAX_ENGINES:
            raise ConfigError(
                f"replicas: found {self.max_engines} engines, data and pipeline parallel ranks among "
                f"them, expected at most {MAX_ENGINES}"
            )
        names = [group.name for group in self.groups]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"fleet: found two groups called {found(name)}, expected one name for each")
        delays = sorted({group.costs.frontend_s for group in self.groups})
        if len(delays) > 1:
            found_s = " and ".join(f"{delay:g}" for delay in delays)
            raise ConfigError(
                f"fleet: found frontend_s {found_s}, expected one for all groups, which have one front end"
            )
        for name, groups in self.by_name.items():
            sizes = sorted({group.config.block_size for group in groups})
            if len(sizes) > 1:
                values = " and ".join(map(str, sizes))
                raise ConfigError(
                    f"fleet: found block_size {values} for {found(name)}, expected one for all replicas of a "
                    "model, which are asked for the same prefixes"
                )
            _check_roles(name, groups)
        if self.migration_limit is not None:
            integer("migration_limit", self.migration_limit, 0, error=ConfigError)
        counts = {group.name: group.count for group in self.groups}
        for failure in self.failures:
            _check_failure(failure, counts)
        for name in () if self.random_failures is None else self.random_failures.groups:
            if name not in counts:
                raise ConfigError(
                    f"failures: groups: found {found(name)}, expected one of {', '.join(counts)}"
                )

    @property
    def moves(self) -> bool:
        """Whether requests go from one replica to another, replicas come and go, or several share devices."""
        return (
            bool(self.failures)
            or self.random_failures is not None
            or any(group.role != "both" or group.autoscale is not None for group in self.groups)
            or any(group.costs.num_engines > 1 for group in self.groups)
        )

    @property
    def num_replicas(self) -> int:
        """Replicas of all groups, at first."""
        return sum(group.count for group in self.groups)

    @property
    def max_engines(self) -> int:
        """The most engines that there may be; a router chooses among them."""
        return sum(group.max_count * group.costs.num_engines for group in self.groups)

    @property
    def cost_models(self) -> list[CostModel]:
        """The step times of all groups, each once."""
        return list({id(group.costs): group.costs for group in self.groups}.values())

    @cached_property
    def by_name(self) -> dict[str, list[Group]]:
        """The groups that serve each name."""
        named: dict[str, list[Group]] = {}
        for group in self.groups:
            for name in group.names:
                named.setdefault(name, []).append(group)
        return named

    @cached_property
    def asks_for_models(self) -> bool:
        """Whether requests must say by name what model they want; else all of them get the same."""
        return len({group.names for group in self.groups}) > 1 or any(group.serves for group in self.groups)

    def begin(self) -> None:
        """Prepares all step times for a replay. Raises `ConfigError`."""
        for costs in self.cost_models:
            groups = [group for group in self.groups if group.costs is costs]
            costs.begin(groups[0].config, sum(group.max_count for group in groups))


def disaggregated(
    costs: CostModel, config: EngineConfig, prefill: int, decode: int, link: Link, price_per_h: float | None
) -> Fleet:
    """So many replicas that compute prompts, and so many that go on with them, otherwise alike."""
    return Fleet(
        tuple(
            Group(
                costs=costs,
                config=config,
                name=role,
                role=role,
                count=count,
                link=link,
                price_per_h=price_per_h,
            )
            for role, count in (("prefill", prefill), ("decode", decode))
        )
    )


def parse_disaggregation(text: str) -> tuple[int, int]:
    """Numbers of prefill and decode replicas from P:D. Raises `ConfigError`."""
    prefill, _, decode = text.partition(":")
    counts = [int(count) if count.isdecimal() and len(count) < 8 else 0 for count in (prefill, decode)]
    if not all(counts):
        raise ConfigError(f"disaggregate: found {found(text)}, expected P:D, two numbers of replicas from 1")
    return counts[0], counts[1]


def _check_roles(name: str, groups: list[Group]) -> None:
    """Raises `ConfigError` where what computes prompts and what goes on from there do not fit together."""
    senders = [group for group in groups if group.role == "prefill"]
    receivers = [group for group in groups if group.role == "decode"]
    if senders and not [group for group in groups if group.role != "prefill"]:
        raise ConfigError(
            f"fleet: found a prefill group, {senders[0].name}, for {found(name)}, expected a decode one, too"
        )
    if receivers and not senders:
        raise ConfigError(
            f"fleet: found a decode group, {receivers[0].name}, for {found(name)}, expected a prefill one, "
            "too"
        )
    if not senders:
        return
    sizes = {group.block_token_bytes() for group in groups}
    if len(sizes) > 1 or None in sizes:
        shown = " and ".join(sorted("nothing" if size is None else f"{size:g}" for size in sizes))
        raise ConfigError(
            f"fleet: found {shown} bytes of KV a token for {found(name)}, expected the same of all groups "
            "that hand it to each other"
        )
    for group in groups:
        if group.link is None:
            raise ConfigError(
                f"fleet: group {group.name}: link: found nothing, expected the name of what KV goes over "
                "from prefill to decode"
            )


def _check_failure(failure: Failure, counts: dict[str, int]) -> None:
    if failure.group not in counts:
        raise ConfigError(
            f"failure: group: found {found(failure.group)}, expected one of {', '.join(counts)}"
        )
    integer("failure: replica", failure.replica, 0, counts[failure.group] - 1, ConfigError)
    for name in ("time_s", "down_s"):
        number(f"failure: {name}", getattr(failure, name), 0, error=ConfigError)
