"""Law 2: what a request is answered never depends on how it was served, bit for bit.

Requests are drawn with everything that may surround them (arrivals, budgets, block sizes, threads, cache
hits, a cache so small that sequences are preempted), and each answer is compared with the same request alone
in an engine that computes it in one piece.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import EngineConfig, LLMEngine, RequestOutput, SamplingParams
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


@dataclass(frozen=True)
class Request:
    """A request that can be served twice."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    arrival: int  # the step before which it is added
    return_logits: bool


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


def serve(engine: LLMEngine, requests: list[Request]) -> list[RequestOutput]:
    """Serves all requests, each added before its arrival step."""
    outputs: dict[int, RequestOutput] = {}
    step = 0
    while len(outputs) < len(requests) or engine.has_unfinished:
        for index, request in enumerate(requests):
            if request.arrival == step:
                outputs[index] = engine.add_request(
                    str(index), request.token_ids, request.params, return_logits=request.return_logits
                )
        engine.step()
        engine.scheduler.check()
        step += 1
    return [outputs[index] for index in range(len(requests))]


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
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(1, 10)),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logprobs=draw(st.sampled_from([None, 2])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
        ignore_eos=True,
    )
    return Request(draw(_prefixes) + draw(_suffixes), params, draw(st.integers(0, 6)), draw(st.booleans()))


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    block_size = draw(st.sampled_from([1, 3, 4, 16, 20]))
    blocks_of_one = -(-MAX_LEN // block_size)
    return EngineConfig(
        block_size=block_size,
        num_blocks=blocks_of_one + draw(st.integers(0, 2 * blocks_of_one)),
        max_model_len=MAX_LEN,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.sampled_from([1, 2, 5, 13, 64])),
        enable_prefix_caching=draw(st.booleans()),
        num_threads=draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize(("model", "quantization"), SERVED)
@given(config=configs(), drawn=st.lists(requests(), min_size=1, max_size=6))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_an_answer_does_not_depend_on_how_it_was_served(
    model: str, quantization: str, config: EngineConfig, drawn: list[Request]
) -> None:
    engine = LLMEngine(str(model_path(model)), replace(config, quantization=quantization))
    together = serve(engine, drawn)
    engine.close()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    for request, output in zip(drawn, together, strict=True):
        [expected] = serve(alone(model, quantization), [Request(request.token_ids, request.params, 0, True)])
        assert output.token_ids == expected.token_ids
        assert output.outputs[0].logprobs == expected.outputs[0].logprobs
        assert output.prompt_logprobs == expected.prompt_logprobs
        if request.return_logits:
            assert bits(output.logits) == bits(expected.logits)


def test_preemption_and_cache_hits_really_happen_and_change_nothing() -> None:
    shared = tuple(range(20, 36))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    drawn = [Request((*shared, 40 + i), params, i, False) for i in range(4)]
    config = EngineConfig(block_size=4, num_blocks=12, max_model_len=MAX_LEN, max_num_batched_tokens=24)
    engine = LLMEngine(str(model_path("llama_gqa")), config)
    together = serve(engine, drawn)
    engine.close()
    assert sum(output.metrics.num_preemptions for output in together) > 0
    assert sum(output.metrics.num_cached_tokens for output in together) > 0
    for request, output in zip(drawn, together, strict=True):
        [expected] = serve(alone("llama_gqa", "none"), [replace(request, arrival=0)])
        assert output.outputs[0].logprobs == expected.outputs[0].logprobs
        assert output.token_ids == expected.token_ids
