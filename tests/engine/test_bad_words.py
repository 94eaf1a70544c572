"""Bad words: an output never has all tokens of one, whoever else is being served."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pagellm.engine import LLM, FinishReason, RequestError, SamplingParams
from pagellm.engine.requests.bad_words import BadWords
from tests.conftest import model_path

PROMPT = "ab"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model_path("llama_tiny"), num_blocks=40, block_size=4, show_progress=False) as llm:
        yield llm


def greedy(**others: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True, **others})


def tokens_of(llm: LLM, word: str) -> list[list[int]]:
    """A word as it stands alone and behind a space, as vLLM encodes it."""
    return [
        llm.tokenizer.encode(text, add_special_tokens=False) for text in (word.lstrip(), f" {word.lstrip()}")
    ]


def naive(llm: LLM, words: list[str], num_tokens: int = 16) -> list[int]:
    """The greedy output by vLLM's rule, from the logits of all tokens so far, again and again."""
    banned = [ids for word in words for ids in tokens_of(llm, word)]
    prompt, output = llm.tokenizer.encode(PROMPT), list[int]()
    while len(output) < num_tokens:
        logits = llm.logits(prompt + output)[-1].copy()
        for *before, last in banned:
            if len(before) <= len(output) and output[len(output) - len(before) :] == before:
                logits[last] = -np.inf
        output.append(int(logits.argmax()))
    return output


def words_in(llm: LLM, token_ids: list[int], size: int) -> list[str]:
    """Texts of so many tokens that an output has, and that have these tokens by themselves, too."""
    pieces = [token_ids[at : at + size] for at in range(len(token_ids) - size + 1)]
    texts = {tuple(piece): llm.tokenizer.decode(piece) for piece in pieces}
    return [text for piece, text in texts.items() if text and tokens_of(llm, text)[0] == list(piece)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_last_token_of_a_bad_word_does_not_follow_the_others(llm: LLM, size: int) -> None:
    [free] = llm.generate(PROMPT, greedy())
    words = words_in(llm, free.token_ids, size)
    assert words, "the output has words of this size"
    for some in (words[:1], words):
        [output] = llm.generate(PROMPT, greedy(bad_words=some))
        assert output.token_ids == naive(llm, some) != free.token_ids
        assert not any(word in output.text for word in some)


def test_what_the_prompt_ends_with_does_not_count(llm: LLM) -> None:
    [free] = llm.generate(PROMPT, greedy())
    prompt_end = llm.tokenizer.encode(PROMPT)[-1]
    word = llm.tokenizer.decode([prompt_end, free.token_ids[0]])
    [output] = llm.generate(PROMPT, greedy(bad_words=[word], max_tokens=1))
    assert output.token_ids == free.token_ids[:1]


def test_a_word_counts_with_a_space_before_it_and_whitespace_alone_as_it_is(llm: LLM) -> None:
    ids = tokens_of(llm, "hello")
    bad_words = BadWords(llm.tokenizer, ["  hello", "\n"])
    assert bad_words.last_ids == {
        own[-1] for own in [*ids, *(llm.tokenizer.encode(t) for t in ("\n", " \n"))]
    }
    for own in ids:
        assert own[-1] in bad_words.forbidden([7, *own[:-1]])
    [newline] = llm.tokenizer.encode("\n")
    assert newline in bad_words.forbidden([])


def test_a_crowd_with_bad_words_gets_what_each_gets_alone(llm: LLM) -> None:
    """More than there are blocks for; with neighbours that have a form, biases, several completions."""
    [free] = llm.generate(PROMPT, greedy())
    words = words_in(llm, free.token_ids, 2) + words_in(llm, free.token_ids, 1)[:2]
    many = [
        greedy(
            bad_words=words[:number],
            max_tokens=12 + number,
            temperature=number % 3,
            seed=number,
            n=1 + number % 2,
        )
        for number in range(12)
    ]
    pytest.importorskip("llguidance")
    many[3] = replace(many[3], structured={"regex": "[a-z]{9}x"}, bad_words=["x", "q"])
    many[4] = replace(many[4], structured={"regex": "[a-z]{9}"})
    many[5] = replace(many[5], logit_bias={1: 2.0})
    alone = [[one.token_ids for one in llm.generate(PROMPT, params)[0].outputs] for params in many]
    outputs = llm.generate([PROMPT] * len(many), many)
    assert [[one.token_ids for one in output.outputs] for output in outputs] == alone


def test_a_form_gets_no_bad_word_even_where_nothing_else_may_come(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    form = {"choice": ["y", "n"]}
    [output] = llm.generate(PROMPT, greedy(structured=form, bad_words=["y", "n"]))
    assert output.finish_reason is FinishReason.ERROR
    assert "every token was forbidden" in (output.outputs[0].error or "")
    for word, text in [("y", "n"), ("n", "y")]:
        [output] = llm.generate(PROMPT, greedy(structured=form, bad_words=[word]))
        assert output.text == text
    [output] = llm.generate(PROMPT, greedy(structured={"regex": "aaaa[bc]"}, bad_words=["b"]))
    assert output.text == "aaaac"


def test_log_probabilities_stay_the_models_own(llm: LLM) -> None:
    [free] = llm.generate(PROMPT, greedy(logprobs=1, max_tokens=1))
    [word] = words_in(llm, free.token_ids, 1)
    [output] = llm.generate(PROMPT, greedy(logprobs=1, max_tokens=1, bad_words=[word]))
    [own], [others] = output.outputs[0].logprobs or (), free.outputs[0].logprobs or ()
    assert own.top == others.top
    assert own.token_id != others.token_id
    assert own.logprob < others.logprob


def test_a_word_without_tokens_is_refused_by_its_name(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **_: [] if "x" in text else [1])
    with pytest.raises(RequestError, match="bad_words: found 'x', expected a text that has tokens"):
        BadWords(llm.tokenizer, ["y", "x"])
