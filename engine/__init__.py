"""pagellm's engine: everything from text to tokens. The names below are the public API, imported on use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.beam_search import BeamSearchParams
    from engine.config import EngineConfig
    from engine.errors import (
        CheckpointError,
        ConfigError,
        PagellmError,
        PolicyError,
        ProfileError,
        ReportError,
        RequestError,
        TraceError,
    )
    from engine.llm import LLM
    from engine.llm_engine import LLMEngine
    from engine.outputs import CompletionOutput, FinishReason, Metrics, RequestOutput
    from engine.policies import SchedulingPolicy
    from engine.sampling_params import SamplingParams

_MODULES = {
    "LLM": "llm",
    "LLMEngine": "llm_engine",
    "EngineConfig": "config",
    "SamplingParams": "sampling_params",
    "BeamSearchParams": "beam_search",
    "SchedulingPolicy": "policies",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "FinishReason": "outputs",
    "Metrics": "outputs",
    "PagellmError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "PolicyError": "errors",
    "ProfileError": "errors",
    "ReportError": "errors",
    "RequestError": "errors",
    "TraceError": "errors",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
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
    "TraceError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"engine.{_MODULES[name]}"), name)
