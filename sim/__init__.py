"""pagellm's simulator: what predicts. The names below are the public API, imported on use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.cost_model import CostModel
    from sim.metrics import MetricsCollector, Report
    from sim.prompt_tokens import PromptTokens
    from sim.simulator import Simulator
    from sim.synth import Workload, synthesise
    from sim.trace import Trace
    from sim.trace_request import TraceRequest

_MODULES = {
    "CostModel": "cost_model",
    "MetricsCollector": "metrics",
    "PromptTokens": "prompt_tokens",
    "Report": "metrics",
    "Simulator": "simulator",
    "Trace": "trace",
    "TraceRequest": "trace_request",
    "Workload": "synth",
    "synthesise": "synth",
}

__all__ = [
    "CostModel",
    "MetricsCollector",
    "PromptTokens",
    "Report",
    "Simulator",
    "Trace",
    "TraceRequest",
    "Workload",
    "synthesise",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sim.{_MODULES[name]}"), name)
