"""The extension points: small classes that the scheduler and the block manager ask, and those built in."""

from pagellm.engine.scheduling.policies.admission import Admission, AdmissionPolicy
from pagellm.engine.scheduling.policies.budget import BUDGET_POLICIES, BudgetPolicy
from pagellm.engine.scheduling.policies.checked import CheckedPolicies
from pagellm.engine.scheduling.policies.eviction import EvictionPolicy
from pagellm.engine.scheduling.policies.load import KINDS, load_policy
from pagellm.engine.scheduling.policies.order import (
    POLICIES,
    EarliestDeadline,
    Fair,
    PrefillFirst,
    Priority,
    SchedulingPolicy,
    ShortestJob,
)
from pagellm.engine.scheduling.policies.policy import Key, Policy
from pagellm.engine.scheduling.policies.victim import VictimPolicy
from pagellm.engine.scheduling.policies.views import BlockView, SchedulerStats, SequenceView, StepView

__all__ = [
    "BUDGET_POLICIES",
    "KINDS",
    "POLICIES",
    "Admission",
    "AdmissionPolicy",
    "BlockView",
    "BudgetPolicy",
    "CheckedPolicies",
    "EarliestDeadline",
    "EvictionPolicy",
    "Fair",
    "Key",
    "Policy",
    "PrefillFirst",
    "Priority",
    "SchedulerStats",
    "SchedulingPolicy",
    "SequenceView",
    "ShortestJob",
    "StepView",
    "VictimPolicy",
    "load_policy",
]
