"""pagellm's simulator: what predicts. The names below are the public API, imported on use."""

from typing import TYPE_CHECKING, Any

if __name__ != "pagellm.sim":
    raise ImportError("sim: import it as pagellm.sim", name=__name__)

if TYPE_CHECKING:
    from pagellm.sim.costs.cost_model import CostModel
    from pagellm.sim.costs.source import CostSource
    from pagellm.sim.report.metrics import MetricsCollector
    from pagellm.sim.report.report import compare, to_html
    from pagellm.sim.report.schema import Report, load_report
    from pagellm.sim.router import Router
    from pagellm.sim.simulator import Simulator
    from pagellm.sim.sweep.grid import Grid, Slo
    from pagellm.sim.sweep.sweep import Sweep, SweepResult, TraceFile
    from pagellm.sim.traces.prompt_tokens import PromptTokens
    from pagellm.sim.traces.request import TraceRequest
    from pagellm.sim.traces.synth import Workload, synthesise
    from pagellm.sim.traces.trace import Trace

_MODULES = {
    "CostModel": "costs.cost_model",
    "CostSource": "costs.source",
    "Grid": "sweep.grid",
    "MetricsCollector": "report.metrics",
    "PromptTokens": "traces.prompt_tokens",
    "Report": "report.schema",
    "Router": "router",
    "Simulator": "simulator",
    "Slo": "sweep.grid",
    "Sweep": "sweep.sweep",
    "SweepResult": "sweep.sweep",
    "Trace": "traces.trace",
    "TraceFile": "sweep.sweep",
    "TraceRequest": "traces.request",
    "Workload": "traces.synth",
    "compare": "report.report",
    "load_report": "report.schema",
    "synthesise": "traces.synth",
    "to_html": "report.report",
}

__all__ = [
    "CostModel",
    "CostSource",
    "Grid",
    "MetricsCollector",
    "PromptTokens",
    "Report",
    "Router",
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
        raise AttributeError(f"module 'pagellm.sim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pagellm.sim.{_MODULES[name]}"), name)
