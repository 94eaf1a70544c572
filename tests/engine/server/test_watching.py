"""What is seen of the server from outside: its metrics, its log, the spans that it tells, its step log."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pagellm.engine import LLM
from tests.engine.server.conftest import eventually, serving, settings, wait_until_ready
from tests.engine.server.test_clients import ask, metrics, request
from tests.engine.server.test_lifetime import start_command, value_of

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
BODY = {"prompt": "hello there, you who wait", "max_tokens": 5, "ignore_eos": True, "n": 2}
# Of vLLM 0.33.0, vllm/v1/metrics/loggers.py: those of what this engine has, too.
NAMES = {
    "num_requests_running": "gauge", "num_requests_waiting": "gauge",
    "num_requests_waiting_by_reason": "gauge",
    "kv_cache_usage_perc": "gauge", "cache_config_info": "gauge", "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter", "num_preemptions": "counter", "prompt_tokens": "counter",
    "prompt_tokens_by_source": "counter", "prompt_tokens_cached": "counter",
    "prompt_tokens_cached_by_source": "counter", "generation_tokens": "counter", "request_success": "counter",
    "admission_rejections": "counter", "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram", "iteration_tokens_total": "histogram",
    "request_max_num_generation_tokens": "histogram", "request_params_n": "histogram",
    "request_params_max_tokens": "histogram", "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram", "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram", "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram", "request_num_preemptions": "histogram",
    "request_prefill_kv_computed_tokens": "histogram",
}  # fmt: skip


def test_metrics_have_vllms_names_kinds_and_labels(server: Any) -> None:
    ask(server, "/v1/completions", BODY)
    lines = metrics(server)
    suffix = {"counter": "_total", "gauge": "", "histogram": "_count"}
    for name, kind in NAMES.items():
        total = name + (suffix["counter"] if kind == "counter" else "")
        assert f"# TYPE vllm:{total} {kind}" in lines
        found = [line for line in lines if line.startswith(f"vllm:{name}{suffix[kind]}{{")]
        assert found, name
        for line in found:
            if name != "cache_config_info":
                assert 'model_name="tiny"' in line
            assert name == "admission_rejections" or 'engine="0"' in line
    assert value_of(server, "http_request_duration_seconds_count", "/v1/completions") > 0
    assert value_of(server, "http_requests_total", "/v1/completions", '"2xx"') > 0
    assert value_of(server, "process_resident_memory_bytes") > 0


def test_metrics_count_what_was_computed(server: Any) -> None:
    names = {
        "computed": ("prompt_tokens_by_source_total", "local_compute"),
        "found": ("prompt_tokens_by_source_total", "local_cache_hit"),
        "cached": ("prompt_tokens_cached_total",),
        "prompts": ("vllm:prompt_tokens_total",),
        "generated": ("vllm:generation_tokens_total",),
        "longest": ("request_max_num_generation_tokens_sum",),
        "kv": ("request_prefill_kv_computed_tokens_sum",),
    }
    assert request(server, "/reset_prefix_cache", b"", "POST")[0] == 200
    before = {name: value_of(server, *words) for name, words in names.items()}
    usage = [ask(server, "/v1/completions", BODY)["usage"] for _ in range(2)]
    grown = {name: value_of(server, *words) - before[name] for name, words in names.items()}
    num_prompt = usage[0]["prompt_tokens"]
    found = usage[1]["prompt_tokens_details"]["cached_tokens"]
    assert found > 0
    assert grown["found"] == grown["cached"] == found
    assert grown["computed"] == 2 * num_prompt - found
    assert grown["prompts"] == 2 * num_prompt
    assert grown["generated"] == 20
    assert grown["longest"] == 10
    assert grown["kv"] == 2 * grown["computed"]  # of each completion


@pytest.fixture
def spans(thinker: Path) -> Iterator[Any]:
    """A server that keeps its spans, as `exporter`, and writes its log as JSON."""
    pytest.importorskip("opentelemetry.sdk", reason="spans need the extra otel")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from pagellm.engine.server.access_log import AccessLog, Tracer

    exporter = InMemorySpanExporter()
    log = AccessLog(True, Tracer(SimpleSpanProcessor(exporter)))
    with serving(lambda: LLM(thinker, show_progress=False, **settings()), "tiny", log=log) as service:
        wait_until_ready(service)
        service.exporter = exporter
        yield service


def test_each_request_is_a_span_and_a_line_of_json(spans: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-Id": "mine"}
    usage = ask(spans, "/v1/completions", BODY | {"temperature": 0.5}, **headers)["usage"]
    assert eventually(lambda: len(spans.exporter.get_finished_spans()) == 1)
    [span] = spans.exporter.get_finished_spans()
    assert (span.name, span.kind.name, f"{span.context.trace_id:032x}") == ("llm_request", "SERVER", trace)
    given = span.attributes
    assert given["gen_ai.request.id"] == "mine"
    assert (given["gen_ai.request.n"], given["gen_ai.request.temperature"]) == (2, 0.5)
    assert given["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
    assert given["gen_ai.usage.completion_tokens"] == usage["completion_tokens"] == 10
    first, end = given["gen_ai.latency.time_to_first_token"], given["gen_ai.latency.e2e"]
    queue, prefill = given["gen_ai.latency.time_in_queue"], given["gen_ai.latency.time_in_model_prefill"]
    decode = given["gen_ai.latency.time_in_model_decode"]
    assert 0 <= queue <= first <= end
    assert queue + prefill + decode == pytest.approx(end)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    [line] = [line for line in lines if line["request_id"] == "mine"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 10)
    assert (line["finish_reasons"], line["outcome"]) == (["length", "length"], None)
    assert request(spans, "/v1/completions", {"prompt": []})[0] == 400
    assert len(spans.exporter.get_finished_spans()) == 1  # it never came to the engine


@pytest.mark.parametrize("as_json", [True, False])
def test_a_log_that_nobody_takes_is_lost_and_no_more(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagellm.engine.server.access_log import AccessLog, Ended

    ended = Ended("mine", "", "GET", "/version", "/version", 200, "", 0.0, 0.0, {}, None)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as broken:
        for stream in (None, broken):
            monkeypatch.setattr("sys.stderr", stream)
            AccessLog(as_json).write(ended)
        with suppress(BrokenPipeError):
            broken.close()


class Collector(BaseHTTPRequestHandler):
    """Takes what an exporter sends."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_the_command_sends_spans_and_writes_its_steps(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="spans need the extra otel")
    Collector.received = []
    steps = tmp_path / "steps.jsonl"
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        flags = ["--otlp-traces-endpoint", endpoint, "--step-log", str(steps), "--log-format", "json"]
        with start_command(*flags) as process:
            wait_until_ready(process)
            ask(process, "/v1/completions", BODY, **{"X-Request-Id": "mine"})
            process.terminate()
            log = process.stderr.read()
            assert process.wait(60) == 0
        collector.shutdown()
    [(path, span)] = Collector.received
    assert path == "/v1/traces"
    assert b"llm_request" in span
    assert b"gen_ai.usage.prompt_tokens" in span
    assert '"request_id":"mine"' in log
    records = [json.loads(line) for line in steps.read_text().splitlines()]
    assert sum(len(record["finished"]) for record in records) == 2
