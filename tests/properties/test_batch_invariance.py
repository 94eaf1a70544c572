"""Law 2: what a request is answered never depends on how it was served, bit for bit.

Requests are drawn with everything that may surround them (arrivals, budgets, block sizes, threads, policies,
cache hits and resets, forks, aborts, a cache so small that sequences are preempted, swapped or computed
again), and each answer is compared with the same request alone in an engine that computes it in one piece.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pagellm.engine import (
    CompletionOutput,
    EngineConfig,
    FinishReason,
    LLMEngine,
    RequestOutput,
    SamplingParams,
)
from pagellm.engine.scheduling.policies import POLICIES
from tests.conftest import model_path

MAX_LEN = 48
# Each model in float32, and all formats on one or the other.
SERVED = (
    ("llama_gqa", "none"),
    ("gpt2_odd_heads", "none"),
    ("llama_mqa", "none"),
    ("llama_gqa", "bf16"),
    ("gpt2_odd_heads", "bf16"),
    ("llama_gqa", "int8"),
    ("gpt2_odd_heads", "int8"),
    ("llama_mqa", "int4"),
    ("gguf_llama_q4_0", "auto"),
    ("gguf_llama_q4_1", "auto"),
)
# Models with the features that Llama and GPT-2 have not, each with some of them.
FEATURES = (
    ("qwen3", "none"),  # norms of query and key heads
    ("olmo2", "none"),  # norms of whole queries and keys, and only after both halves
    ("gemma2", "none"),  # windows, softcaps, norms on both sides, the embedding scaled
    ("gemma2", "int8"),
    ("gemma3_text", "none"),  # windows and two RoPE tables
    ("mistral_window", "none"),  # a window in every layer, behind which blocks are free
    ("phi4_mini", "none"),  # LongRoPE in a part of each head, fused projections
    ("smollm3", "none"),  # layers without RoPE
    ("ministral3", "none"),  # queries scaled by position
    ("granite", "none"),  # residuals and logits scaled
    ("gpt_neox", "none"),  # parallel halves with a norm each, RoPE in a part of each head
    ("falcon_7b", "none"),  # and with one for both; one KV head
    ("cohere2", "none"),  # LayerNorm without a bias, windows
    ("cohere2", "bf16"),
    ("opt", "none"),  # learned positions that begin at row 2
    ("minicpm3", "none"),  # latent attention, queries compressed
    ("minicpm3_plain", "bf16"),  # and not, in a cache of bfloat16
    ("deepseek_v2_lite", "int8"),  # and experts, in many layers
    ("deepseek_v3", "none"),  # and experts chosen by groups
    ("bitnet", "none"),  # norms before the last products, ReLU squared
    ("bitnet", "int4"),
    ("qwen3_moe", "none"),  # experts that a softmax of all chooses
    ("qwen3_moe", "int4"),
    ("granitemoeshared", "bf16"),  # a softmax of the chosen, and a feed-forward beside the experts
    ("qwen2_moe", "int8"),  # which is gated
    ("ernie4_5_moe", "none"),  # experts chosen with a bias, in some layers
    ("gemma4_text", "none"),  # experts beside a feed-forward, layers that differ in their heads
    ("gemma4_text", "int8"),
    ("gpt_oss_mxfp4", "auto"),  # attention sinks, experts in MXFP4 with biases
)
# Models that quantizers wrote: each format of their levels, with inputs in an order of their own or not.
QUANTIZED = ("gptq_order", "gptq_zeros_order", "awq_32", "w8a8", "fp8_block", "llm_int8", "nf4", "fp4")


@dataclass(frozen=True, eq=False)
class Request:
    """A request that can be served twice."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    arrival: int  # the step before which it is added
    return_logits: bool
    abort: int | None = None  # the step before which it is given up
    forked_at: int | None = None  # the step before which another one goes on from what it has got so far


@cache
def alone(model: str, quantization: str) -> LLMEngine:
    """An engine that runs one request at a time, whole prompts, one thread, no cache."""
    config = EngineConfig(
        block_size=16,
        num_blocks=3,
        max_model_len=MAX_LEN,
        enable_prefix_caching=False,
        num_threads=1,
        quantization=quantization,
    )
    return LLMEngine(str(model_path(model)), config)


def serve(
    engine: LLMEngine, requests: list[Request], cache_resets: frozenset[int] = frozenset()
) -> dict[Request, RequestOutput]:
    """Serves all requests, and those that go on from them; each output under the request that it answers."""
    outputs: dict[Request, RequestOutput] = {}
    last_arrival = max(request.arrival for request in requests)
    step = 0
    while step <= last_arrival or engine.has_unfinished:
        if step in cache_resets:
            engine.reset_prefix_cache()
        for request in requests:
            if request.arrival == step:
                outputs[request] = engine.add_request(
                    str(len(outputs)), request.token_ids, request.params, return_logits=request.return_logits
                )
        for request, output in list(outputs.items()):
            if request.forked_at == step and not output.finished and output.token_ids:
                fork = go_on_from(request, output)
                if fork is not None:
                    outputs[fork] = engine.add_request(
                        str(len(outputs)), fork.token_ids, fork.params, fork_of=output.request_id
                    )
            if request.abort == step:
                engine.abort(output.request_id)
        engine.step()
        engine.scheduler.check()
        step += 1
    return outputs


def go_on_from(request: Request, output: RequestOutput) -> Request | None:
    """A request that takes another token in the place of the last ones, if it fits."""
    kept = output.token_ids[: -1 - output.token_ids[-1] % 4]
    token_ids = (*request.token_ids, *kept, 1 + output.token_ids[-1] % 3)
    params = replace(request.params, n=1, max_tokens=5, prompt_logprobs=None)
    return Request(token_ids, params, 0, False) if len(token_ids) <= MAX_LEN - 5 else None


def bits(logits: NDArray[np.float32] | None) -> bytes:
    """Equal exactly when all bits are."""
    return b"" if logits is None else logits.tobytes()


# A small alphabet and shared beginnings, so that prefixes are found in the cache.
_prefixes = st.sampled_from(
    [(), (5, 6, 7, 8, 9, 10, 11, 12), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)]
)
_suffixes = st.lists(st.integers(1, 3), min_size=1, max_size=20).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    params = SamplingParams(
        n=draw(st.sampled_from([1, 1, 2, 3])),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.sampled_from([1, 2, 5, 10, 20])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logprobs=draw(st.sampled_from([None, 2])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
        ignore_eos=True,
        cache_salt=draw(st.sampled_from(["", "", "ours"])),
        priority=draw(st.integers(0, 2)),
        tenant=draw(st.sampled_from(["", "theirs"])),
        deadline_s=draw(st.sampled_from([None, 0.0, 1.0])),
    )
    steps = st.none() | st.integers(0, 12)
    return Request(
        draw(_prefixes) + draw(_suffixes),
        params,
        draw(st.integers(0, 4)),
        draw(st.booleans()),
        abort=draw(steps),
        forked_at=draw(steps),
    )


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    block_size = draw(st.sampled_from([1, 3, 4, 16, 20]))
    blocks_of_one = -(-MAX_LEN // block_size)
    preemption = draw(st.sampled_from(["recompute", "swap", "swap", "auto"]))
    caches, offloads = draw(st.sampled_from([(True, False), (True, True), (True, True), (False, False)]))
    return EngineConfig(
        block_size=block_size,
        num_blocks=blocks_of_one + draw(st.sampled_from([0, 0, 1, 3, blocks_of_one])),
        max_model_len=MAX_LEN,
        max_num_seqs=draw(st.sampled_from([1, 3, 6, 9])),
        max_num_batched_tokens=draw(st.sampled_from([1, 5, 13, 64, 64])),
        max_prefill_chunk=draw(st.sampled_from([None, 3])),
        enable_prefix_caching=caches,
        enable_hierarchical_cache=offloads,
        policy=draw(st.sampled_from(list(POLICIES))),
        preemption=preemption,
        num_swap_blocks=(
            None
            if preemption == "recompute" and not offloads
            else draw(st.sampled_from([1, 2, blocks_of_one, 2 * blocks_of_one]))
        ),
        max_preemptions=draw(st.sampled_from([1, 3])),
        num_threads=draw(st.integers(1, 3)),
    )


def serving(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Draws so many ways to serve requests, each a `config`, `drawn`, `cache_resets` and `in_a_file`."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        drawn = given(
            config=configs(),
            drawn=st.lists(requests(), min_size=1, max_size=6),
            cache_resets=st.frozensets(st.integers(0, 12), max_size=2),
            in_a_file=st.booleans(),
        )
        return settings(max_examples=examples, suppress_health_check=list(HealthCheck))(drawn(test))

    return decorate


@pytest.mark.parametrize(("model", "quantization"), SERVED)
@serving(examples=200)
def test_an_answer_does_not_depend_on_how_it_was_served(model: str, quantization: str, **drawn: Any) -> None:
    check_serving(model, quantization, **drawn)


@pytest.mark.parametrize(("model", "quantization"), FEATURES)
@serving(examples=30)
def test_nor_does_it_with_any_feature_of_a_layer(model: str, quantization: str, **drawn: Any) -> None:
    check_serving(model, quantization, **drawn)


@pytest.mark.parametrize("model", QUANTIZED)
@serving(examples=30)
def test_nor_does_it_with_any_format_of_a_quantizer(model: str, **drawn: Any) -> None:
    check_serving(model, "auto", **drawn)


def check_serving(
    model: str,
    quantization: str,
    config: EngineConfig,
    drawn: list[Request],
    cache_resets: frozenset[int],
    in_a_file: bool,
) -> None:
    """Each answer is that of the same request alone."""
    with tempfile.TemporaryDirectory() as directory:
        swap_dir = directory if in_a_file and config.num_swap_blocks else None
        config = replace(config, quantization=quantization, swap_dir=swap_dir)
        engine = LLMEngine(str(model_path(model)), config)
        together = serve(engine, drawn, cache_resets)
        engine.close()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert engine.block_manager.num_free_swap_blocks == engine.config.num_swap_blocks
    for request, output in together.items():
        for completion in output.outputs:
            check_against_alone(model, quantization, request, output, completion)


def check_against_alone(
    model: str, quantization: str, request: Request, output: RequestOutput, completion: CompletionOutput
) -> None:
    """One that was given up has the beginning of what it says alone."""
    params = request.params.of_completion(completion.index)
    [expected] = serve(alone(model, quantization), [Request(request.token_ids, params, 0, True)]).values()
    finished = completion.finish_reason is not FinishReason.ABORT
    length = len(expected.token_ids) if finished else len(completion.token_ids)
    assert completion.token_ids == expected.token_ids[:length]
    if params.logprobs is not None:
        assert completion.logprobs == (expected.outputs[0].logprobs or [])[:length]
    if finished:
        assert output.prompt_logprobs == expected.prompt_logprobs
        if request.return_logits and all(other.finish_reason == "length" for other in output.outputs):
            assert bits(output.logits) == bits(expected.logits)


def test_preemption_and_cache_hits_really_happen_and_change_nothing() -> None:
    shared = tuple(range(20, 36))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    drawn = [Request((*shared, 40 + i), params, i, False) for i in range(4)]
    config = EngineConfig(block_size=4, num_blocks=12, max_model_len=MAX_LEN, max_num_batched_tokens=24)
    engine = LLMEngine(str(model_path("llama_gqa")), config)
    together = serve(engine, drawn)
    engine.close()
    assert sum(output.metrics.num_preemptions for output in together.values()) > 0
    assert sum(output.metrics.num_cached_tokens for output in together.values()) > 0
    for request, output in together.items():
        check_against_alone("llama_gqa", "none", request, output, output.outputs[0])


@pytest.mark.parametrize("in_a_file", [False, True])
def test_sequences_are_really_swapped_out_and_in_and_go_on_where_they_were(
    tmp_path: Path, in_a_file: bool
) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
    drawn = [Request((40 + i,) * 10, params, 0, False) for i in range(4)]
    config = EngineConfig(
        block_size=4,
        num_blocks=20,
        max_model_len=MAX_LEN,
        preemption="swap",
        swap_dir=str(tmp_path) if in_a_file else None,
        enable_prefix_caching=False,
        step_log=str(tmp_path / "steps.jsonl"),
    )
    engine = LLMEngine(str(model_path("llama_gqa")), config)
    together = serve(engine, drawn)
    engine.close()
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    moved = [sum(step["transfers"].get(kind, 0) for step in steps) for kind in ("swap_out", "swap_in")]
    assert moved[0] == moved[1] > 0
    computed = sum(count for step in steps for _, _, count, _ in step["scheduled"])
    assert computed == 4 * (10 + 30 - 1), "no token was computed twice"
    for request, output in together.items():
        check_against_alone("llama_gqa", "none", request, output, output.outputs[0])
