"""pagellm's simulator: what predicts. The names below are the public API, imported on use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.cost_model import CostModel
    from sim.metrics import MetricsCollector, Report
    from sim.prompt_tokens import PromptTokens
    from sim.report import compare, load_report, to_html
    from sim.simulator import Simulator
    from sim.sweep import CostSource, Sweep, SweepResult, TraceFile
    from sim.sweep_grid import Grid, Slo
    from sim.synth import Workload, synthesise
    from sim.trace import Trace
    from sim.trace_request import TraceRequest

_MODULES = {
    "CostModel": "cost_model",
    "CostSource": "sweep",
    "Grid": "sweep_grid",
    "MetricsCollector": "metrics",
    "PromptTokens": "prompt_tokens",
    "Report": "metrics",
    "Simulator": "simulator",
    "Slo": "sweep_grid",
    "Sweep": "sweep",
    "SweepResult": "sweep",
    "Trace": "trace",
    "TraceFile": "sweep",
    "TraceRequest": "trace_request",
    "Workload": "synth",
    "compare": "report",
    "load_report": "report",
    "synthesise": "synth",
    "to_html": "report",
}

__all__ = [
    "CostModel",
    "CostSource",
    "Grid",
    "MetricsCollector",
    "PromptTokens",
    "Report",
    "Simulator",
    "Slo",
    "Sweep",
    "SweepResult",
    "Trace",
    "TraceFile",
    "TraceRequest",
    "Workload",
    "compare",
    "load_report",
    "synthesise",
    "to_html",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sim.{_MODULES[name]}"), name)
