"""The engine on a thread of its own, and what it gives carried over to the event loop.

Requests and aborts go to the thread through one queue and are done between two steps. After each step the
loop is woken once; every completion that got something has its latest state there, which replaces the one
before. So a reader, however slow, holds up nobody and makes nothing grow: what it missed it finds together.
Knows nothing of HTTP.
"""

import asyncio
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

from pagellm.engine.errors import CheckpointError, EngineError, PolicyError
from pagellm.engine.llm import LLM
from pagellm.engine.llm_engine import LLMEngine
from pagellm.engine.progress import say
from pagellm.engine.requests.outputs import CompletionOutput, FinishReason, RequestOutput
from pagellm.engine.requests.sampling_params import SamplingParams

# An engine that fails so often in a row, though it recovers each time, serves nobody any more.
_MOST_FAILURES = 3


class Entry(NamedTuple):
    """One prompt of a generation; arrival_s on the engine's clock. More: see `LLMEngine.add_request`."""

    token_ids: list[int]
    params: SamplingParams
    arrival_s: float | None = None
    separate_reasoning: bool = False
    in_thought: bool | None = None


class State(NamedTuple):
    """What a completion has after a step. num_tokens: of its `token_ids`, and `logprobs`, that stand."""

    text: str = ""
    reasoning: str | None = None
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None


class LiveRequest:
    """A request that the engine has: its output, and how far each completion is known on the loop."""

    def __init__(self, output: RequestOutput, generation: "Generation") -> None:
        self.output = output
        self.generation = generation
        self.states = [State() for _ in output.outputs]
        self.is_queued = True  # it has no token yet


class Generation:
    """The requests of one caller, which belong together; read on the event loop that submitted them."""

    def __init__(self, thread: "EngineThread", request_ids: list[str]) -> None:
        self.requests: list[LiveRequest] = []
        self.changed = asyncio.Event()
        self.expired_s: float | None = None  # after how long it was given up, if it was
        self._timer: asyncio.TimerHandle | None = None
        self._thread = thread
        self.request_ids = request_ids

    @property
    def finished(self) -> bool:
        """Whether every completion has ended, as far as the loop knows."""
        return all(state.finish_reason is not None for live in self.requests for state in live.states)

    async def wait(self) -> None:
        """Waits until something has come since the last time."""
        await self.changed.wait()
        self.changed.clear()

    async def wait_for_end(self) -> None:
        """Waits until every completion has ended."""
        while not self.finished:
            await self.wait()

    def close(self) -> None:
        """Gives up what has not ended; blocks are free before the next step."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.requests or not self.finished:
            self._thread.abort(self.request_ids)

    def expire_at(self, time_s: float, seconds: float) -> None:
        """Gives it up then, on the loop's clock, after so many seconds, unless it has ended."""
        self._timer = asyncio.get_running_loop().call_at(time_s, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        if not self.finished:
            self.expired_s = seconds
            self.close()


class StepObserver(Protocol):
    """Hears, on the engine's thread, of what happens there."""

    def attached(self, engine: LLMEngine) -> None:
        """The engine is ready; nothing has been computed yet."""

    def accepted(self, output: RequestOutput) -> None:
        """A request was taken in."""

    def grown(self, output: RequestOutput, completion: CompletionOutput, num_new: int, now: float) -> None:
        """A completion got tokens, on the engine's clock, or ended."""


class EngineThread:
    """Loads a model and steps its engine until it is closed.

    load: makes the LLM. when_ready: called on the event loop, with None or the exception that loading raised.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        observer: StepObserver,
        when_ready: Callable[[BaseException | None], None],
    ) -> None:
        self.llm: LLM | None = None
        self.failure: str | None = None  # why the engine serves nobody any more
        self._load = load
        self._observer = observer
        self._when_ready = when_ready
        self._loop = asyncio.get_running_loop()
        # Requests that have no token yet, and the tokens of their prompts; as the event loop knows.
        self.num_queued = self.num_queued_tokens = 0
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._live: dict[str, LiveRequest] = {}  # of the thread
        self._published: dict[str, list[State]] = {}
        self._numbers = count()
        self._thread = threading.Thread(target=self._run, name="pagellm-engine", daemon=True)

    def start(self) -> None:
        """Begins to load the model."""
        self._thread.start()

    @property
    def num_live(self) -> int:
        """Requests that have been taken in and have not ended."""
        return len(self._live)

    async def submit(self, entries: Sequence[Entry]) -> Generation:
        """Takes all of these requests in, or none.

        Raises `RequestError` for one that cannot be served and `EngineError` if the engine has gone. If the
        caller is cancelled meanwhile, they are given up.
        """
        generation = Generation(self, [f"http-{next(self._numbers)}" for _ in entries])
        for entry in entries:
            self._count(entry.token_ids, 1)

        def refused(_: Exception) -> None:
            for entry in entries:
                self._count(entry.token_ids, -1)

        try:
            await self._call(partial(self._add, generation, entries), refused)
        except asyncio.CancelledError:
            generation.close()
            raise
        return generation

    async def between_steps(self, work: Callable[[], Any]) -> Any:
        """Does something on the thread, while no step is under way."""
        return await self._call(work)

    async def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix."""
        await self._call(lambda: self.engine.reset_prefix_cache())

    def abort(self, request_ids: Iterable[str]) -> None:
        """Gives requests up, before the next step; ones that have ended are passed over."""
        self._commands.put(partial(self._abort, list(request_ids)))

    def close(self) -> None:
        """Gives up all that is under way and ends the thread."""
        self._commands.put(None)

    def join(self, timeout_s: float) -> None:
        """Waits for the thread's end."""
        self._thread.join(timeout_s)

    async def _call(
        self, work: Callable[[], Any], failed: Callable[[Exception], None] = lambda error: None
    ) -> Any:
        """Does something on the thread, between two steps, and gives what it gives or raises.

        failed: called on the loop if it raised, also where nobody waits any more.
        """
        future: asyncio.Future[Any] = self._loop.create_future()

        def run() -> None:
            try:
                result, error = work(), None
            except Exception as raised:
                result, error = None, raised
                self._tell(failed, raised)
            self._tell(_resolve, future, result, error)

        self._commands.put(run)
        if self.failure is not None:  # the thread may not have seen it any more
            _resolve(future, None, EngineError(self.failure))
        return await future

    @property
    def engine(self) -> LLMEngine:
        """The engine, for its own thread. Raises `EngineError` if there is none."""
        if self.llm is None or self.failure is not None:
            raise EngineError(self.failure or "the model is not loaded yet")
        return self.llm.engine

    def _run(self) -> None:
        try:
            llm = self._load()
            _prepare(llm)
            self._observer.attached(llm.engine)
        except BaseException as error:
            self.failure = f"the model could not be loaded: {error}"
            self._refuse_rest()
            self._tell(self._when_ready, error)
            return
        self.llm = llm
        self._tell(self._when_ready, None)
        num_failures = 0
        while self._obey():
            try:
                self._publish(llm.engine.step())
                num_failures = 0
            except Exception as error:
                self._publish_all()
                if isinstance(error, PolicyError):
                    say(str(error))
                    continue
                traceback.print_exception(error)
                num_failures += 1
                if num_failures == _MOST_FAILURES:
                    self.failure = f"the engine failed: {type(error).__name__}: {error}"[:500]
                    break
        self.failure = self.failure or "the server shuts down"
        with suppress(Exception):
            llm.close()
        self._publish_all()
        self._refuse_rest()

    def _refuse_rest(self) -> None:
        """Tells those whose commands came too late; who comes later yet sees `failure`."""
        with suppress(Empty):
            while True:
                command = self._commands.get(block=False)
                if command is not None:
                    command()

    def _obey(self) -> bool:
        """Does what was asked for since the last step; waits where there is nothing to compute.

        Returns whether to go on.
        """
        assert self.llm is not None
        while True:
            try:
                command = self._commands.get(block=not self.llm.engine.has_unfinished)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, generation: Generation, entries: Sequence[Entry]) -> None:
        engine = self.engine
        added: list[LiveRequest] = []
        try:
            for request_id, entry in zip(generation.request_ids, entries, strict=True):
                output = engine.add_request(
                    request_id, entry.token_ids, entry.params, arrival_time=entry.arrival_s,
                    separate_reasoning=entry.separate_reasoning, in_thought=entry.in_thought,
                )  # fmt: skip
                added.append(LiveRequest(output, generation))
        except BaseException:
            for live in added:
                engine.abort(live.output.request_id)
            raise
        generation.requests = added
        for live in added:
            self._live[live.output.request_id] = live
            self._published[live.output.request_id] = list(live.states)
            self._observer.accepted(live.output)

    def _abort(self, request_ids: list[str]) -> None:
        assert self.llm is not None
        for request_id in request_ids:
            self.llm.engine.abort(request_id)
        self._publish([self._live[name].output for name in request_ids if name in self._live])

    def _publish_all(self) -> None:
        self._publish([live.output for live in self._live.values()])

    def _publish(self, outputs: Iterable[RequestOutput]) -> None:
        """Wakes the loop, once, with what these have now."""
        assert self.llm is not None
        now = self.llm.engine.now()
        news: list[tuple[LiveRequest, list[State]]] = []
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None:
                continue
            published = self._published[output.request_id]
            states = list(published)
            for index, completion in enumerate(output.outputs):
                old = published[index]
                if old.finish_reason is not None:
                    continue
                new = State(
                    completion.text, completion.reasoning, len(completion.token_ids),
                    completion.finish_reason, completion.error,
                )  # fmt: skip
                if new != old:
                    states[index] = new
                    self._observer.grown(output, completion, new.num_tokens - old.num_tokens, now)
            if output.finished:
                del self._live[output.request_id], self._published[output.request_id]
            else:
                self._published[output.request_id] = states
            news.append((live, states))
        if news:
            self._tell(self._deliver, news)

    def _deliver(self, news: list[tuple[LiveRequest, list[State]]]) -> None:
        for live, states in news:
            live.states = states
            if live.is_queued and any(state.num_tokens or state.finish_reason for state in states):
                live.is_queued = False
                self._count(live.output.prompt_token_ids, -1)
            live.generation.changed.set()

    def _count(self, token_ids: Sequence[int], number: int) -> None:
        self.num_queued += number
        self.num_queued_tokens += number * len(token_ids)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(call, *arguments)


def _prepare(llm: LLM) -> None:
    """Does what takes long at its first use."""
    _ = llm.engine.thoughts
    if llm.tokenizer.chat_template is not None:
        with suppress(CheckpointError):  # whoever sends a chat is told
            llm.tokenizer.chat_template.variables()


def _resolve(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
