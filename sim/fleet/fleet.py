"""What serves: groups of replicas, each with its model, step times, settings and role, and what they cost.

A description, checked when it is made; what happens to it in a replay is the business of others.
"""

from dataclasses import dataclass
from functools import cached_property

from pagellm.engine.checks import integer, number
from pagellm.engine.config import CompleteConfig, EngineConfig
from pagellm.engine.errors import ConfigError, found
from pagellm.sim.costs.cost_model import CostModel

ROLES = ("both",)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Replicas that are alike.

    costs, config: their step times and settings. count: how many there are. role: "both". serves: the names
    by which requests ask for its model; none: the model's own. price_per_h: of a device, in any unit.
    power_w, idle_power_w: of a device while it computes and while it does not; None: as the hardware has it.
    """

    costs: CostModel
    config: EngineConfig
    name: str = "all"
    count: int = 1
    role: str = "both"
    serves: tuple[str, ...] = ()
    price_per_h: float | None = None
    power_w: float | None = None
    idle_power_w: float | None = None

    def __post_init__(self) -> None:
        place = f"group {self.name}"
        integer(f"{place}: count", self.count, 1, error=ConfigError)
        if self.role not in ROLES:
            raise ConfigError(f"{place}: role: found {found(self.role)}, expected one of {', '.join(ROLES)}")
        for name in ("price_per_h", "power_w", "idle_power_w"):
            if getattr(self, name) is not None:
                number(f"{place}: {name}", getattr(self, name), 0, error=ConfigError)
        object.__setattr__(self, "config", self.costs.fill(self.config))

    @cached_property
    def complete(self) -> CompleteConfig:
        """The settings with nothing left open."""
        return self.config.complete()

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
    def powers_w(self) -> tuple[float, float] | None:
        """Of one of its devices, while it does not compute and while it does, if that is known."""
        idle = self.costs.idle_power_w if self.idle_power_w is None else self.idle_power_w
        busy = self.costs.power_w if self.power_w is None else self.power_w
        return None if busy is None else (idle or 0.0, busy)

    def block_token_bytes(self) -> float | None:
        """Bytes of a token in a KV block, if they are known."""
        size = self.config.block_size
        block_bytes = self.costs.block_bytes(size)
        return None if block_bytes is None else block_bytes / size


@dataclass(frozen=True)
class Fleet:
    """Groups of replicas. Raises `ConfigError` for what cannot be."""

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("fleet: found no group, expected at least one")
        names = [group.name for group in self.groups]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"fleet: found two groups called {found(name)}, expected one name for each")
        for name, groups in self.by_name.items():
            sizes = sorted({group.config.block_size for group in groups})
            if len(sizes) > 1:
                values = " and ".join(map(str, sizes))
                raise ConfigError(
                    f"fleet: found block_size {values} for {found(name)}, expected one for all replicas of a "
                    "model, which are asked for the same prefixes"
                )

    @property
    def num_replicas(self) -> int:
        """Replicas of all groups."""
        return sum(group.count for group in self.groups)

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
            costs.begin(groups[0].config, sum(group.count for group in groups))
