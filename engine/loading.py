"""From a model's name to the parts of an engine.

Reads the checkpoint, sizes the KV cache, compiles the kernels and loads the weights. What can be refused is
refused before anything that takes long.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from pagellm.engine.checkpoints import Checkpoint, open_checkpoint, resolve_model
from pagellm.engine.config import CompleteConfig, EngineConfig
from pagellm.engine.errors import CheckpointError, ConfigError
from pagellm.engine.execution.compilation import compile_kernels
from pagellm.engine.execution.memory import Memory, read_memory
from pagellm.engine.execution.model_runner import ModelRunner, chunks_to_plan
from pagellm.engine.execution.weights import (
    converted_types,
    formats_of,
    kv_bytes_per_token,
    kv_format,
    load_weights,
)
from pagellm.engine.models import ModelSpec, read_spec
from pagellm.engine.progress import say
from pagellm.engine.requests.generation_config import gguf_generation_defaults, read_generation_defaults
from pagellm.engine.scheduling.batch import PreemptionCosts
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.step_log import StepLogFile
from pagellm.engine.tokenizer import Tokenizer, load_tokenizer
from pagellm.kernels.architecture import lay_out
from pagellm.kernels.buffers import new_plan, new_workspace

# Of the memory that is available the KV cache takes this part at most, if its size is left open.
_SHARE = 4


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made of.

    block_bytes: keys and values of one block, in all layers. costs: of preemption, as far as they are known
    before the first step. step_log: None where none was asked for. generation_defaults: the
    sampling parameters that the model's own files set, for requests that come without any. memory_needed: see
    `memory_needed`.
    """

    config: CompleteConfig
    spec: ModelSpec
    tokenizer: Tokenizer
    scheduler: Scheduler
    runner: ModelRunner
    block_bytes: int
    costs: PreemptionCosts = field(default_factory=PreemptionCosts)
    step_log: StepLogFile | None = None
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    memory_needed: Mapping[str, int] = field(default_factory=dict)


def load_engine(
    model: str | PathLike[str], config: EngineConfig | None = None, show_progress: bool = False
) -> EngineParts:
    """Everything that it takes to serve a model.

    model: a known name, a local path or a hub id. show_progress: of fetching, compiling and loading, on
    standard error. Raises `CheckpointError` for a model and `ConfigError` for settings that cannot be served.
    """
    with open_checkpoint(resolve_model(model, show_progress)) as checkpoint:
        spec = read_spec(checkpoint)
        tokenizer = tokenizer_of(checkpoint, spec.vocab_size)
        if show_progress and tokenizer.vocab_size == 0:
            say(f"{checkpoint.path.name}: {tokenizer.absence}; prompts are token ids")
        asked = config or EngineConfig()
        # Of the setting or the model, never of the memory there happens to be: it decides about bits.
        longest = asked.max_model_len or spec.max_positions
        choices = {table.choice(longest) for table in spec.rope_tables} - {""}
        if show_progress and choices:
            say(f"{checkpoint.path.name}: {'; '.join(sorted(choices))}")
        spec = spec.at(longest)
        generation_defaults = {}
        if asked.generation_config == "auto" and checkpoint.format == "gguf":
            generation_defaults = gguf_generation_defaults(checkpoint.path, checkpoint.config)
        elif asked.generation_config == "auto":
            generation_defaults = read_generation_defaults(checkpoint.path / "generation_config.json")
        formats = formats_of(checkpoint, spec, asked.quantization)
        cache_format = kv_format(formats)
        token_bytes = kv_bytes_per_token(spec.arch, cache_format)
        if show_progress and checkpoint.quantization:
            say(f"{checkpoint.path.name}: {checkpoint.quantization}")
        if show_progress and spec.left_alone:
            say(f"{checkpoint.path.name}: {spec.left_alone}")
        if show_progress and asked.quantization == "auto":
            _say_converted(checkpoint, converted_types(checkpoint, spec, formats))
        memory = read_memory()
        weight_bytes = 4 * lay_out(spec.arch, formats).size
        complete = size_cache(asked, spec.max_positions, token_bytes, memory, weight_bytes, spec.window)
        block_bytes = token_bytes * complete.block_size
        scheduler = Scheduler.with_blocks(complete)
        step_log = None if complete.step_log is None else StepLogFile(complete.step_log)
        needed = memory_needed(spec, complete, weight_bytes, block_bytes)
        if show_progress and asked.num_blocks is None:
            say(f"{_size_chosen(complete, block_bytes, memory)}; {_beside_cache(needed)}")
        compile_kernels(show_progress)
        weights = load_weights(checkpoint, spec, formats, complete.max_model_len, show_progress)
    runner = ModelRunner(spec.arch, weights, cache_format, complete)
    costs = PreemptionCosts(swap_block_s=runner.measure_swap_s())
    return EngineParts(
        complete,
        spec,
        tokenizer,
        scheduler,
        runner,
        block_bytes,
        costs,
        step_log,
        generation_defaults,
        needed,
    )


def memory_needed(
    spec: ModelSpec, config: CompleteConfig, weight_bytes: int, block_bytes: int
) -> dict[str, int]:
    """Bytes that an engine will take at most, by what for; known before anything is loaded.

    Of "working", what a step computes in and plans with, the system hands out what steps have written to.
    """
    max_tokens = min(config.max_num_batched_tokens, config.capacity_tokens)
    plan = new_plan(
        spec.arch, max_tokens, min(max_tokens, config.max_num_seqs), chunks_to_plan(config.max_model_len)
    )
    work = new_workspace(spec.arch, max_tokens, config.num_threads)
    buffers = (*plan, *work, *work.groups)
    half = max((len(table.frequencies) for table in spec.rope_tables), default=0)
    return {
        "weights": weight_bytes,
        "kv_cache": config.num_blocks * block_bytes,
        "rope_tables": 4 * len(spec.rope_tables) * config.max_model_len * (2 * half + 1),
        "working": sum(buffer.nbytes for buffer in buffers if isinstance(buffer, np.ndarray)),
    }


def size_cache(
    config: EngineConfig,
    context: int,
    token_bytes: int,
    memory: Memory,
    weight_bytes: int = 0,
    window: int = 0,
) -> CompleteConfig:
    """The settings with what the user left open filled in for a model and the memory that there is.

    context: tokens that the model can take. token_bytes: keys and values of one token, in all layers.
    weight_bytes: memory that the weights will take of what is available. window: of the model, see
    `EngineConfig`. Raises `ConfigError` for what the model or the memory cannot hold.
    """
    if config.window not in (None, window):
        raise ConfigError(f"window: found {config.window}, expected {window}, that of this model")
    if config.max_model_len is not None and config.max_model_len > context:
        raise ConfigError(
            f"max_model_len: found {config.max_model_len}, expected at most {context}, the context "
            "of this model"
        )
    block_bytes = token_bytes * config.block_size
    affordable = max(1, min(memory.available // _SHARE, memory.available - weight_bytes) // block_bytes)
    useful = config.max_num_seqs * config.most_blocks(config.max_model_len or context, window)
    complete = config.complete(min(affordable, useful), context, window)
    num_blocks, total = complete.num_blocks, memory.total
    if num_blocks * block_bytes > total:
        raise ConfigError(
            f"num_blocks: found {num_blocks} of block_size {config.block_size}, {block_bytes} bytes each, "
            f"expected no more than the {total} bytes of memory hold"
        )
    left = memory.available - num_blocks * block_bytes
    if weight_bytes > max(left, 0):
        raise ConfigError(
            f"weights: found {weight_bytes} bytes, expected at most {max(left, 0)}: {memory.available} bytes "
            f"are available {memory.source}, less {num_blocks * block_bytes} of {num_blocks} KV blocks"
        )
    if config.swap_dir is None and (num_blocks + complete.num_swap_blocks) * block_bytes > total:
        raise ConfigError(
            f"num_swap_blocks: found {complete.num_swap_blocks} beside {num_blocks} blocks of {block_bytes} "
            f"bytes, expected no more than the {total} bytes of memory hold, or a swap_dir"
        )
    if config.max_model_len is not None and complete.max_model_len < config.max_model_len:
        raise ConfigError(
            f"max_model_len: found {config.max_model_len}, expected at most {complete.capacity_tokens}, what "
            f"{num_blocks} KV blocks of {config.block_size} tokens hold"
        )
    return complete


def _say_converted(checkpoint: Checkpoint, types: Mapping[str, float]) -> None:
    if types:
        sizes = (f"{name} ({bits:.3g} bits)" for name, bits in types.items())
        say(
            f"{checkpoint.path.name}: weights of type {', '.join(sizes)} are converted to float32, 4 bytes a "
            "weight; with quantization bf16, int8 or int4 they take 2, 1.1 or 0.6"
        )


def _beside_cache(needed: Mapping[str, int]) -> str:
    weights, working = needed["weights"], needed["rope_tables"] + needed["working"]
    return (
        f"beside it {weights / 1e9:.2f} GB of weights and up to {working / 1e9:.2f} GB to compute with them"
    )


def _size_chosen(config: CompleteConfig, block_bytes: int, memory: Memory) -> str:
    share = config.num_blocks * block_bytes / memory.available if memory.available else 1.0
    return (
        f"KV cache: {config.num_blocks} blocks of {config.block_size} tokens, "
        f"{config.num_blocks * block_bytes / 1e9:.2f} GB, {share:.1%} of the {memory.available / 1e9:.2f} GB "
        f"available {memory.source}"
    )


def tokenizer_of(checkpoint: Checkpoint, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of an open checkpoint whose model has so many ids; None: as many as the tokenizer.

    Raises `CheckpointError` if it cannot be read or supported.
    """
    if checkpoint.format == "safetensors":
        return load_tokenizer(checkpoint.path, model_vocab_size=vocab_size)
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in checkpoint.config.items()
    }
    try:
        return load_tokenizer(metadata, model_vocab_size=vocab_size)
    except CheckpointError as error:  # metadata does not know its file
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
