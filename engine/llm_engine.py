"""LLMEngine: requests go in, steps are taken, outputs come out.

Binds the tokenizer, the scheduler and the model runner together. It is the only place that knows text and
time as well as sequences. One caller at a time; it starts no thread of its own but the kernels'.
"""

import os
import random
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from engine.block_manager import BlockManager
from engine.checkpoints import Checkpoint, open_checkpoint, resolve_model
from engine.compilation import compile_kernels
from engine.config import EngineConfig, usable_cores
from engine.errors import ConfigError, RequestError
from engine.model_runner import ModelRunner, RunnerOutput
from engine.models import ModelSpec, read_spec
from engine.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprob
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch, Scheduler
from engine.sequence import Sequence
from engine.stopping import StopChecker
from engine.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from engine.weights import architecture_of, formats_of, kv_bytes_per_token, load_weights


@dataclass
class _Completion:
    """One completion under way: its sequence and the output that grows with it."""

    sequence: Sequence
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer
    stop: StopChecker


@dataclass
class _Request:
    output: RequestOutput
    completions: list[_Completion]
    arrival: float  # time.perf_counter() when it was added
    logits: NDArray[np.float32] | None = None  # [prompt tokens, vocab_size], where they are wanted
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.completions)


class LLMEngine:
    """Serves many requests at once on one model.

    Raises `CheckpointError` for a model and `ConfigError` for settings that cannot be served. `show_progress`
    is for fetching, compiling and loading.
    """

    def __init__(self, model: str, config: EngineConfig | None = None, show_progress: bool = False) -> None:
        with open_checkpoint(resolve_model(model, show_progress)) as checkpoint:
            self.spec = read_spec(checkpoint)
            self.tokenizer = _load_tokenizer(checkpoint, self.spec.vocab_size)
            config = config or EngineConfig()
            formats = formats_of(checkpoint, self.spec, config.quantization)
            self.config = _complete(config, self.spec, kv_bytes_per_token(self.spec, formats))
            assert self.config.num_blocks is not None
            assert self.config.max_model_len is not None
            compile_kernels(show_progress)
            weights = load_weights(checkpoint, self.spec, formats, self.config.max_model_len, show_progress)
        self.num_threads = self.config.num_threads or usable_cores()
        self.block_manager = BlockManager(
            self.config.num_blocks, self.config.block_size, self.config.enable_prefix_caching
        )
        self.scheduler = Scheduler(self.config, self.block_manager)
        self.runner = ModelRunner(architecture_of(self.spec), weights, self.config, self.num_threads)
        self._requests: dict[str, _Request] = {}
        self._by_seq_id: dict[int, tuple[_Request, _Completion]] = {}
        self._next_seq_id = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_unfinished

    def add_request(
        self,
        request_id: str,
        prompt: str | Items[int],
        sampling_params: SamplingParams | None = None,
        return_logits: bool = False,
    ) -> RequestOutput:
        """Takes a request in: a text, or token ids. Raises `RequestError` for one that cannot be served.

        return_logits: its finished output carries the logits of every token of the prompt. The output that is
        returned is the one that the steps to come will fill.
        """
        params = sampling_params or SamplingParams()
        if request_id in self._requests:
            raise RequestError(f"request_id: {request_id!r} is in use, expected a new one")
        if not isinstance(prompt, str | Items | np.ndarray) or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"prompt: found {prompt!r}, expected a text or a list of token ids")
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_token_ids("prompt", token_ids)
        self._check_token_ids("logit_bias", list(params.logit_bias))
        self._check_token_ids("stop_token_ids", list(params.stop_token_ids))
        token_ids = [int(token) for token in token_ids]  # they may have been NumPy's
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(63))
        completions = [
            self._new_completion(index, token_ids, params.of_completion(index), return_logits)
            for index in range(params.n)
        ]
        output = RequestOutput(request_id, text, token_ids, [c.output for c in completions])
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None] * len(token_ids)
        request = _Request(output, completions, time.perf_counter())
        for completion in completions:
            self.scheduler.add(completion.sequence)  # raises for the first, or for none of them
            self._by_seq_id[completion.sequence.seq_id] = (request, completion)
        if return_logits:
            request.logits = np.zeros((len(token_ids), self.spec.vocab_size), np.float32)
        self._requests[request_id] = request
        return output

    def abort(self, request_id: str, index: int | None = None) -> RequestOutput | None:
        """Gives a request, or one completion of it, up, whatever state it is in.

        Returns what it got so far; None if the request is unknown or has ended.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        for completion in request.completions:
            if index is not None and completion.output.index != index:
                continue
            self.scheduler.abort(completion.sequence)
            if not completion.output.finished:
                self._finish(request, completion, FinishReason.ABORT)
        return request.output

    def step(self) -> list[RequestOutput]:
        """Computes one batch; returns the requests that it gave a token to or finished."""
        batch = self.scheduler.schedule()
        if not batch.sequences:
            return []
        self._note_first_schedule(batch)
        wanted = frozenset(
            s.seq_id for s in batch.sequences if self._by_seq_id[s.seq_id][0].logits is not None
        )
        result = self.runner.run(batch, wanted)
        self._end_without_token(batch, result)
        self.scheduler.commit(batch, result.token_ids)
        return self._outputs(batch, result)

    def close(self) -> None:
        """Gives up all requests and ends the threads."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self.runner.close()

    def _check_token_ids(self, name: str, token_ids: list[int]) -> None:
        for index, token in enumerate(token_ids):
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise RequestError(f"{name}: found {token!r} at {index}, expected a token id")
            if not 0 <= token < self.spec.vocab_size:
                raise RequestError(
                    f"{name}: found token id {token} at {index}, expected 0 to {self.spec.vocab_size - 1}"
                )

    def _new_completion(
        self, index: int, token_ids: list[int], params: SamplingParams, wants_logits: bool
    ) -> _Completion:
        sequence = Sequence(
            self._next_seq_id,
            token_ids,
            params,
            frozenset(self.tokenizer.eos_token_ids),
            reads_cache=not wants_logits and params.prompt_logprobs is None,
        )
        self._next_seq_id += 1
        output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=params.skip_special_tokens)
        return _Completion(sequence, output, detokenizer, StopChecker(params))

    def _note_first_schedule(self, batch: ScheduledBatch) -> None:
        now = time.perf_counter()
        for sequence in batch.sequences:
            request, completion = self._by_seq_id[sequence.seq_id]
            metrics = completion.output.metrics
            if metrics.first_scheduled_s is None:
                completion.output.metrics = replace(
                    metrics,
                    first_scheduled_s=now - request.arrival,
                    num_cached_tokens=sequence.num_cached_tokens,
                )

    def _end_without_token(self, batch: ScheduledBatch, result: RunnerOutput) -> None:
        sampled = [s for s, samples in zip(batch.sequences, batch.samples, strict=True) if samples]
        for sequence, token_id in zip(sampled, result.token_ids, strict=True):
            if token_id < 0:
                self.scheduler.abort(sequence, FinishReason.ERROR)

    def _outputs(self, batch: ScheduledBatch, result: RunnerOutput) -> list[RequestOutput]:
        now = time.perf_counter()
        changed: dict[str, RequestOutput] = {}
        for sequence, samples in zip(batch.sequences, batch.samples, strict=True):
            request, completion = self._by_seq_id[sequence.seq_id]
            self._collect_prompt(request, sequence, result)
            if sequence.finish_reason is FinishReason.ERROR:
                self._finish(request, completion, FinishReason.ERROR)
                changed[request.output.request_id] = request.output
            elif samples:
                self._append_token(request, completion, result.logprobs.get(sequence.seq_id), now)
                changed[request.output.request_id] = request.output
        return list(changed.values())

    def _collect_prompt(self, request: _Request, sequence: Sequence, result: RunnerOutput) -> None:
        if request.output.prompt_logprobs is not None:
            for index, logprob in result.prompt_logprobs.get(sequence.seq_id, ()):
                request.output.prompt_logprobs[index] = logprob
        if request.logits is not None:
            for position, logits in result.logits.get(sequence.seq_id, ()):
                if position < len(request.logits):
                    request.logits[position] = logits

    def _append_token(
        self, request: _Request, completion: _Completion, logprob: TokenLogprob | None, now: float
    ) -> None:
        sequence, output = completion.sequence, completion.output
        token_id = sequence.token_ids[-1]
        output.token_ids.append(token_id)
        if output.logprobs is not None and logprob is not None:
            output.logprobs.append(logprob)
        if output.metrics.first_token_s is None:
            output.metrics = replace(output.metrics, first_token_s=now - request.arrival)
        text = completion.detokenizer.append(token_id)
        if sequence.finish_reason is not None:
            text += completion.detokenizer.finish()
        stop_string = completion.stop.append(text, len(output.token_ids))
        if stop_string is not None:
            output.stop_reason = stop_string
            self.scheduler.abort(sequence, FinishReason.STOP)
            self._finish(request, completion, FinishReason.STOP)
        elif sequence.finish_reason is not None:
            if sequence.finish_reason is FinishReason.STOP:
                output.stop_reason = token_id
            self._finish(request, completion, sequence.finish_reason)
        else:
            output.text = completion.stop.safe_text

    def _finish(self, request: _Request, completion: _Completion, reason: FinishReason) -> None:
        output = completion.output
        output.text = completion.stop.text
        output.finish_reason = reason
        output.metrics = replace(
            output.metrics,
            finished_s=time.perf_counter() - request.arrival,
            num_preemptions=completion.sequence.num_preemptions,
        )
        del self._by_seq_id[completion.sequence.seq_id]
        request.unfinished -= 1
        if request.unfinished == 0:
            request.output.logits = request.logits
            del self._requests[request.output.request_id]


def _load_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> Tokenizer:
    if checkpoint.format == "safetensors":
        return load_tokenizer(checkpoint.path, model_vocab_size=vocab_size)
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in checkpoint.config.items()
    }
    return load_tokenizer(metadata, model_vocab_size=vocab_size)


def _complete(config: EngineConfig, spec: ModelSpec, token_bytes: int) -> EngineConfig:
    """The settings with what the user left open filled in for this model and machine."""
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        raise ConfigError(
            f"max_model_len: found {config.max_model_len}, expected at most {spec.max_positions}, the "
            "context of this model"
        )
    block_bytes = token_bytes * config.block_size
    wanted_len = config.max_model_len or spec.max_positions
    num_blocks = config.num_blocks
    if num_blocks is None:
        affordable = max(1, _memory_bytes("SC_AVPHYS_PAGES") // 4 // block_bytes)
        num_blocks = min(affordable, config.max_num_seqs * -(-wanted_len // config.block_size))
    memory = _memory_bytes("SC_PHYS_PAGES")
    if num_blocks * block_bytes > memory:
        raise ConfigError(
            f"num_blocks: found {num_blocks} of block_size {config.block_size}, {block_bytes} bytes each, "
            f"expected no more than the {memory} bytes of memory hold"
        )
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and capacity < config.max_model_len:
        raise ConfigError(
            f"max_model_len: found {config.max_model_len}, expected at most {capacity}, what {num_blocks} KV "
            f"blocks of {config.block_size} tokens hold"
        )
    return replace(config, num_blocks=num_blocks, max_model_len=min(wanted_len, capacity))


def _memory_bytes(pages: str) -> int:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30  # a system that does not say
