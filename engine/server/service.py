"""What every endpoint works with: the engine's thread, the workers, the names of the model, what is counted.

Workers are threads for what takes long and is neither the engine's nor the event loop's: text to token ids,
templates, large JSON.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from uuid import uuid4

from pagellm.engine.errors import PagellmError
from pagellm.engine.llm import LLM
from pagellm.engine.progress import say
from pagellm.engine.server.answers import now
from pagellm.engine.server.engine_thread import EngineThread
from pagellm.engine.server.errors import ApiError, not_ready
from pagellm.engine.server.limits import Limits
from pagellm.engine.server.live import LiveFeed
from pagellm.engine.server.metrics import ServerMetrics

_NUM_WORKERS = 8
_MOST_NAMED_FIELDS = 1000  # of unknown fields the names that are remembered
_Result = TypeVar("_Result")


class Service:
    """One model, served. names: what clients may call it; the first is what answers call it.

    load: makes the LLM, on the engine's thread. when_ready: called on the event loop when it has, or cannot.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        names: Sequence[str],
        when_ready: Callable[[], None] = lambda: None,
        limits: Limits | None = None,
    ) -> None:
        self.names = list(names)
        self.created = now()
        self.instance_id = uuid4().hex
        self.metrics = ServerMetrics(self.names[0])
        self.num_serving = 0  # generation requests under way
        self.kv_event_sources: dict[str, Any] = {}  # where KV events are published, by rank, as vLLM says it
        self.load_error: BaseException | None = None
        self.limits = limits or Limits()
        self._num_preparing = 0  # requests whose prompts are being made
        self._load = load
        self._when_ready = when_ready
        self._workers = ThreadPoolExecutor(_NUM_WORKERS, "pagellm-worker")
        self._thread: EngineThread | None = None
        self.feed: LiveFeed | None = None
        self._named_fields: set[str] = set()

    def start(self) -> None:
        """Begins to load the model. To be called on the event loop."""
        self._thread = EngineThread(self._load, self.metrics, self._ready)
        self.feed = LiveFeed(self._thread, self.metrics)
        self._thread.start()

    def close(self) -> None:
        """Gives up what is under way and ends the engine's thread."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.end_feed()
        if self._thread is not None:
            self._thread.close()

    def end_feed(self) -> None:
        """Lets those who watch the engine go."""
        if self.feed is not None:
            self.feed.close()

    def join(self, timeout_s: float) -> None:
        """Waits for the end of the engine's thread, which `close` has asked for."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _ready(self, error: BaseException | None) -> None:
        self.load_error = error
        self._when_ready()

    @property
    def thread(self) -> EngineThread:
        """The engine's thread. Raises `ApiError` while it serves nobody."""
        thread = self._thread
        if thread is None or (thread.llm is None and thread.failure is None):
            raise not_ready("the model is being loaded")
        if thread.failure is not None:
            raise ApiError(503, thread.failure)
        return thread

    @property
    def llm(self) -> LLM:
        """The model. Raises `ApiError` while it serves nobody."""
        llm = self.thread.llm
        assert llm is not None
        return llm

    async def work(self, call: Callable[..., _Result], *arguments: Any) -> _Result:
        """Does something in a worker."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: call(*arguments))

    async def prepare(self, call: Callable[..., _Result], *arguments: Any) -> _Result:
        """Makes a request's prompts in a worker. Raises `ApiError`, before that, where too many wait."""
        self.check_queue(0, self._num_preparing)
        self._num_preparing += 1
        try:
            return await self.work(call, *arguments)
        finally:
            self._num_preparing -= 1

    def check_queue(self, num_tokens: int, num_preparing: int = 0) -> None:
        """Raises `ApiError` where too many wait for prompts of so many tokens to wait, too.

        Prompts that would wait for nobody are let in, however long they are.
        """
        thread, limits = self.thread, self.limits
        num_queued = thread.num_queued + num_preparing
        if limits.max_queued_requests is not None and num_queued >= limits.max_queued_requests:
            self.metrics.rejected("max_num_queued_reqs")
            raise not_ready(f"the queue is full: {num_queued} requests wait for their first token")
        waiting = thread.num_queued_tokens
        if (
            limits.max_queued_tokens is not None
            and waiting
            and waiting + num_tokens >= limits.max_queued_tokens
        ):
            self.metrics.rejected("max_num_queued_tokens")
            raise not_ready(f"the queue is full: prompts of {waiting} tokens wait")

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` for a model that is not served here."""
        if name is not None and name not in self.names:
            raise ApiError(404, f"The model `{name[:200]}` does not exist.", "model")

    def note_unknown_fields(self, names: Iterable[str]) -> None:
        """Counts fields that mean nothing, and names each once in the log."""
        for name in names:
            self.metrics.unknown_fields.inc()
            if name not in self._named_fields and len(self._named_fields) < _MOST_NAMED_FIELDS:
                self._named_fields.add(name)
                say(f"requests have the field {name[:80]!r}, which means nothing here")

    def failure(self) -> PagellmError | None:
        """Why the model could not be loaded, where that is the user's business."""
        error = self.load_error
        if error is None or isinstance(error, PagellmError):
            return error
        return PagellmError(f"the model could not be loaded: {type(error).__name__}: {error}")


AnyEndpoint = Callable[..., Awaitable[Any]]
