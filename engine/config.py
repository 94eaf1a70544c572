"""The engine's settings, checked when they are made: as they were asked for, and with nothing left open."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from pagellm.engine.checks import flag, integer, is_path, number
from pagellm.engine.errors import ConfigError, found
from pagellm.engine.requests.reasoning import AUTO, NO_MARKERS, Markers
from pagellm.engine.scheduling.block_window import BlockWindow
from pagellm.engine.scheduling.policies.load import KINDS

DEFAULT_MODEL = "smollm2-135m-instruct"
MAX_THREADS = 1024
QUANTIZATIONS = ("auto", "none", "bf16", "int8", "int4")
GENERATION_CONFIGS = ("auto", "none")
PREEMPTIONS = ("auto", "recompute", "swap")
TOOL_CALL_PARSERS = (
    "hermes",
    "llama3_json",
    "mistral",
    "gpt_oss",
)  # as in tool_calls.py, which takes 3 ms to import


@dataclass(frozen=True)
class EngineConfig:
    """What the engine and the simulator are asked to run with; a bad value is a `ConfigError` that names it.

    block_size: tokens of one KV block. A multiple of 16 suits the kernels best; any size gives the same bits.
    num_blocks: blocks of the KV cache. None: a quarter of the memory that is available within the limits of
    the system, the container and ulimit; no more than the weights leave of it, nor than max_num_seqs whole
    contexts; at least one.
    enable_prefix_caching: keep the KV of full blocks for later requests that begin with the same tokens.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens computed in one step, prefill
    chunks and decodes together. max_model_len: tokens of prompt and output. None: the model's own limit, or
    what the KV cache holds if that is less. A model whose rotary embeddings depend on the length (LongRoPE,
    dynamic NTK scaling) computes every sequence with those of this length; None: of the model's own limit.
    window: tokens that a token sees, itself included, in the layer that sees the most; 0 where one sees all.
    Blocks behind it are given back. None: the model's own, which is the only one that an engine takes.
    max_prefill_chunk: tokens of one prompt computed in one step at most. None: as many as the step has.
    policy: who goes first, and who makes way: fcfs, prefill_first, priority, shortest_job, fair, slo, or a
    SchedulingPolicy of your own as module:Class or path/file.py:Class, as all that follow. victim: who makes
    way, where that is not as `policy` says: youngest, or a VictimPolicy. admission: who is let in at all:
    accept, or an AdmissionPolicy. eviction: which cached block is given up first: lru, or an EvictionPolicy.
    budget: how many tokens a step and a chunk have: full; stall_free, where prompts have a quarter of them
    beside decodes, the default of `pagellm serve`; or a BudgetPolicy.
    preemption: what happens to the KV of a sequence that makes way: "recompute" gives it up, "swap" moves it
    to a second tier of blocks while that has room, "auto" does whichever was measured to be cheaper.
    num_swap_blocks: blocks of the second tier. None: as many as num_blocks with "swap", with a swap_dir or
    with enable_hierarchical_cache, else none. swap_dir: the directory of the file that holds them. None: they
    are in memory.
    enable_hierarchical_cache: the second tier takes cached blocks that are evicted from the first, as long as
    swapped sequences do not need it; a prefix that is found there is moved back.
    watermark: the share of the blocks that stays free when a sequence is admitted beside others, so that
    those which run have room to grow. max_preemptions: after so many a sequence gets all the blocks that it
    may ever need at once, before all others, and keeps them.
    step_log: a file that gets one line of JSON for each step.
    num_threads: threads that compute. None: one for each core that this process may use.
    quantization: the format of the weight matrices. "auto": as the checkpoint has them, where it has them in
    blocks of 8 or 4 bits (GGUF's Q8_0, Q4_0, Q4_1), and float32 where not; "none": float32; "bf16", "int8",
    "int4": converted on load, where the checkpoint has them otherwise. With anything but float32, activations
    are rounded to bfloat16 or to int8 blocks on their way into a product, and the KV cache is bfloat16.
    generation_config: how requests without sampling parameters are sampled. "auto": as the model's
    generation_config.json, or its GGUF file's general.sampling keys, say; "none": by the defaults of
    `SamplingParams`. A request with parameters is served as these say, and every output names what it was
    served with.
    reasoning_markers: what stands around a thought of the model, "<think>...</think>" for example;
    "...</think>" if it thinks from the first token on, without a start. "auto": as its chat template or its
    tokens say; "none": it has no thoughts.
    tool_call_parser: how the model writes calls of tools, one of "hermes" (of Qwen, too), "llama3_json",
    "mistral" and "gpt_oss"; "auto": as its chat template says.
    """

    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    max_prefill_chunk: int | None = None
    window: int | None = None
    policy: str = "fcfs"
    victim: str | None = None
    admission: str = "accept"
    eviction: str = "lru"
    budget: str = "full"
    preemption: str = "auto"
    num_swap_blocks: int | None = None
    swap_dir: str | None = None
    enable_hierarchical_cache: bool = False
    watermark: float = 0.01
    max_preemptions: int = 8
    step_log: str | None = None
    num_threads: int | None = None
    quantization: str = "auto"
    generation_config: str = "auto"
    reasoning_markers: str = AUTO
    tool_call_parser: str = AUTO

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_preemptions"):
            self._take(name, integer, 1)
        for name in ("num_blocks", "max_model_len", "max_prefill_chunk"):
            self._take(name, integer, 1, optional=True)
        for name in ("num_swap_blocks", "window"):
            self._take(name, integer, 0, optional=True)
        self._take("num_threads", integer, 1, optional=True)
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"num_threads: found {found(self.num_threads)}, expected at most {MAX_THREADS}")
        self._take("watermark", number, 0.0, 1.0)
        if self.watermark == 1:
            raise ConfigError(
                f"watermark: found {self.watermark}, expected a number from 0 up to, not including, 1"
            )
        self._take("enable_prefix_caching", flag)
        self._take("enable_hierarchical_cache", flag)
        for name, choices in (
            ("quantization", QUANTIZATIONS),
            ("preemption", PREEMPTIONS),
            ("generation_config", GENERATION_CONFIGS),
            ("tool_call_parser", (AUTO, *TOOL_CALL_PARSERS)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}: found {found(getattr(self, name))}, expected one of {', '.join(choices)}"
                )
        for name in (*KINDS, "swap_dir", "step_log"):
            value = getattr(self, name)
            optional = name in ("victim", "swap_dir", "step_log")
            if not (optional and value is None) and not (isinstance(value, str) and value):
                raise ConfigError(f"{name}: found {found(value)}, expected a non-empty string")
            if value is not None and not is_path(value):
                raise ConfigError(f"{name}: found {found(value)}, expected what a file's name may consist of")
        self._check_swap()
        try:
            if self.reasoning_markers not in (AUTO, NO_MARKERS):
                Markers.read(self.reasoning_markers)
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"reasoning_markers: found {found(self.reasoning_markers)}, expected auto, none, or both of "
                "them, as in <think>...</think>"
            ) from None

    def _check_swap(self) -> None:
        blocks = self.num_swap_blocks
        if self.enable_hierarchical_cache and not self.enable_prefix_caching:
            raise ConfigError(
                "enable_hierarchical_cache: found True without enable_prefix_caching, expected both"
            )
        if blocks == 0:
            for needs, name in (
                (self.preemption == "swap", "preemption swap"),
                (self.enable_hierarchical_cache, "enable_hierarchical_cache"),
            ):
                if needs:
                    raise ConfigError(f"num_swap_blocks: found 0 with {name}, expected at least 1")
        uses_tier = self.preemption != "recompute" or self.enable_hierarchical_cache
        if not uses_tier and (blocks or self.swap_dir is not None):
            name, value = ("num_swap_blocks", blocks) if blocks else ("swap_dir", self.swap_dir)
            raise ConfigError(
                f"{name}: found {found(value)} with preemption recompute, expected swap or auto with it, or "
                "enable_hierarchical_cache"
            )

    def _take(self, name: str, check: Any, *bounds: Any, optional: bool = False) -> None:
        """Puts what the check makes of a setting in its place."""
        value = getattr(self, name)
        if not (optional and value is None):
            object.__setattr__(self, name, check(name, value, *bounds, error=ConfigError))

    def complete(
        self, num_blocks: int | None = None, context: int | None = None, window: int = 0
    ) -> "CompleteConfig":
        """These settings with nothing left open.

        num_blocks: of the KV cache, where these settings do not say. context: tokens that the model can take,
        if a model sets a limit. window: of the model, where these settings do not say.
        """
        num_blocks = self.num_blocks or num_blocks
        if num_blocks is None:
            raise ConfigError("num_blocks: found nothing, expected a number")
        window = window if self.window is None else self.window
        limits = [limit for limit in (self.max_model_len, context) if limit is not None]
        if not limits or self.most_blocks(min(limits), window) > num_blocks:
            limits.append(num_blocks * self.block_size)
        num_swap_blocks = self.num_swap_blocks
        if num_swap_blocks is None:
            has_tier = self.preemption == "swap" or self.enable_hierarchical_cache
            num_swap_blocks = num_blocks if has_tier or self.swap_dir is not None else 0
        filled: dict[str, Any] = asdict(self) | {
            "num_blocks": num_blocks,
            "max_model_len": min(limits),
            "max_prefill_chunk": self.max_prefill_chunk or self.max_num_batched_tokens,
            "window": window,
            "num_swap_blocks": num_swap_blocks,
            "num_threads": self.num_threads or usable_cores(),
        }
        return CompleteConfig(**filled)

    def most_blocks(self, num_tokens: int, window: int) -> int:
        """KV blocks that a sequence of so many tokens holds at once at most."""
        chunk = min(self.max_prefill_chunk or self.max_num_batched_tokens, self.max_num_batched_tokens)
        return BlockWindow(window, self.block_size).most_blocks(num_tokens, chunk)


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(EngineConfig):
    """Settings as an engine runs with them: what could be left open is a number."""

    num_blocks: int
    max_model_len: int
    max_prefill_chunk: int
    window: int
    num_swap_blocks: int
    num_threads: int

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
