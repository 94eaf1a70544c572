"""A policy by the name of one that is built in, as module:Class or as path/file.py:Class."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from pagellm.engine.errors import ConfigError, found
from pagellm.engine.scheduling.policies.admission import ADMISSION_POLICIES, AdmissionPolicy
from pagellm.engine.scheduling.policies.budget import BUDGET_POLICIES, BudgetPolicy
from pagellm.engine.scheduling.policies.eviction import EVICTION_POLICIES, EvictionPolicy
from pagellm.engine.scheduling.policies.order import ORDER_CHANGES, POLICIES, SchedulingPolicy
from pagellm.engine.scheduling.policies.policy import Policy
from pagellm.engine.scheduling.policies.victim import VICTIM_POLICIES, VictimPolicy
from pagellm.engine.user_policy import user_module

_Base = TypeVar("_Base")


class Kind(NamedTuple):
    """What a setting takes. then: what happens after one of the user's has failed."""

    base: type[Policy]
    built_in: Mapping[str, type[Policy]]
    then: str


# By the setting's name. The first class of each is what stands in for one that fails.
KINDS: dict[str, Kind] = {
    "policy": Kind(SchedulingPolicy, POLICIES, "it goes on first come first served"),
    "victim": Kind(VictimPolicy, VICTIM_POLICIES, "from here on the last to arrive makes way"),
    "admission": Kind(AdmissionPolicy, ADMISSION_POLICIES, "from here on everybody is accepted"),
    "eviction": Kind(EvictionPolicy, EVICTION_POLICIES, "from here on the least recently used goes first"),
    "budget": Kind(BudgetPolicy, BUDGET_POLICIES, "from here on steps are as large as the settings allow"),
}


def load_policy(name: str, setting: str = "policy") -> Policy:
    """The policy of a setting. Raises `ConfigError`."""
    kind = KINDS[setting]
    return load_class(name, setting, kind.base, kind.built_in)


def load_class(name: str, setting: str, base: type[_Base], built_in: Mapping[str, type[_Base]]) -> _Base:
    """An instance of a built-in class, or of the user's, a subclass of `base`. Raises `ConfigError`."""
    if name in built_in:
        return built_in[name]()
    module_name, _, class_name = name.rpartition(":")
    if not module_name or not class_name or module_name.endswith(("/", ":")):
        raise ConfigError(
            f"{setting}: found {name!r}, expected {', '.join(built_in)}, module:Class or path/file.py:Class"
        )
    try:
        policy = getattr(user_module(module_name), class_name)()
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(f"{setting}: {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(policy, base):
        raise ConfigError(f"{setting}: found {name!r}, expected a subclass of pagellm.{base.__name__}")
    changes = getattr(policy, "order_changes", ORDER_CHANGES[0])
    if changes not in ORDER_CHANGES:
        raise ConfigError(
            f"{setting}: {name!r}: order_changes: found {found(changes)}, expected one of "
            f"{', '.join(ORDER_CHANGES)}"
        )
    return policy
