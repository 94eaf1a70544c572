"""The engine's settings, checked when they are made."""

import os
from dataclasses import dataclass

from engine.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
MAX_THREADS = 1024
QUANTIZATIONS = ("auto", "none", "bf16", "int8", "int4")


@dataclass(frozen=True)
class EngineConfig:
    """What the engine and the simulator are run with; a bad value is a `ConfigError` that names it.

    block_size: tokens of one KV block. A multiple of 16 suits the kernels best; any size gives the same bits.
    num_blocks: blocks of the KV cache. None: a quarter of the free memory, no more than max_num_seqs whole
    contexts, at least one.
    enable_prefix_caching: keep the KV of full blocks for later requests that begin with the same tokens.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens computed in one step, prefill
    chunks and decodes together. max_model_len: tokens of prompt and output. None: the model's own limit, or
    what the KV cache holds if that is less.
    num_threads: threads that compute. None: one for each core that this process may use.
    quantization: the format of the weight matrices. "auto": as the checkpoint has them, where it has them in
    blocks of 8 or 4 bits (GGUF's Q8_0, Q4_0, Q4_1), and float32 where not; "none": float32; "bf16", "int8",
    "int4": converted on load, where the checkpoint has them otherwise. With anything but float32, activations
    are rounded to bfloat16 or to int8 blocks on their way into a product, and the KV cache is bfloat16.
    """

    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    num_threads: int | None = None
    quantization: str = "auto"

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _check_positive(name, getattr(self, name))
        for name in ("num_blocks", "max_model_len", "num_threads"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"num_threads: found {self.num_threads}, expected at most {MAX_THREADS}")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization: found {self.quantization!r}, expected one of {', '.join(QUANTIZATIONS)}"
            )
        if not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(
                f"enable_prefix_caching: found {self.enable_prefix_caching!r}, expected True or False"
            )

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the KV cache holds; num_blocks must be known."""
        assert self.num_blocks is not None
        return self.num_blocks * self.block_size


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: found {value!r}, expected a positive integer")
