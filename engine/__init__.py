"""pagellm's engine: everything from text to tokens. The names below are the public API, imported on use."""

from typing import TYPE_CHECKING, Any

if __name__ != "pagellm.engine":
    raise ImportError("engine: import it as pagellm.engine", name=__name__)

if TYPE_CHECKING:
    from pagellm.engine.beam_search import BeamSearchParams
    from pagellm.engine.config import EngineConfig
    from pagellm.engine.errors import (
        CheckpointError,
        ConfigError,
        EngineError,
        PagellmError,
        PolicyError,
        ProfileError,
        ReportError,
        RequestError,
        TraceError,
    )
    from pagellm.engine.llm import LLM
    from pagellm.engine.llm_engine import LLMEngine
    from pagellm.engine.requests.outputs import CompletionOutput, FinishReason, Metrics, RequestOutput
    from pagellm.engine.requests.sampling_params import SamplingParams
    from pagellm.engine.requests.structured import StructuredOutputs
    from pagellm.engine.scheduling.policies import (
        AdmissionPolicy,
        BudgetPolicy,
        EvictionPolicy,
        SchedulingPolicy,
        VictimPolicy,
    )

_MODULES = {
    "LLM": "llm",
    "LLMEngine": "llm_engine",
    "EngineConfig": "config",
    "SamplingParams": "requests.sampling_params",
    "StructuredOutputs": "requests.structured",
    "BeamSearchParams": "beam_search",
    "SchedulingPolicy": "scheduling.policies",
    "VictimPolicy": "scheduling.policies",
    "AdmissionPolicy": "scheduling.policies",
    "EvictionPolicy": "scheduling.policies",
    "BudgetPolicy": "scheduling.policies",
    "RequestOutput": "requests.outputs",
    "CompletionOutput": "requests.outputs",
    "FinishReason": "requests.outputs",
    "Metrics": "requests.outputs",
    "PagellmError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "EngineError": "errors",
    "PolicyError": "errors",
    "ProfileError": "errors",
    "ReportError": "errors",
    "RequestError": "errors",
    "TraceError": "errors",
}

__all__ = [
    "LLM",
    "AdmissionPolicy",
    "BeamSearchParams",
    "BudgetPolicy",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineError",
    "EvictionPolicy",
    "FinishReason",
    "LLMEngine",
    "Metrics",
    "PagellmError",
    "PolicyError",
    "ProfileError",
    "ReportError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SchedulingPolicy",
    "StructuredOutputs",
    "TraceError",
    "VictimPolicy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pagellm.engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pagellm.engine.{_MODULES[name]}"), name)
