"""The default model with its real weights, end to end."""

import json

import pytest

from engine import LLM, SamplingParams
from engine.cli import main

pytestmark = pytest.mark.weights

GREEDY = SamplingParams(temperature=0, max_tokens=16)
PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time"]


def test_the_capital_of_france_is_paris(smollm: LLM) -> None:
    [output] = smollm.generate("The capital of France is", GREEDY)
    assert output.prompt_token_ids == [504, 3575, 282, 4649, 314]
    assert output.text.startswith(" Paris")


def test_the_instruct_model_answers_in_a_chat(smollm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = smollm.chat(messages, SamplingParams(temperature=0, max_tokens=32))
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


def test_the_command_line_generates(smollm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "The capital of France is", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["text"].startswith(" Paris")
