"""pagellm's engine: everything from text to tokens. The names below are the public API, imported on use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.errors import CheckpointError, ConfigError, PagellmError, RequestError
    from engine.llm import LLM
    from engine.llm_engine import LLMEngine
    from engine.outputs import CompletionOutput, FinishReason, Metrics, RequestOutput
    from engine.sampling_params import SamplingParams

_MODULES = {
    "LLM": "llm",
    "LLMEngine": "llm_engine",
    "EngineConfig": "config",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "FinishReason": "outputs",
    "Metrics": "outputs",
    "PagellmError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "RequestError": "errors",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "FinishReason",
    "LLMEngine",
    "Metrics",
    "PagellmError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"engine.{_MODULES[name]}"), name)
