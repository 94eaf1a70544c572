"""What is said of each HTTP request when it has ended: a line of text or of JSON, and a span if one is told.

A span has vLLM's name and attributes (`gen_ai.*`), times in seconds. It continues the trace of the client's
`traceparent`.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

from pagellm.engine.errors import ConfigError
from pagellm.engine.progress import say, say_line
from pagellm.engine.server.engine_thread import Generation, LiveRequest

_QUIET = ("/health", "/metrics")  # which are asked for all the time


class Ended(NamedTuple):
    """A request that has ended. outcome: what else became of it. route: which of our paths it had.

    headers: those that name a trace.
    """

    request_id: str
    client: str
    method: str
    path: str
    route: str
    status: int
    outcome: str
    start_s: float  # since 1970
    duration_s: float
    headers: Mapping[str, str]
    generation: Generation | None

    def line(self) -> str:
        """It in words."""
        outcome = f", {self.outcome}" if self.outcome else ""
        return f"{self.request_id} {self.method} {self.path} {self.status}{outcome} {self.duration_s:.3f} s"

    def fields(self) -> dict[str, Any]:
        """It as an object, with what was computed."""
        said = {
            "time": self.start_s, "request_id": self.request_id, "client": self.client,
            "method": self.method, "path": self.path, "status": self.status,
            "outcome": self.outcome or None, "duration_s": round(self.duration_s, 6),
        }  # fmt: skip
        if self.generation is None or not self.generation.requests:
            return said
        lives = self.generation.requests
        completions = [one for live in lives for one in live.output.outputs]
        firsts = [one.metrics.first_token_s for one in completions if one.metrics.first_token_s is not None]
        return said | {
            "prompt_tokens": sum(len(live.output.prompt_token_ids) for live in lives),
            "cached_tokens": sum(live.output.outputs[0].metrics.num_cached_tokens for live in lives),
            "completion_tokens": sum(len(one.token_ids) for one in completions),
            "finish_reasons": [one.finish_reason for one in completions],
            "ttft_s": round(min(firsts), 6) if firsts else None,
        }


class AccessLog:
    """Says it: in words, or as a line of JSON where as_json; and to a tracer, if there is one."""

    def __init__(self, as_json: bool = False, trace: Callable[[Ended], None] | None = None) -> None:
        self._as_json = as_json
        self._trace = trace

    def write(self, ended: Ended) -> None:
        """Says what became of a request."""
        if ended.route not in _QUIET:
            if self._as_json:
                say_line(orjson.dumps(ended.fields()).decode())
            else:
                say(ended.line())
        if self._trace is not None and ended.generation is not None:
            self._trace(ended)


def batched_tracer(endpoint: str) -> "Tracer":
    """A tracer that sends spans to a collector, over OTLP and HTTP. Raises `ConfigError` without `otel`."""
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"otlp_traces_endpoint: found {endpoint!r}, expected http://HOST:PORT/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(f"otlp_traces_endpoint: needs pip install 'pagellm[otel]' ({error})") from None
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))


class Tracer:
    """Tells a span for each prompt. processor: what takes spans, such as one that sends them in batches."""

    def __init__(self, processor: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "pagellm"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("pagellm")
        self._kind = SpanKind.SERVER
        self._context_of = TraceContextTextMapPropagator().extract

    def close(self) -> None:
        """Sends what has not been sent yet."""
        self._provider.shutdown()

    def __call__(self, ended: Ended) -> None:
        """Tells the spans of a request that was given to the engine."""
        assert ended.generation is not None
        for live in ended.generation.requests:
            span = self._tracer.start_span(
                "llm_request", context=self._context_of(dict(ended.headers)), kind=self._kind,
                attributes=_attributes(ended, live), start_time=round(ended.start_s * 1e9),
            )  # fmt: skip
            span.end(time.time_ns())


def _attributes(ended: Ended, live: LiveRequest) -> dict[str, Any]:
    output = live.output
    params, metrics = output.sampling_params, output.metrics
    first, scheduled, end = metrics.first_token_s, metrics.first_scheduled_s, metrics.finished_s
    known = {
        "gen_ai.request.id": ended.request_id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.completion_tokens": sum(len(one.token_ids) for one in output.outputs),
        "gen_ai.latency.time_to_first_token": first,
        "gen_ai.latency.e2e": end,
        "gen_ai.latency.time_in_queue": scheduled,
        "gen_ai.latency.time_in_model_prefill": _between(scheduled, first),
        "gen_ai.latency.time_in_model_decode": _between(first, end),
        "gen_ai.latency.time_in_model_inference": _between(scheduled, end),
    }
    return {name: value for name, value in known.items() if value is not None}


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
