"""What Prometheus reads, under vLLM's names, which dashboards, autoscalers and benchmarks go by.

Counters and histograms are told on the engine's thread, after each step; gauges are read from the engine
when somebody asks. Times are in seconds, from a request's arrival at the server's door.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from pagellm.engine.llm_engine import LLMEngine
from pagellm.engine.requests.outputs import CompletionOutput, FinishReason, RequestOutput
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener

CONTENT_TYPE = CONTENT_TYPE_LATEST
_NUM_RECENT = 512
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class ServerMetrics(StepListener):
    """All metrics of one server. model_name: the label of every metric of the engine."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self.num_generated = self.num_computed = 0  # tokens
        self.last_step = 0, 0  # its sequences and tokens
        self.recent_ttft_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self.recent_itl_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._last_token_s: dict[tuple[str, int], float] = {}  # of each completion under way
        self.unknown_fields = Counter(
            "pagellm:unknown_request_fields", "Fields of requests that meant nothing.", registry=self.registry
        )
        self._http_requests = Counter(
            "http_requests", "HTTP requests that were answered.", ["method", "status", "handler"],
            registry=self.registry,
        )  # fmt: skip
        self._http_seconds = Histogram(
            "http_request_duration_seconds", "Time from a request to the end of its answer.",
            ["method", "handler"], buckets=(0.1, 0.5, 1), registry=self.registry,
        )  # fmt: skip
        ProcessCollector(registry=self.registry)

        self._rejections = Counter(
            "vllm:admission_rejections", "Requests that found the queue full.", ["model_name", "reason"],
            registry=self.registry,
        )  # fmt: skip
        for reason in ("max_num_queued_reqs", "max_num_queued_tokens"):
            self._rejections.labels(model_name, reason)

    def answered(self, method: str, status: int, handler: str, seconds: float) -> None:
        """An HTTP request has ended. Answers are counted by hundreds of status, as vLLM counts them."""
        self._http_requests.labels(method, f"{status // 100}xx", handler).inc()
        self._http_seconds.labels(method, handler).observe(seconds)

    def rejected(self, reason: str) -> None:
        """The queue was full, of requests or of tokens, as vLLM's settings are called."""
        self._rejections.labels(self._labels["model_name"], reason).inc()

    def text(self) -> bytes:
        """All of it in Prometheus's text form."""
        text: bytes = generate_latest(self.registry)
        return text

    def attached(self, engine: LLMEngine) -> None:
        """The engine is ready; nothing has been computed yet."""
        scheduler, manager, config = engine.scheduler, engine.block_manager, engine.config
        self._gauge("num_requests_running", "Requests that run.", lambda: len(scheduler.running))
        self._gauge("num_requests_waiting", "Requests that wait.", lambda: scheduler.num_waiting)
        self._gauge(
            "kv_cache_usage_perc", "Share of the KV cache's blocks that requests hold; 1 is all of them.",
            lambda: 1 - manager.num_free_blocks / manager.num_blocks,
        )  # fmt: skip
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason", "Requests that wait, by what for.",
            [*self._labels, "reason"], registry=self.registry,
        )  # fmt: skip
        by_reason.labels(**self._labels, reason="capacity").set_function(lambda: scheduler.num_waiting)
        by_reason.labels(**self._labels, reason="deferred").set(0)  # nobody waits for anything else
        info = {
            "block_size": config.block_size,
            "num_gpu_blocks": config.num_blocks,
            "num_cpu_blocks": config.num_swap_blocks,
            "enable_prefix_caching": config.enable_prefix_caching,
            "enable_hierarchical_cache": config.enable_hierarchical_cache,
            "engine": "0",
        }
        self._new(Gauge, "cache_config_info", "Settings of the KV cache.", labels=info).set(1)

        self._cache_stats, self._cache_seen = manager.stats, [0, 0, 0]
        self._queries = self._new(Counter, "prefix_cache_queries", "Tokens that were looked up in it.")
        self._hits = self._new(Counter, "prefix_cache_hits", "Tokens that the prefix cache had.")
        self._offloads = manager.offloads
        if self._offloads:
            self._host_queries = self._new(
                Counter, "external_prefix_cache_queries", "Tokens that were looked up in the second tier."
            )
            self._host_hits = self._new(
                Counter, "external_prefix_cache_hits", "Tokens that the second tier had."
            )
        self._preemptions = self._new(Counter, "num_preemptions", "Times that a request made way.")
        self._prompt_tokens = self._new(Counter, "prompt_tokens", "Tokens of prompts.")
        by_source = Counter(
            "vllm:prompt_tokens_by_source", "Tokens of prompts, computed or found.",
            [*self._labels, "source"], registry=self.registry,
        )  # fmt: skip
        self._computed = by_source.labels(**self._labels, source="local_compute")
        self._found = by_source.labels(**self._labels, source="local_cache_hit")
        self._loaded = by_source.labels(**self._labels, source="external_kv_transfer")
        self._cached = self._new(Counter, "prompt_tokens_cached", "Tokens of prompts that were found.")
        cached_by_source = Counter(
            "vllm:prompt_tokens_cached_by_source", "The prefix cache's hits, by where they lay.",
            [*self._labels, "source"], registry=self.registry,
        )  # fmt: skip
        self._device_hits = cached_by_source.labels(**self._labels, source="device")
        self._tier_hits = cached_by_source.labels(**self._labels, source="host")
        self._generation_tokens = self._new(Counter, "generation_tokens", "Tokens that were generated.")
        success = Counter(
            "vllm:request_success", "Requests that have ended.", [*self._labels, "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._ended = {
            reason: success.labels(**self._labels, finished_reason=str(reason)) for reason in FinishReason
        }
        lengths = _one_two_five(config.max_model_len)
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens of a step.", _STEP_TOKENS)
        self._request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", lengths)
        self._request_tokens = self._histogram(
            "request_generation_tokens", "Tokens that a request got.", lengths
        )
        self._most_tokens = self._histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion.", lengths
        )
        self._kv_computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Tokens of a prompt that were computed.", lengths
        )
        self._request_preemptions = self._histogram(
            "request_num_preemptions", "Times that a request made way.", _PREEMPTIONS
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "Tokens that a request asked for at most.", lengths
        )
        self._n = self._histogram(
            "request_params_n", "Completions that a request asked for.", (1, 2, 5, 10, 20)
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to the first token.", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between two tokens.", _ITL_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Time per token after the first, of a request.", _ITL_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Time to the end.", _REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", "Time until it ran first.", _REQUEST_S)
        self._inference = self._histogram(
            "request_inference_time_seconds", "Time from then to its end.", _REQUEST_S
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Time from then to the first token.", _REQUEST_S
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "Time from the first token to the end.", _REQUEST_S
        )
        engine.loop.listen(self)

    def accepted(self, output: RequestOutput) -> None:
        """A request was taken in."""
        params = output.sampling_params
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        """A step begins."""
        if batch.preempted:
            self._preemptions.inc(len(batch.preempted))
        stats, seen = self._cache_stats, self._cache_seen
        if stats.queries != seen[0]:
            num_host = stats.host_hits - seen[2]
            num_queries, num_hits = stats.queries - seen[0], stats.hits - seen[1] - num_host
            self._queries.inc(num_queries)
            self._hits.inc(num_hits)
            self._device_hits.inc(num_hits)
            self._tier_hits.inc(num_host)
            if self._offloads:
                self._host_queries.inc(num_queries - num_hits)
                self._host_hits.inc(num_host)
            self._cache_seen = [stats.queries, stats.hits, stats.host_hits]

    def committed(self, end: StepEnd) -> None:
        """A step has ended."""
        num_computed, num_generated = end.batch.num_tokens, end.batch.num_output_tokens
        self.num_computed += num_computed
        self.num_generated += num_generated
        self.last_step = len(end.batch.sequences), num_computed
        self._step_tokens.observe(num_computed)
        self._generation_tokens.inc(num_generated)

    def grown(self, output: RequestOutput, completion: CompletionOutput, num_new: int, now: float) -> None:
        """A completion got tokens or ended."""
        name = output.request_id, completion.index
        metrics = completion.metrics
        last_s = self._last_token_s.get(name)
        if num_new > 0:
            if last_s is None:
                if metrics.first_token_s is not None:
                    self._ttft.observe(metrics.first_token_s)
                    self.recent_ttft_s.append(metrics.first_token_s)
                if completion.index == 0:
                    num_prompt, num_cached = len(output.prompt_token_ids), metrics.num_cached_tokens
                    self._prompt_tokens.inc(num_prompt)
                    self._computed.inc(num_prompt - num_cached)
                    self._found.inc(num_cached - metrics.num_host_tokens)
                    self._loaded.inc(metrics.num_host_tokens)
                    self._cached.inc(num_cached)
            else:
                itl_s = (now - last_s) / num_new
                self._itl.observe(itl_s)
                self.recent_itl_s.append(itl_s)
            self._last_token_s[name] = now
        if completion.finish_reason is None:
            return
        self._last_token_s.pop(name, None)
        self._ended[completion.finish_reason].inc()
        self._request_prompt_tokens.observe(len(output.prompt_token_ids))
        self._kv_computed.observe(len(output.prompt_token_ids) - metrics.num_cached_tokens)
        self._request_preemptions.observe(metrics.num_preemptions)
        if output.finished and not any(
            (output.request_id, one.index) in self._last_token_s for one in output.outputs
        ):
            self._most_tokens.observe(max(len(one.token_ids) for one in output.outputs))
        num_tokens = len(completion.token_ids)
        self._request_tokens.observe(num_tokens)
        queue_s, first_s, end_s = metrics.first_scheduled_s, metrics.first_token_s, metrics.finished_s
        if end_s is not None:
            self._e2e.observe(end_s)
            if queue_s is not None:
                self._queue.observe(queue_s)
                self._inference.observe(end_s - queue_s)
                if first_s is not None:
                    self._prefill.observe(first_s - queue_s)
                    self._decode.observe(end_s - first_s)
                    if num_tokens > 1:
                        self._tpot.observe((end_s - first_s) / (num_tokens - 1))

    def _new(self, kind: Any, name: str, text: str, labels: Any = None, **settings: Any) -> Any:
        labels = self._labels if labels is None else labels
        metric = kind(f"vllm:{name}", text, list(labels), registry=self.registry, **settings)
        return metric.labels(**{key: str(value) for key, value in labels.items()})

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._new(Gauge, name, text).set_function(value)

    def _histogram(self, name: str, text: str, buckets: Any) -> Any:
        return self._new(Histogram, name, text, buckets=buckets)


def _one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 and so on, up to a number."""
    buckets = [step * 10**power for power in range(len(str(most))) for step in (1, 2, 5)]
    return [bucket for bucket in buckets if bucket <= most]
