"""The known models with their real weights, end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pagellm.__main__ import main
from pagellm.engine import LLM, SamplingParams
from pagellm.engine.checkpoints.known_models import KNOWN_MODELS
from tests.conftest import real_weights

pytestmark = pytest.mark.weights

GREEDY = SamplingParams(temperature=0, max_tokens=16)
PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time"]


def test_the_capital_of_france_is_paris(smollm: LLM) -> None:
    [output] = smollm.generate("The capital of France is", GREEDY)
    assert output.prompt_token_ids == [504, 3575, 282, 4649, 314]
    assert output.text.startswith(" Paris")


def test_the_instruct_model_answers_in_a_chat(smollm: LLM) -> None:
    del smollm  # asked for so that missing weights are reported in one place
    llm = LLM(quantization="none", num_blocks=80, show_progress=False)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32))
    llm.close()
    assert "Paris" in output.text
    assert output.finish_reason == "stop"


def test_text_survives_the_tokenizer(smollm: LLM) -> None:
    text = "Ångström ☃ 日本語 👩‍👩‍👧‍👦\r\n\t x = 3.14159  # naïve"
    assert smollm.tokenizer.decode(smollm.tokenizer.encode(text)) == text


def test_a_batch_says_what_each_prompt_says_alone(smollm: LLM) -> None:
    together = smollm.generate(PROMPTS, GREEDY)
    alone = [smollm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]


def test_a_long_prompt_is_right_across_chunks_tiles_and_the_cache(smollm: LLM) -> None:
    tokens = [(7 * i * i + 13 * i) % 40000 + 100 for i in range(1100)]
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True)
    [first] = smollm.generate([tokens], params)
    [again] = smollm.generate([tokens], params)
    assert again.metrics.num_cached_tokens == 1088
    assert again.outputs[0].logprobs == first.outputs[0].logprobs


@pytest.mark.parametrize("quantization", ["none", "bf16", "int8", "int4"])
def test_a_decode_over_a_long_context_has_the_bits_of_a_prefill(quantization: str, smollm: LLM) -> None:
    """The keys of a decode are split among the threads; those of a prefill are not."""
    del smollm  # asked for so that missing weights are reported in one place
    tokens = [(7 * i * i + 13 * i) % 40000 + 100 for i in range(1100)]
    llm = LLM(quantization=quantization, num_blocks=80, enable_prefix_caching=False, show_progress=False)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    [decoded] = llm.generate([tokens], params)
    whole = [*tokens, *decoded.token_ids]
    [prefilled] = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=1))
    llm.close()
    assert prefilled.prompt_logprobs is not None
    assert prefilled.prompt_logprobs[len(tokens) :] == decoded.outputs[0].logprobs


def test_the_command_line_generates(smollm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "The capital of France is", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["text"].startswith(" Paris")


# Gemma 3 270M: K-quants, SentencePiece, sliding windows of 512, four norms, one KV head

GEMMA = Path(__file__).parent / "fixtures" / "gemma"
Scores = NDArray[np.float64]


@pytest.fixture(scope="module")
def expected() -> Any:
    """What transformers and llama.cpp make of the same file: see the script beside it."""
    return np.load(GEMMA / "expected.npz")


def test_gemma_s_terms_lie_beside_its_file(gemma: LLM) -> None:
    del gemma
    known = KNOWN_MODELS["gemma-3-270m"]
    assert known.terms is not None
    assert b"Gemma Terms of Use" in known.path.with_name(known.terms.file_name).read_bytes()


def test_gemma_goes_on_as_in_llama_cpp(gemma: LLM) -> None:
    """Its greedy tokens where none came close to the likeliest: English, code, Cyrillic, Chinese, emoji."""
    continuations = json.loads((GEMMA / "expected.json").read_text(encoding="utf-8"))
    prompts = [one["prompt"] for one in continuations]
    num_tokens = len(continuations[0]["token_ids"])
    outputs = gemma.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    for output, one in zip(outputs, continuations, strict=True):
        assert output.prompt_token_ids == one["prompt_token_ids"]
        assert output.token_ids == one["token_ids"], one["prompt"]


def test_gemma_in_float32_is_what_transformers_computes(gemma: LLM, expected: Any) -> None:
    del gemma  # asked for so that missing weights are reported in one place
    llm = real_weights("gemma-3-270m", quantization="none", max_model_len=256, num_blocks=16)
    ours = scores(llm, expected)
    llm.close()
    reference = expected["transformers"].astype(np.float64)
    assert divergence(reference, ours).max() < 1e-6
    likely = reference > -10
    np.testing.assert_allclose(ours[likely], reference[likely], atol=2e-3)


def test_gemma_is_as_close_to_exact_arithmetic_as_llama_cpp(gemma: LLM, expected: Any) -> None:
    exact = expected["transformers"].astype(np.float64)
    theirs = expected["llama_cpp"].astype(np.float64)
    ours = scores(gemma, expected)
    spread = divergence(exact, theirs).mean()
    assert divergence(exact, ours).mean() <= spread
    assert divergence(theirs, ours).mean() <= 2 * spread


def test_gemma_in_a_batch_says_what_each_prompt_says_alone(gemma: LLM) -> None:
    """Over the edge of its window, too."""
    long = [2, *((7 * i * i + 13 * i) % 200_000 + 1000 for i in range(700))]
    prompts: list[Any] = [*PROMPTS, long]
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    together = gemma.generate(prompts, params)
    alone = [gemma.generate([prompt], params)[0] for prompt in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert [o.outputs[0].logprobs for o in together] == [o.outputs[0].logprobs for o in alone]


def scores(llm: LLM, expected: Any) -> Scores:
    """Log-probabilities after each token of the text: of the fixture's tokens, and of all others together."""
    logits = llm.logits(expected["ids"].tolist()).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    all_scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = np.take_along_axis(all_scores, expected["tokens"], axis=1)
    rest = np.log(np.maximum(1 - np.exp(chosen).sum(axis=1, keepdims=True), 1e-12))
    return np.concatenate([chosen, rest], axis=1)


def divergence(p: Scores, q: Scores) -> Scores:
    """Kullback-Leibler divergence of each token's distribution, in nats."""
    return (np.exp(p) * (p - q)).sum(axis=1)
