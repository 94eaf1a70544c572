"""LLMEngine: requests go in, steps are taken, outputs come out.

Binds the tokenizer, the scheduler and the model runner together. It is the only place that knows text and
time as well as sequences. Calls of several threads take turns; it starts none of its own but the kernels'.

An exception may come from outside at any moment, as from Ctrl-C. What is known of the requests is always
whole, and of the queues and block tables it is known whether something was changing them; if so, they are
rebuilt from the requests before the next call, and what was computed is computed again, with equal bits.
"""

import time
from collections import deque
from itertools import chain
from os import PathLike
from typing import Any
from weakref import ref

from pagellm.engine.checks import number
from pagellm.engine.completion import Completion, Request
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import EngineError, RequestError, found, is_from_outside
from pagellm.engine.execution.model_runner import RunnerOutput, Wishes
from pagellm.engine.grammar.compiler import GrammarCompiler
from pagellm.engine.grammar.state import GrammarError, GrammarState, begin_masks
from pagellm.engine.intake import Intake
from pagellm.engine.loading import EngineParts, load_engine
from pagellm.engine.measured_costs import MeasuredCosts
from pagellm.engine.progress import say
from pagellm.engine.requests.outputs import FinishReason, RequestOutput
from pagellm.engine.requests.prompts import Prompt
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.scheduling.batch import Preemption, PreemptionCosts, ScheduledBatch
from pagellm.engine.scheduling.block_manager import TransferKind
from pagellm.engine.scheduling.sequence import Sequence, SequenceError
from pagellm.engine.scheduling.step_loop import StepLoop
from pagellm.engine.step_log import LiveStepLog
from pagellm.engine.thoughts import Thoughts
from pagellm.engine.turns import Turns, exclusive, exclusive_last

# Times from a caller are no further from now, in seconds, so that differences of them are numbers.
_LONG_AGO_S = 1e12
_LONGEST_DESCRIPTION = 500  # characters of an error
_NO_TOKEN = "the model gave no finite logits, or every token was forbidden"


class _Owner(ref[Any]):
    """Whose completion it is: when that is garbage, nobody will ever read it."""

    __slots__ = ("aborts",)
    aborts: tuple[str, int]  # the request and which of its completions


class LLMEngine:
    """Serves many requests at once on one model.

    model: a known name, a local path or a hub id; or the parts of an engine, which bring their settings.
    `show_progress` is for fetching, compiling and loading. Raises `CheckpointError` for a model and
    `ConfigError` for settings that cannot be served. loop: drives the scheduler; whoever listens to it
    hears of every step. changing: whether queues, block tables or outputs are between two states; set by
    whoever drives the loop otherwise, as long as that takes.

    Any thread may call it. Its methods raise `EngineError` once it is closed, in the midst of another call of
    the same thread, and in a process that was forked while another thread was in a call.
    """

    def __init__(
        self,
        model: str | PathLike[str] | EngineParts,
        config: EngineConfig | None = None,
        show_progress: bool = False,
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
        self.memory_needed = parts.memory_needed
        self.runner = parts.runner
        self.loop = StepLoop(parts.scheduler)
        self._step_log = None
        if parts.step_log is not None:
            self._step_log = LiveStepLog(self.loop, parts.step_log, parts.config)
        self._costs = MeasuredCosts(parts.costs)
        self._grammars = GrammarCompiler(parts.tokenizer, parts.spec.vocab_size, parts.config.num_threads)
        self._intake = Intake(
            parts.tokenizer, parts.spec.vocab_size, parts.config.reasoning_markers, self._grammars
        )
        self.generation_defaults = dict(parts.generation_defaults)
        self.default_sampling_params = SamplingParams(**self.generation_defaults)
        shared = [name for name in ("step_log", "swap_dir") if getattr(self.config, name) is not None]
        self.turns = Turns(
            f"has a file ({', '.join(shared)}), which a forked process cannot share" if shared else None
        )
        self.changing = False
        self._gone: deque[Any] = deque()  # owners that are garbage, and (request, index) of what is to abort
        self._requests: dict[str, Request] = {}
        self._by_seq_id: dict[int, tuple[Request, Completion]] = {}
        self._start = time.perf_counter()

    @property
    def thoughts(self) -> Thoughts | None:
        """How the model's thoughts are written; None if none are known."""
        return self._intake.thoughts

    def compile_form(self, form: StructuredOutputs) -> None:
        """Compiles the form of a request to come, which takes a while at first, and remembers it.

        Raises `RequestError` for one that cannot be had. Does not wait for calls of other threads.
        """
        self._check_usable("compile_form")
        self._grammars.compile(form)

    @property
    def costs(self) -> PreemptionCosts:
        """What preemption costs, as far as that has been measured."""
        return self._costs.costs

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        if self._gone and not self.turns.is_nested:
            self._abort_gone()
        return bool(self._requests)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more calls."""
        return self.turns.refusal is not None

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        return_logits: bool = False,
        fork_of: str | None = None,
        arrival_time: float | None = None,
        separate_reasoning: bool = False,
        in_thought: bool | None = None,
    ) -> RequestOutput:
        """Takes a request in. Raises `RequestError`, before anything changes, for one that cannot be served.

        All of it is checked and copied here: what the caller does to it afterwards changes nothing.

        prompt: a text, token ids, or either under vLLM's names. sampling_params: None is what the model's
        own configuration says, `default_sampling_params`. return_logits: its finished output carries
        the logits of every token of the prompt. fork_of: a request whose tokens so far this prompt begins
        with; while that runs, they share the blocks of what it has computed of them, unless log-probabilities
        or logits of the prompt are wanted, for which all of it is computed. arrival_time: when it came, on
        the engine's clock, if that was before now. separate_reasoning: whether thoughts are told apart from
        the text, if the model has any. in_thought: whether the prompt has opened one; None: if the last start
        marker in its last turn has no end marker behind it.
        The output that is returned is the one that the steps to come will fill.
        """
        if fork_of is not None and not isinstance(fork_of, str):
            raise RequestError(f"fork_of: found {found(fork_of)}, expected the id of a request")
        arrival_s = self.now()
        if arrival_time is not None:
            arrival_s = number("arrival_time", arrival_time, -_LONG_AGO_S, _LONG_AGO_S)
        params = self.default_sampling_params if sampling_params is None else sampling_params
        request = self._intake.request(
            request_id, prompt, params, arrival_s, return_logits, separate_reasoning, in_thought
        )
        self._add_request(request, fork_of)
        return request.output

    def abort(self, request_id: str, index: int | None = None) -> RequestOutput | None:
        """Gives a request, or one completion of it, up, whatever state it is in.

        Returns what it got so far; None if the request is unknown or has ended. In the midst of a step of the
        same thread, as in a signal's handler, it is given up after that.
        """
        request = self._requests.get(request_id)
        if request is None or self.turns.refusal is not None:
            return None
        self._gone.append((request_id, index))
        if not self.turns.is_nested:
            self._abort_gone()
        return request.output

    def abort_without(self, owner: object, request_id: str, index: int) -> None:
        """Gives a completion up when its owner is garbage, at the beginning of the next call.

        The collector may find it so in the midst of any call; hence nothing but a note is made then.
        """
        watched = _Owner(owner, self._gone.append)
        watched.aborts = request_id, index
        request = self._requests.get(request_id)
        if request is not None:
            request.owners.append(watched)

    def restart_clock(self) -> None:
        """Lets `now` begin at 0 again. Raises `RequestError` while requests are under way."""
        if self.has_unfinished:
            raise RequestError("clock: found requests under way, expected none when it begins again")
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the engine was made: its clock, and the scheduler's."""
        return time.perf_counter() - self._start

    @exclusive_last
    def step(self) -> list[RequestOutput]:
        """Computes one batch; returns the requests that it gave a token to or finished.

        Raises `PolicyError`, after the step, if a policy failed in it: the outputs have what the step gave,
        and from then on what is built in stands in that policy's place.
        """
        self._check_usable("step")
        try:
            return self._step()
        except SequenceError as error:
            cause, error.__cause__ = error.__cause__, None
            try:
                if cause is None or is_from_outside(cause):
                    raise cause or error from None
                return [self._end_failed(error.sequence, cause)]
            finally:
                del cause  # which knows this frame: a cycle would keep what the caller has alive

    def step_or_wait(self) -> None:
        """Takes a step; while another thread takes one, waits for its end instead, which may do as well."""
        if not self.turns.wait():
            self.step()

    @exclusive
    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix; requests under way keep their blocks."""
        self._check_usable("reset_prefix_cache")
        self.changing = True
        self.block_manager.reset_cache()
        self.changing = False

    @exclusive
    def close(self) -> None:
        """Gives up all requests and ends the threads; every later call but this one is refused."""
        if self.turns.refusal is None:
            for request_id in list(self._requests):
                self._abort(request_id)
            self.turns.refusal = "is closed"
        self.runner.close()
        self._grammars.close()
        if self._step_log is not None:
            self._step_log.close()

    def restore(self) -> None:
        """Brings the engine into a state from which a call can begin."""
        if self.turns.refusal is not None:
            return
        if self.changing:
            self._recover()
        while self._gone:
            gone = self._gone[0]
            self._abort(*(gone.aborts if isinstance(gone, _Owner) else gone))
            self._gone.popleft()

    @exclusive
    def _abort_gone(self) -> None:
        """Aborts what is to be aborted: `restore` does."""

    @exclusive
    def _add_request(self, request: Request, fork_of: str | None) -> None:
        self._check_usable("add_request")
        request_id = request.output.request_id
        if request_id in self._requests:
            raise RequestError(f"request_id: {found(request_id)} is in use, expected a new one")
        sequence, *forks = (completion.sequence for completion in request.completions)
        parent = None if fork_of is None else self._requests.get(fork_of)
        self.changing = True
        try:
            if parent is None or not sequence.reads_cache:
                self.loop.add(sequence, request.arrival_s, forks)
            else:
                self.loop.fork(parent.completions[0].sequence, sequence, request.arrival_s, forks)
        except RequestError:  # which comes before anything is changed
            self.changing = False
            raise
        for completion in request.completions:
            self._by_seq_id[completion.sequence.seq_id] = (request, completion)
        self._requests[request_id] = request
        self.changing = False

    def _abort(self, request_id: str, index: int | None = None) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        self.changing = True
        for completion in request.unfinished():
            if index in (None, completion.output.index):
                self.loop.abort(completion.sequence)
                self._finish(request, completion, FinishReason.ABORT)
        self.changing = False

    def _step(self) -> list[RequestOutput]:
        if not self._requests:
            return []
        self.changing = True
        batch = self.loop.begin(self.now(), self.costs)
        shed = {}
        for sequence in batch.shed:
            request, completion = self._by_seq_id[sequence.seq_id]
            self._finish(request, completion, FinishReason.SHED)
            shed[request.output.request_id] = request.output
        self.changing = False
        transfer_s = self._move_blocks(batch)
        self._note_admissions(batch)
        result = self._run(batch) if batch.sequences else RunnerOutput()
        sampled = batch.sampled
        self.changing = True
        for sequence, token_ids in zip(sampled, result.token_ids, strict=True):
            if not token_ids:
                self.loop.abort(sequence, FinishReason.ERROR)
        self._add_forced(sampled, result)
        self.loop.end(batch, result.token_ids, self.now(), transfer_s=transfer_s)
        outputs = self._outputs(batch.sequences, sampled, result)
        self.changing = False
        self.scheduler.policies.raise_error()
        return [*shed.values(), *outputs]

    def _recover(self) -> None:
        """Rebuilds everything else from what is known of the requests."""
        known: dict[Sequence, int] = {}
        by_seq_id: dict[int, tuple[Request, Completion]] = {}
        for request_id, request in list(self._requests.items()):
            for completion in request.unfinished():
                try:
                    known[completion.sequence] = completion.take_back()
                except Exception as error:  # its own data cannot be dealt with
                    if is_from_outside(error):
                        raise
                    request.finish(completion, FinishReason.ERROR, self.now(), _description(error))
                else:
                    by_seq_id[completion.sequence.seq_id] = request, completion
            if request.output.finished:
                del self._requests[request_id]
        self._by_seq_id = by_seq_id
        self.scheduler.recover(known)
        self.changing = False

    def _check_usable(self, call: str) -> None:
        if self.turns.refusal is not None:
            raise EngineError(f"{call}: this engine {self.turns.refusal}, expected another one")

    def _move_blocks(self, batch: ScheduledBatch) -> float:
        """Does the batch's transfers, and returns the seconds that took.

        What the second tier cannot keep or give is computed again.
        """
        if not batch.transfers:
            return 0.0
        start, num_swaps = time.perf_counter(), 0
        transfers = self.block_manager.transfers
        while transfers:
            transfer = transfers[0]
            try:
                self.runner.transfer(transfer)
            except OSError as error:
                if self.scheduler.preemption is not Preemption.RECOMPUTE or self.block_manager.offloads:
                    say(f"swap: {error}; preempted sequences are computed again")
                self.changing = True
                self.loop.transfer_failed(transfer, batch)
                self.changing = False
                transfers = self.block_manager.transfers
            else:
                self.loop.transferred()
                num_swaps += transfer.kind is not TransferKind.COPY
        seconds = time.perf_counter() - start
        if num_swaps:
            self._costs.note_swaps(num_swaps, seconds)
        return seconds

    def _run(self, batch: ScheduledBatch) -> RunnerOutput:
        wishes = {}
        for sequence in chain(batch.sequences, *batch.forks.values()):
            request, completion = self._by_seq_id[sequence.seq_id]
            forced, mask = completion.forced_token, None
            if forced is None:
                try:
                    mask = completion.mask()
                except GrammarError as error:
                    raise SequenceError(sequence) from error
            forbidden = completion.forbidden_tokens()
            if request.logits is not None or forced is not None or mask is not None or forbidden:
                wishes[sequence.seq_id] = Wishes(request.logits is not None, mask, forced, forbidden)
        start = time.perf_counter()
        result = self.runner.run(batch, wishes)
        self._costs.note_step(batch.num_tokens, len(batch.sequences), time.perf_counter() - start)
        return result

    def _add_forced(self, sampled: list[Sequence], result: RunnerOutput) -> None:
        """Takes grammars past the tokens that their sequences got, and adds those that must follow."""
        for index, sequence in enumerate(sampled):
            token_ids = result.token_ids[index]
            if sequence.sampling_params.form is not None and token_ids:
                _, completion = self._by_seq_id[sequence.seq_id]
                try:
                    result.token_ids[index] = completion.with_forced(token_ids[0])
                except GrammarError as error:
                    raise SequenceError(sequence) from error

    def _note_admissions(self, batch: ScheduledBatch) -> None:
        now = self.now()
        for admitted in batch.admitted:
            first = admitted.sequence
            for sequence in (first, *first.forks):
                _, completion = self._by_seq_id[sequence.seq_id]
                completion.admitted(first.num_cached_tokens, first.num_host_tokens, now)

    def _outputs(
        self, computed: list[Sequence], sampled: list[Sequence], result: RunnerOutput
    ) -> list[RequestOutput]:
        now = self.now()
        changed: dict[str, RequestOutput] = {}
        constrained: list[GrammarState] = []
        if result.prompt_logprobs or result.logits:
            for sequence in computed:
                request, _ = self._by_seq_id[sequence.seq_id]
                try:
                    request.collect_prompt(
                        result.prompt_logprobs.get(sequence.seq_id, ()),
                        result.logits.get(sequence.seq_id, ()),
                    )
                except Exception as error:
                    if is_from_outside(error):
                        raise
                    for completion in request.unfinished():
                        self._fail(request, completion, error)
        for sequence in sampled:
            under_way = self._by_seq_id.get(sequence.seq_id)
            if under_way is None:
                continue  # it has just failed
            request, completion = under_way
            changed[request.output.request_id] = request.output
            if sequence.finish_reason is FinishReason.ERROR:
                self._finish(request, completion, FinishReason.ERROR, _NO_TOKEN)
                continue
            try:
                reason = completion.append(result.logprobs.get(sequence.seq_id, ()), now)
            except Exception as error:
                if is_from_outside(error):
                    raise
                self._fail(request, completion, error)
                continue
            if reason is not None:
                self.loop.abort(sequence, reason)  # unless its tokens have ended it
                self._finish(request, completion, reason)
            elif completion.grammar is not None:
                constrained.append(completion.grammar)
        begin_masks(self._grammars.masks, constrained)
        return list(changed.values())

    def _end_failed(self, sequence: Sequence, error: BaseException) -> RequestOutput:
        """Ends the completion of a sequence that could not be dealt with, and with it the step."""
        if self.changing:
            self._recover()
        request, completion = self._by_seq_id[sequence.seq_id]
        self.changing = True
        self._fail(request, completion, error)
        self.changing = False
        return request.output

    def _fail(self, request: Request, completion: Completion, error: BaseException | None) -> None:
        """Ends a completion whose own data could not be dealt with: nobody else is the worse for it."""
        request.logits = None  # they may not be whole
        self.loop.abort(completion.sequence, FinishReason.ERROR)
        self._finish(request, completion, FinishReason.ERROR, _description(error))

    def _finish(
        self, request: Request, completion: Completion, reason: FinishReason, error: str | None = None
    ) -> None:
        request.finish(completion, reason, self.now(), error)
        del self._by_seq_id[completion.sequence.seq_id]
        if request.output.finished:
            del self._requests[request.output.request_id]


def _description(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_DESCRIPTION]
