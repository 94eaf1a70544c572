"""A trace on the real engine: requests are handed in when they arrive, and the same metrics come out."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import PathLike
from typing import TYPE_CHECKING

from pagellm.engine.errors import RequestError, TraceError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.sim.report.metrics import MetricsCollector
from pagellm.sim.report.perfetto import PerfettoTrace
from pagellm.sim.report.schema import Report
from pagellm.sim.traces.prompt_tokens import PromptTokens
from pagellm.sim.traces.trace import SKIP_BAD, Trace

if TYPE_CHECKING:
    from pagellm.engine.llm_engine import LLMEngine


def replay_for_real(
    engine: "LLMEngine",
    trace: Trace,
    *,
    model: str,
    rate_factor: float = 1.0,
    skip_bad: bool = False,
    slo: Mapping[str, float] | None = None,
    results: str | PathLike[str] | None = None,
    perfetto: str | PathLike[str] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Report:
    """Serves a whole trace at its arrival times on an idle engine, and reports like the simulator.

    The options are the simulator's. A request arrives at its own time, even if the engine is in the middle of
    a step then and takes it in after that.

    Raises `TraceError` for a request that can never be served, unless skip_bad; nothing is left behind then.
    """
    metrics = MetricsCollector([engine.scheduler], slo, results, engine.block_bytes)
    begin = time.perf_counter()
    under_way: dict[str, None] = {}

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
        _serve(engine, trace.scaled(rate_factor), metrics, under_way, skip_bad, progress)
    return metrics.report(
        trace,
        kind="real",
        model=model,
        config=engine.config,
        load={
            "mode": "open",
            "rate_factor": rate_factor,
            "clients": None,
            "replicas": 1,
            "router": None,
            "timeout_s": None,
        },
        wall_s=time.perf_counter() - begin,
    )


def _serve(
    engine: "LLMEngine",
    trace: Trace,
    metrics: MetricsCollector,
    under_way: dict[str, None],
    skip_bad: bool,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Serves the requests; `under_way` has the ids of those that are in the engine, also if it raises."""
    prompt_tokens = PromptTokens(engine.spec.vocab_size, engine.tokenizer)
    requests = iter(trace)
    upcoming = next(requests, None)
    engine.restart_clock()  # it shows the time of the trace, as a simulation's does
    num_ended = num_added = 0
    while upcoming is not None or engine.has_unfinished:
        while upcoming is not None and upcoming.arrival_time <= engine.now():
            request_id, arrival = f"replay-{num_added}", upcoming.arrival_time
            num_added += 1
            under_way[request_id] = None
            try:
                engine.add_request(
                    request_id,
                    prompt_tokens(upcoming).tolist(),
                    upcoming.sampling_params(),
                    arrival_time=arrival,
                )
            except (RequestError, TraceError) as error:
                del under_way[request_id]
                if not skip_bad:
                    raise TraceError(f"{trace.name}: request {upcoming.id!r}: {error}; {SKIP_BAD}") from None
                metrics.rejected(str(upcoming.id), arrival)
                num_ended += 1
            upcoming = next(requests, None)
        if not engine.has_unfinished:
            if upcoming is not None:
                time.sleep(max(0.0, upcoming.arrival_time - engine.now()))
            continue
        for output in engine.step():
            if output.finished:
                del under_way[output.request_id]
                num_ended += 1
                if output.finish_reason is FinishReason.ERROR:
                    raise TraceError(f"{output.request_id}: {output.outputs[0].error}")
                if progress is not None:
                    progress(num_ended, engine.now())
