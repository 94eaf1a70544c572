"""The default model with its real weights, end to end."""

import json

import pytest

from pagellm.__main__ import main
from pagellm.engine import LLM, SamplingParams

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
