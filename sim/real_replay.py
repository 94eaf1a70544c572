"""A trace on the real engine: requests are handed in when they arrive, and the same metrics come out."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from heapq import heappop, heappush
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING

from pagellm.engine.errors import PolicyError, RequestError, TraceError
from pagellm.engine.requests.outputs import FinishReason, RequestOutput
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener
from pagellm.sim.report.metrics import MetricsCollector
from pagellm.sim.report.perfetto import PerfettoTrace
from pagellm.sim.report.schema import Report
from pagellm.sim.simulator import foresee
from pagellm.sim.traces.prompt_tokens import PromptTokens
from pagellm.sim.traces.request import TraceRequest
from pagellm.sim.traces.sessions import Sessions
from pagellm.sim.traces.trace import SKIP_BAD, Trace

if TYPE_CHECKING:
    from pagellm.engine.llm_engine import LLMEngine


def replay_for_real(
    engine: "LLMEngine",
    trace: Trace,
    *,
    model: str,
    rate_factor: float = 1.0,
    clients: int | None = None,
    skip_bad: bool = False,
    slo: Mapping[str, float] | None = None,
    results: str | PathLike[str] | None = None,
    perfetto: str | PathLike[str] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Report:
    """Serves a whole trace at its arrival times on an idle engine, and reports like the simulator.

    The options are the simulator's. A request arrives at its own time, even if the engine is in the middle of
    a step then and takes it in after that. One that waits for an answer arrives when that is there, and goes
    on with what the engine said.

    Raises `TraceError` for a request that can never be served, unless skip_bad; nothing is left behind then.
    """
    metrics = MetricsCollector([engine.scheduler], slo, results, engine.block_bytes)
    begin = time.perf_counter()
    under_way: dict[str, TraceRequest] = {}

    def abort() -> None:
        for request_id in under_way:
            engine.abort(request_id)

    with ExitStack() as stack:
        stack.callback(metrics.close)
        listeners = [metrics.listener()]
        if perfetto is not None:
            steps = stack.enter_context(PerfettoTrace(perfetto))
            listeners.append(steps.listener(engine.scheduler))
        # Before the rest is aborted, nobody listens any more: an interrupt may have kept a step from them.
        stack.callback(abort)
        for listener in listeners:
            engine.loop.listen(listener)
            stack.callback(engine.loop.ignore, listener)
        _serve(engine, trace.scaled(rate_factor), metrics, under_way, clients, skip_bad, progress)
    return metrics.report(
        trace,
        kind="real",
        model=model,
        config=engine.config,
        load={
            "mode": "open" if clients is None else "closed",
            "rate_factor": rate_factor,
            "clients": clients,
            "replicas": 1,
            "router": None,
            "timeout_s": None,
        },
        wall_s=time.perf_counter() - begin,
    )


class _StepEnds(StepListener):
    """When the step before ended, as a step log and hence its simulation has it."""

    def __init__(self) -> None:
        self._start_s = self.end_s = 0.0

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        self._start_s = now

    def committed(self, end: StepEnd) -> None:
        self.end_s = self._start_s + end.duration_s


class _Requests:
    """What is to be sent: the requests of a trace at their times, and those that waited when they may be."""

    def __init__(self, trace: Trace, clients: int | None) -> None:
        self.sessions = Sessions(trace, keeps_times=clients is None)
        self._openers = self.sessions.openers()
        self._is_closed = clients is not None
        self._opener = None if self._is_closed else next(self._openers, None)
        self._followers: list[tuple[float, int, TraceRequest]] = []  # a heap
        for request in islice(self._openers, clients or 0):
            self._followers.append((0.0, request.index, request))

    def next_s(self) -> float | None:
        """When the next one is sent; None if none is left that waits for nothing."""
        times = [time for time, *_ in self._followers[:1]]
        if self._opener is not None:
            times.append(self._opener.arrival_time)
        return min(times, default=None)

    def pop(self) -> TraceRequest:
        """The next one."""
        opener = self._opener
        if opener is None or (self._followers and self._followers[0][0] < opener.arrival_time):
            return heappop(self._followers)[2]
        self._opener = next(self._openers, None)
        return opener

    def ended(
        self, request: TraceRequest, tokens: Iterable[int], now: float, is_answered: bool = True
    ) -> None:
        """Takes note of an end: who waits for it is sent."""
        for time_s, follower in self.sessions.ended(request, tokens, now, is_answered):
            heappush(self._followers, (time_s, follower.index, follower))
        if self._is_closed and self.sessions.is_over(request):
            for other in islice(self._openers, 1):
                heappush(self._followers, (now, other.index, other))


def _step(engine: "LLMEngine") -> list[RequestOutput]:
    try:
        return engine.step()
    except PolicyError as error:  # a report of two policies would be one of neither
        raise PolicyError(error.failure, "the replay ends here") from error


def _serve(
    engine: "LLMEngine",
    trace: Trace,
    metrics: MetricsCollector,
    under_way: dict[str, TraceRequest],
    clients: int | None,
    skip_bad: bool,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Serves the requests; `under_way` has those that are in the engine by their ids, also if it raises."""
    prompt_tokens = PromptTokens(engine.spec.vocab_size, engine.tokenizer)
    foresee([engine.scheduler], trace, prompt_tokens)
    requests, ends = _Requests(trace, clients), _StepEnds()
    engine.restart_clock()  # it shows the time of the trace, as a simulation's does
    engine.loop.listen(ends)
    num_ended = num_added = 0
    try:
        while (sent_s := requests.next_s()) is not None or engine.has_unfinished:
            while sent_s is not None and sent_s <= engine.now():
                request = requests.pop()
                request_id = f"replay-{num_added}"
                num_added += 1
                tokens: list[int] = []
                try:
                    tokens = requests.sessions.prompt(request, prompt_tokens).tolist()
                    metrics.note_class(request_id, request.class_)
                    engine.add_request(request_id, tokens, request.sampling_params(), arrival_time=sent_s)
                    under_way[request_id] = request
                except (RequestError, TraceError) as error:
                    if not skip_bad:
                        name = f"{trace.name}: request {request.id!r}"
                        raise TraceError(f"{name}: {error}; {SKIP_BAD}") from None
                    metrics.rejected(str(request.id), sent_s, tenant=request.tenant, class_=request.class_)
                    requests.ended(request, tokens, engine.now(), is_answered=False)
                    num_ended += 1
                sent_s = requests.next_s()
            if not engine.has_unfinished:
                if sent_s is not None:
                    time.sleep(max(0.0, sent_s - engine.now()))
                continue
            for output in _step(engine):
                if output.finished:
                    request = under_way.pop(output.request_id)
                    num_ended += 1
                    if output.finish_reason is FinishReason.ERROR:
                        raise TraceError(f"{output.request_id}: {output.outputs[0].error}")
                    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
                    is_answered = output.finish_reason is not FinishReason.SHED
                    requests.ended(request, tokens, ends.end_s, is_answered)
                    if progress is not None:
                        progress(num_ended, engine.now())
    finally:
        engine.loop.ignore(ends)
