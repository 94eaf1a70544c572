"""LLMEngine: requests go in, steps are taken, outputs come out.

Binds the tokenizer, the scheduler and the model runner together. It is the only place that knows text and
time as well as sequences. One caller at a time; it starts no thread of its own but the kernels'.
"""

import random
import time
import warnings
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checks import flag, number
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import RequestError, found
from pagellm.engine.loading import EngineParts, load_engine
from pagellm.engine.model_runner import RunnerOutput
from pagellm.engine.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprob
from pagellm.engine.prompts import Prompt, read_prompt
from pagellm.engine.sampling_params import SamplingParams
from pagellm.engine.scheduling.block_manager import TransferKind
from pagellm.engine.scheduling.scheduler import ScheduledBatch
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepLoop
from pagellm.engine.step_log import StepRecord, StepRecorder
from pagellm.engine.stopping import StopChecker
from pagellm.engine.tokenizer import IncrementalDetokenizer

# How much of what was measured before a step is kept after it.
_REMEMBERED = 0.75
# Times from a caller are no further from now, in seconds, so that differences of them are numbers.
_LONG_AGO_S = 1e12


@dataclass
class _Completion:
    """One completion under way: its sequence and the output that grows with it."""

    sequence: Sequence
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer
    stop: StopChecker
    hides_special: bool  # whether special tokens are left out of the text


@dataclass
class _Request:
    output: RequestOutput
    completions: list[_Completion]
    arrival: float  # on the engine's clock
    logits: NDArray[np.float32] | None = None  # [prompt tokens, vocab_size], where they are wanted
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.completions)


class LLMEngine:
    """Serves many requests at once on one model.

    model: a known name, a local path or a hub id; or the parts of an engine, which bring their settings.
    `show_progress` is for fetching, compiling and loading. Raises `CheckpointError` for a model and
    `ConfigError` for settings that cannot be served. loop: drives the scheduler; whoever listens to it
    hears of every step.
    """

    def __init__(
        self, model: str | EngineParts, config: EngineConfig | None = None, show_progress: bool = False
    ) -> None:
        if isinstance(model, EngineParts) and config is not None:
            raise TypeError("config was given beside the parts of an engine, which have one")
        parts = model if isinstance(model, EngineParts) else load_engine(model, config, show_progress)
        self.config = parts.config
        self.spec = parts.spec
        self.tokenizer = parts.tokenizer
        self.scheduler = parts.scheduler
        self.block_manager = parts.scheduler.block_manager
        self.block_bytes = parts.block_bytes
        self.runner = parts.runner
        self._step_log = parts.step_log
        self.loop = StepLoop(parts.scheduler)
        if parts.step_log is not None:
            self._recorder = StepRecorder(parts.scheduler, self._log, parts.config)
            self.loop.listen(self._recorder)
        self.costs = parts.costs
        self.default_sampling_params = parts.default_sampling_params
        self._special_texts = {
            token_id: self.tokenizer.decode([token_id]) for token_id in self.tokenizer.special_ids
        }
        self._requests: dict[str, _Request] = {}
        self._by_seq_id: dict[int, tuple[_Request, _Completion]] = {}
        self._next_seq_id = 0
        self._prefill_s = self._prefill_tokens = 0.0  # of the latest steps
        self._start = time.perf_counter()

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_unfinished

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        return_logits: bool = False,
        fork_of: str | None = None,
        arrival_time: float | None = None,
    ) -> RequestOutput:
        """Takes a request in. Raises `RequestError`, before anything changes, for one that cannot be served.

        All of it is checked and copied here: what the caller does to it afterwards changes nothing.

        prompt: a text, token ids, or either under vLLM's names. sampling_params: None is what the model's
        `generation_config.json` says, `default_sampling_params`. return_logits: its finished output carries
        the logits of every token of the prompt. fork_of: a request whose tokens so far this prompt begins
        with; while that runs, they share the blocks of what it has computed of them, unless log-probabilities
        or logits of the prompt are wanted, for which all of it is computed. arrival_time: when it came, on
        the engine's clock, if that was before now.
        The output that is returned is the one that the steps to come will fill.
        """
        if not isinstance(request_id, str):
            raise RequestError(f"request_id: found {found(request_id)}, expected a string")
        if request_id in self._requests:
            raise RequestError(f"request_id: {found(request_id)} is in use, expected a new one")
        params = self.default_sampling_params if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params: found {found(params)}, expected a SamplingParams")
        if fork_of is not None and not isinstance(fork_of, str):
            raise RequestError(f"fork_of: found {found(fork_of)}, expected the id of a request")
        wants_logits = flag("return_logits", return_logits)
        arrival = self.now()
        if arrival_time is not None:
            arrival = number("arrival_time", arrival_time, -_LONG_AGO_S, _LONG_AGO_S)
        text, token_ids = self._read_prompt(prompt)
        self._check_token_ids("logit_bias", params.bias.ids)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        if params.stop and self.tokenizer.vocab_size == 0:
            raise RequestError(
                f"stop: found {found(params.stop)}, expected none: this model came without a tokenizer"
            )
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(63))
        completions = [
            self._new_completion(request_id, index, token_ids, params.of_completion(index), wants_logits)
            for index in range(params.n)
        ]
        output = RequestOutput(request_id, text, token_ids, [c.output for c in completions], params)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None] * len(token_ids)
        request = _Request(output, completions, arrival)
        sequence, *forks = (completion.sequence for completion in completions)
        parent = None if fork_of is None else self._requests.get(fork_of)
        if parent is None or not sequence.reads_cache:
            self.loop.add(sequence, arrival, forks)
        else:
            self.loop.fork(parent.completions[0].sequence, sequence, arrival, forks)
        for completion in completions:
            self._by_seq_id[completion.sequence.seq_id] = (request, completion)
        if wants_logits:
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
            if not completion.output.finished:
                self.loop.abort(completion.sequence)
                self._finish(request, completion, FinishReason.ABORT)
        return request.output

    def restart_clock(self) -> None:
        """Lets `now` begin at 0 again. Raises `RequestError` while requests are under way."""
        if self.has_unfinished:
            raise RequestError("clock: found requests under way, expected none when it begins again")
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the engine was made: its clock, and the scheduler's."""
        return time.perf_counter() - self._start

    def step(self) -> list[RequestOutput]:
        """Computes one batch; returns the requests that it gave a token to or finished.

        Raises `PolicyError`, after the step, if the scheduling policy failed in it: the outputs have what the
        step gave, and the next steps are scheduled first come first served.
        """
        if not self.has_unfinished:
            return []
        batch = self.loop.begin(self.now(), self.costs)
        transfer_s = self._move_blocks(batch)
        self._note_admissions(batch)
        result = self._run(batch) if batch.sequences else RunnerOutput()
        sampled = batch.sampled
        for sequence, token_id in zip(sampled, result.token_ids, strict=True):
            if token_id < 0:
                self.loop.abort(sequence, FinishReason.ERROR)
        self.loop.end(batch, result.token_ids, self.now(), transfer_s=transfer_s)
        outputs = self._outputs(batch.sequences, sampled, result)
        self.scheduler.policy.raise_error()
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix; requests under way keep their blocks."""
        self.block_manager.reset_cache()

    def close(self) -> None:
        """Gives up all requests and ends the threads."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self.runner.close()
        if self._step_log is not None:
            self.loop.ignore(self._recorder)
            self._step_log.close()
            self._step_log = None

    def _log(self, record: StepRecord) -> None:
        """A log that cannot be written must not stop the requests."""
        assert self._step_log is not None
        try:
            self._step_log.write(record)
        except OSError as error:
            warnings.warn(f"step_log: {self.config.step_log}: {error}; it ends here", stacklevel=5)
            self.loop.ignore(self._recorder)

    def _move_blocks(self, batch: ScheduledBatch) -> float:
        """Does the batch's transfers, and returns the seconds that took.

        What the second tier cannot keep or give is computed again.
        """
        if not batch.transfers:
            return 0.0
        start, num_swaps = time.perf_counter(), 0
        for transfer in batch.transfers:
            try:
                self.runner.transfer(transfer)
            except OSError as error:
                warnings.warn(f"swap: {error}; preempted sequences are computed again", stacklevel=3)
                self.loop.transfer_failed(transfer, batch)
            else:
                self.loop.transferred()
                num_swaps += transfer.kind is not TransferKind.COPY
        seconds = time.perf_counter() - start
        if num_swaps:
            per_block = _REMEMBERED * self.costs.swap_block_s + (1 - _REMEMBERED) * seconds / num_swaps
            self.costs = replace(self.costs, swap_block_s=per_block)
        return seconds

    def _run(self, batch: ScheduledBatch) -> RunnerOutput:
        wanted = frozenset(
            s.seq_id for s in batch.sequences if self._by_seq_id[s.seq_id][0].logits is not None
        )
        start = time.perf_counter()
        result = self.runner.run(batch, wanted)
        self._note_costs(batch, time.perf_counter() - start)
        return result

    def _note_costs(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learns from steps of prompts what computing a token again would cost; large steps count most."""
        num_tokens = batch.num_tokens
        if num_tokens >= 2 * len(batch.sequences):
            self._prefill_s = _REMEMBERED * self._prefill_s + seconds
            self._prefill_tokens = _REMEMBERED * self._prefill_tokens + num_tokens
            self.costs = replace(self.costs, recompute_token_s=self._prefill_s / self._prefill_tokens)

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, where it came with one, and its token ids."""
        text, token_ids = read_prompt(prompt)
        if token_ids is None:
            assert text is not None
            token_ids = self.tokenizer.encode(text)
        else:
            self._check_token_ids("prompt", token_ids)
        limit = self.spec.max_positions
        if limit == self.spec.sliding_window and len(token_ids) > limit:
            raise RequestError(
                f"prompt: found {len(token_ids)} tokens, expected at most {limit}, {self.spec.context}"
            )
        return text, token_ids

    def _check_token_ids(self, name: str, token_ids: Items[int]) -> None:
        vocab_size = self.spec.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            place, token = next(
                (i, token) for i, token in enumerate(token_ids) if not 0 <= token < vocab_size
            )
            raise RequestError(
                f"{name}: found token id {found(token)} at {place}, expected 0 to {vocab_size - 1}"
            )

    def _new_completion(
        self, request_id: str, index: int, token_ids: list[int], params: SamplingParams, wants_logits: bool
    ) -> _Completion:
        sequence = Sequence(
            self._next_seq_id,
            token_ids,
            params,
            frozenset(self.tokenizer.eos_token_ids),
            reads_cache=not wants_logits and params.prompt_logprobs is None,
            request_id=request_id,
        )
        self._next_seq_id += 1
        output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=params.skip_special_tokens)
        stop = StopChecker(params)
        return _Completion(sequence, output, detokenizer, stop, params.skip_special_tokens)

    def _note_admissions(self, batch: ScheduledBatch) -> None:
        now = self.now()
        for admitted in batch.admitted:
            for sequence in (admitted.sequence, *admitted.sequence.forks):
                request, completion = self._by_seq_id[sequence.seq_id]
                metrics = completion.output.metrics
                if metrics.first_scheduled_s is None:
                    completion.output.metrics = replace(
                        metrics,
                        first_scheduled_s=now - request.arrival,
                        num_cached_tokens=admitted.sequence.num_cached_tokens,
                    )

    def _outputs(
        self, computed: list[Sequence], sampled: list[Sequence], result: RunnerOutput
    ) -> list[RequestOutput]:
        now = self.now()
        changed: dict[str, RequestOutput] = {}
        if result.prompt_logprobs or result.logits:
            for sequence in computed:
                self._collect_prompt(self._by_seq_id[sequence.seq_id][0], sequence, result)
        for sequence in sampled:
            request, completion = self._by_seq_id[sequence.seq_id]
            if sequence.finish_reason is FinishReason.ERROR:
                self._finish(request, completion, FinishReason.ERROR)
            else:
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
        hidden = self._special_texts.get(token_id, "") if completion.hides_special else ""
        stop_string = completion.stop.append(text, len(output.token_ids), hidden)
        if stop_string is not None:
            output.stop_reason = stop_string
            self.loop.abort(sequence, FinishReason.STOP)
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
            finished_s=self.now() - request.arrival,
            num_preemptions=completion.sequence.num_preemptions,
        )
        del self._by_seq_id[completion.sequence.seq_id]
        request.unfinished -= 1
        if request.unfinished == 0:
            request.output.logits = request.logits
            del self._requests[request.output.request_id]
