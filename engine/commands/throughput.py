"""What `pagellm bench` measures: prefill and decode speed of the whole engine, not of its kernels alone."""

import random
import time
from dataclasses import dataclass
from statistics import median

from pagellm.engine.errors import RequestError
from pagellm.engine.llm_engine import LLMEngine
from pagellm.engine.requests.sampling_params import SamplingParams


@dataclass(frozen=True)
class Throughput:
    """Medians over the repetitions."""

    batch: int
    prefill_tokens: int  # of each sequence
    decode_tokens: int
    prefill_tokens_per_s: float  # all sequences together
    decode_tokens_per_s: float
    ttft_s: float  # until the last sequence has its first token
    decode_step_s: float


def measure(engine: LLMEngine, batch: int, prefill: int, decode: int, repeat: int) -> Throughput:
    """Prefills `batch` random prompts of `prefill` tokens, then decodes `decode` tokens of each.

    Raises `RequestError` if so many tokens do not fit the engine's settings.
    """
    if batch > engine.config.max_num_seqs:
        raise RequestError(
            f"batch: found {batch}, expected at most max_num_seqs, {engine.config.max_num_seqs}"
        )
    if prefill + decode > engine.config.max_model_len:
        raise RequestError(
            f"prefill + decode: found {prefill} + {decode} tokens, expected at most max_model_len, "
            f"{engine.config.max_model_len}"
        )
    rng = random.Random(0)
    prefill_times, step_times = [], []
    _run(engine, rng, batch, prefill=1, decode=1)  # touches memory that the first step would pay for
    for _ in range(repeat):
        prefill_times.append(sum(_run(engine, rng, batch, prefill, decode=0)[0]))
        step_times.append(median(_run(engine, rng, batch, prefill, decode)[1]))
    return Throughput(
        batch=batch,
        prefill_tokens=prefill,
        decode_tokens=decode,
        prefill_tokens_per_s=batch * prefill / median(prefill_times),
        decode_tokens_per_s=batch / median(step_times),
        ttft_s=median(prefill_times),
        decode_step_s=median(step_times),
    )


def _run(
    engine: LLMEngine, rng: random.Random, batch: int, prefill: int, decode: int
) -> tuple[list[float], list[float]]:
    """The seconds of each prefill step, and of `decode` steps that do nothing but decode the whole batch."""
    params = SamplingParams(temperature=0, max_tokens=None if decode else 1, ignore_eos=True)
    prefilling: list[float] = []
    decoding: list[float] = []
    request_ids = [f"bench-{index}" for index in range(batch)]
    try:
        for request_id in request_ids:
            prompt = [rng.randrange(engine.spec.vocab_size) for _ in range(prefill)]
            engine.add_request(request_id, prompt, params)
        while engine.has_unfinished and len(decoding) < max(decode, 1):
            running = engine.scheduler.running
            decodes = len(running) == batch and all(
                s.num_tokens - s.num_computed_tokens == 1 for s in running
            )
            start = time.perf_counter()
            engine.step()
            (decoding if decodes else prefilling).append(time.perf_counter() - start)
    finally:
        for request_id in request_ids:
            engine.abort(request_id)
    if len(decoding) < decode:
        raise RequestError(
            f"decode: found {decode} tokens after prompts of {prefill}, expected so few that {batch} "
            f"sequences fit {engine.config.max_model_len} tokens of context and "
            f"{engine.config.num_blocks} KV blocks"
        )
    return prefilling, decoding
