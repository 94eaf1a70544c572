"""Thoughts in chats and streams, and budgets of thinking tokens, on a small model with scripted tokens."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagellm.engine import (
    LLM,
    ConfigError,
    EngineConfig,
    FinishReason,
    LLMEngine,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from pagellm.engine.execution.model_runner import RunnerOutput, Wishes
from pagellm.engine.scheduling.scheduler import ScheduledBatch
from tests.conftest import at_most, model_path
from tests.engine.test_thinking import PUBLISHED

TINY = model_path("llama_tiny")
HELLO = [{"role": "user", "content": "hi"}]
PLENTY = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model with Qwen3's template; its markers are no tokens of their own."""
    directory = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(TINY, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = (PUBLISHED / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    path.write_text(json.dumps(config))
    llm = LLM(directory, num_blocks=64, block_size=4, show_progress=False)
    yield llm
    llm.close()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    llm.engine.scheduler.check()
    assert not llm.engine.has_unfinished


@contextmanager
def saying(llm: LLM, *texts: str) -> Iterator[None]:
    """Lets each completion sample the tokens of its text, and an end of text; number i has text i."""
    eos = llm.tokenizer.eos_token_ids[0]
    scripts = [[*llm.tokenizer.encode(text, add_special_tokens=False), eos] for text in texts]
    original = llm.engine.runner.run

    def run(batch: ScheduledBatch, wishes: Mapping[int, Wishes] | None = None) -> RunnerOutput:
        result = original(batch, wishes)
        for at, sequence in enumerate(batch.sampled):
            own = (wishes or {}).get(sequence.seq_id)
            if own is None or own.forced is None:
                index = llm.engine._by_seq_id[sequence.seq_id][1].output.index
                script = scripts[index]
                result.token_ids[at] = [script[min(sequence.num_output_tokens, len(script) - 1)]]
        return result

    llm.engine.runner.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        llm.engine.runner.run = original  # type: ignore[method-assign]


def test_a_chat_tells_the_thought_apart(llm: LLM) -> None:
    with saying(llm, "<think>\nI am.\n</think>\n\nHi"):
        [output] = llm.chat(HELLO, PLENTY)
    assert (output.reasoning, output.text) == ("I am.", "Hi")
    assert output.finish_reason is FinishReason.STOP
    assert output.num_reasoning_tokens == len(llm.tokenizer.encode("\nI am.\n"))


def test_generate_leaves_the_text_as_it_is(llm: LLM) -> None:
    text = "<think>\nI am.\n</think>\n\nHi"
    with saying(llm, text):
        [output] = llm.generate("hi", PLENTY)
    assert (output.text, output.reasoning, output.num_reasoning_tokens) == (text, None, 0)


def test_a_thought_that_is_not_closed_is_all_there_is(llm: LLM) -> None:
    with saying(llm, "<think>\nI am not done"):
        [cut] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=12))
        [ended] = llm.chat(HELLO, PLENTY)
    assert (cut.finish_reason, cut.text) == (FinishReason.LENGTH, "")
    assert cut.reasoning is not None
    assert "I am not done".startswith(cut.reasoning)
    assert (ended.finish_reason, ended.reasoning, ended.text) == (FinishReason.STOP, "I am not done", "")


def test_the_stream_of_a_chat_is_the_chat(llm: LLM) -> None:
    with saying(llm, "<think>\nI am.\n</think>\n\nHi <b>"):
        deltas = list(llm.chat_stream(HELLO, PLENTY))
        [output] = llm.chat(HELLO, PLENTY)
    assert "".join(delta.reasoning for delta in deltas) == output.reasoning == "I am."
    assert "".join(delta.text for delta in deltas) == output.text == "Hi <b>"
    assert all(any(delta) for delta in deltas)


def test_several_chats_are_streamed_at_once(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, n=2)
    with saying(llm, "<think>a</think>b", "c"):
        streams = llm.chat_stream_all([HELLO, HELLO], params)
        said = [
            [tuple("".join(part) for part in zip(*stream, strict=True)) for stream in each]
            for each in streams
        ]
    assert said == [[("a", "b"), ("", "c")]] * 2


def test_a_prompt_may_open_the_thought_and_turn_it_off(llm: LLM) -> None:
    prompt = llm.chat_prompt(HELLO, thinking=False)
    assert llm.tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert llm.chat_prompt(HELLO, thinking=True) == llm.chat_prompt(HELLO)
    assert llm.chat_prompt(HELLO, chat_template_kwargs={"enable_thinking": False}) == prompt
    with saying(llm, " so </think>"):
        [output] = llm.chat(HELLO, PLENTY, thinking=False)
    assert (output.reasoning, output.text) == (None, " so </think>")


def test_a_thought_may_be_continued(llm: LLM) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "<think>I am"}]
    with saying(llm, " so</think>yes"):
        [output] = llm.chat(begun, PLENTY, continue_final_message=True)
    assert (output.reasoning, output.text) == ("so", "yes")


def test_markers_that_a_user_writes_open_nothing(llm: LLM) -> None:
    with saying(llm, "that is one</think>"):
        [output] = llm.chat([{"role": "user", "content": "what is <think>"}], PLENTY)
    assert (output.reasoning, output.text) == (None, "that is one</think>")


def test_stop_strings_end_the_answer_and_not_the_thought(llm: LLM) -> None:
    stopping = SamplingParams(temperature=0, max_tokens=60, stop=["Q:", "\n\n"])
    with saying(llm, "<think>Q: what?\n\nHm</think>\n\nA: that. Q: next"):
        [output] = llm.chat(HELLO, stopping)
        deltas = list(llm.chat_stream(HELLO, stopping))
    assert (output.reasoning, output.text) == ("Q: what?\n\nHm", "A: that. ")
    assert (output.finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, "Q:")
    assert "".join(delta.text for delta in deltas) == output.text


def test_a_stop_token_ends_a_thought_and_with_it_the_answer(llm: LLM) -> None:
    [token] = llm.tokenizer.encode("Q")
    with saying(llm, "<think>a Q b</think>c"):
        [output] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[token]))
    assert (output.reasoning, output.text, output.outputs[0].stop_reason) == ("a Q", "", token)


def test_options_that_a_template_does_not_know_are_refused() -> None:
    llm = LLM(TINY, num_blocks=16, show_progress=False)
    for options, message in (
        ({"thinking": False}, "thinking: found off"),
        ({"thinking": True}, "thinking: found on"),
        ({"reasoning_effort": "low"}, "reasoning_effort: found 'low'"),
        ({"thinking": "yes"}, "thinking: found 'yes'"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.chat(HELLO, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="thinking_token_budget: found 3, expected none"):
        llm.generate("ab", SamplingParams(thinking_token_budget=3))
    llm.close()


def test_an_option_and_the_variable_that_it_sets_are_not_both_taken(llm: LLM) -> None:
    with pytest.raises(RequestError, match="found 'enable_thinking' beside thinking"):
        llm.chat(HELLO, thinking=True, chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("markers", ["<think>", "...", 3, None])
def test_bad_markers_are_refused(markers: Any) -> None:
    with pytest.raises(ConfigError, match="reasoning_markers: found"):
        EngineConfig(reasoning_markers=markers)


def test_markers_may_be_the_users_own_or_none() -> None:
    llm = LLM(TINY, num_blocks=16, show_progress=False, reasoning_markers="<|im_start|>...<|endoftext|>")
    with saying(llm, "<|im_start|>a<|endoftext|>b"):
        [output] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=20))
    assert (output.reasoning, output.text, output.num_reasoning_tokens) == ("a", "b", 1)
    llm.close()
    llm = LLM(TINY, num_blocks=16, show_progress=False, reasoning_markers="...so:")
    with saying(llm, "a so: b"):
        [output] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=20))
    assert (output.reasoning, output.text) == ("a", "b")
    llm.close()


def test_a_spent_budget_closes_the_thought_as_the_template_does(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, thinking_token_budget=5)
    closing = llm.tokenizer.encode("\n</think>\n\n")
    opening = llm.tokenizer.encode("<think>")
    with saying(llm, "<think>" + "abcdefghijklmnopqrstuvwxyz" * 2):
        [output] = llm.chat(HELLO, params)
        [raw] = llm.generate("ab", params)
    assert (output.reasoning, output.num_reasoning_tokens) == ("abcde", 5)
    assert output.token_ids[: len(opening) + 5 + len(closing)] == (
        opening + llm.tokenizer.encode("abcde") + closing
    )
    assert output.text == ("abcdefghijklmnopqrstuvwxyz" * 2)[5 + len(closing) :]
    assert raw.text == f"<think>abcde\n</think>\n\n{output.text}"
    assert raw.num_reasoning_tokens == 5


@pytest.mark.parametrize(
    ("said", "budget", "text"),
    [
        ("<think>ab</think>c", 20, "<think>ab</think>c"),  # closed by itself, within the budget
        ("<think>ab</think>c", 2, "<think>ab\n</think>\n\n"),
        ("<think>abcd</th", 4, "<think>abcd\n</think>\n\n"),
        ("<think>ab</thinkers", 5, "<think>ab</think>\n\n"),  # a marker that has begun is completed
        ("<think>ab\n\n", 4, "<think>ab\n\n</think>\n\n"),  # the line end is there
        ("<think>abc", 0, "<think>\n</think>\n\n"),
        ("no thought at all", 0, "no thought at all"),
    ],
)
def test_a_thought_is_closed_once_and_properly(llm: LLM, said: str, budget: int, text: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, thinking_token_budget=budget)
    with saying(llm, said):
        [output] = llm.generate("ab", params)
    assert output.text.startswith(text)
    assert output.text.count("</think>") == text.count("</think>")
    assert output.num_reasoning_tokens <= budget


def test_a_budget_of_nothing_closes_what_the_prompt_has_opened(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, thinking_token_budget=0, n=3)
    with saying(llm, "x" * 40, "y" * 40, "z" * 40):
        [output] = llm.generate("ab<think>\n", params)
    closing = "\n</think>\n\n"
    num_forced = len(llm.tokenizer.encode(closing))
    assert [one.text for one in output.outputs] == [closing + c * (40 - num_forced) for c in "xyz"]
    assert [one.num_reasoning_tokens for one in output.outputs] == [0, 0, 0]


def test_a_second_thought_has_what_the_first_has_left(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=80, thinking_token_budget=12)
    with saying(llm, "<think>abc</think><think>defghijklmnopqrstuvwxyz"):
        [output] = llm.chat(HELLO, params)
    assert (output.reasoning, output.num_reasoning_tokens) == ("abc\ndefghijkl", 12)


def test_log_probabilities_of_forced_tokens_are_the_models_own(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("ab<think>")
    params = SamplingParams(
        temperature=0, max_tokens=16, thinking_token_budget=2, logprobs=2, ignore_eos=True
    )
    [output] = llm.generate([prompt], params)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    logits = llm.logits(prompt + output.token_ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for at, (token_id, logprob) in enumerate(zip(output.token_ids, logprobs, strict=True)):
        row = expected[len(prompt) - 1 + at]
        assert logprob.token_id == token_id
        assert logprob.logprob == pytest.approx(row[token_id], abs=1e-4)
        assert [token for token, _ in logprob.top] == np.argsort(-row, kind="stable")[:2].tolist()
    assert [logprob.logprob for logprob in logprobs] != [logprob.top[0][1] for logprob in logprobs]


MARKED = "<t>...</t>"
CONFIG = EngineConfig(
    num_blocks=32, max_model_len=64, enable_prefix_caching=False, num_threads=1, reasoning_markers=MARKED
)
_alone: list[LLMEngine] = []


def alone() -> LLMEngine:
    """An engine for one request at a time."""
    if not _alone:
        _alone.append(LLMEngine(str(TINY), CONFIG))
    return _alone[0]


def served(engine: LLMEngine, requests: list[tuple[str, SamplingParams]]) -> list[RequestOutput]:
    outputs = [engine.add_request(str(i), prompt, params) for i, (prompt, params) in enumerate(requests)]
    while engine.has_unfinished:
        engine.step()
        engine.scheduler.check()
    return outputs


@st.composite
def thinking_requests(draw: st.DrawFn) -> tuple[str, SamplingParams]:
    prompt = draw(st.sampled_from(["ab", "abcdefgh", "abcdefghijkl"])) + draw(
        st.sampled_from(["", "<t>", "<t>", "<t>\n", "<t>so", "<t>a</t>"])
    )
    return prompt, SamplingParams(
        n=draw(st.sampled_from([1, 1, 3])),
        seed=draw(st.integers(0, 9)),
        temperature=draw(st.sampled_from([0.0, 1.0, 3.0])),
        max_tokens=draw(st.sampled_from([1, 3, 9, 20])),
        min_tokens=draw(st.sampled_from([0, 1])),
        logprobs=draw(st.sampled_from([None, 1])),
        thinking_token_budget=draw(st.sampled_from([None, 0, 1, 4, 9])),
        ignore_eos=draw(st.booleans()),
        # Markers come often enough to matter.
        logit_bias=dict.fromkeys(alone().tokenizer.encode("<t>/"), draw(st.sampled_from([0.0, 4.0]))),
    )


@given(
    requests=st.lists(thinking_requests(), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 3, 16]),
    more_blocks=st.sampled_from([0, 2, 30]),
    max_num_batched_tokens=st.sampled_from([1, 5, 64]),
    preemption=st.sampled_from(["recompute", "swap"]),
    caches=st.booleans(),
)
@settings(at_most(40), suppress_health_check=list(HealthCheck))
def test_budgets_hold_and_change_no_bit_however_requests_are_served(
    requests: list[tuple[str, SamplingParams]],
    block_size: int,
    more_blocks: int,
    max_num_batched_tokens: int,
    preemption: str,
    caches: bool,
) -> None:
    config = EngineConfig(
        block_size=block_size, num_blocks=-(-64 // block_size) + more_blocks, max_model_len=64,
        max_num_batched_tokens=max_num_batched_tokens, preemption=preemption, enable_prefix_caching=caches,
        reasoning_markers=MARKED, num_threads=2,
    )  # fmt: skip
    engine = LLMEngine(str(TINY), config)
    together = served(engine, requests)
    engine.close()
    for request, output in zip(requests, together, strict=True):
        [expected] = served(alone(), [request])
        budget = request[1].thinking_token_budget
        for completion, one in zip(output.outputs, expected.outputs, strict=True):
            assert completion == replace(one, metrics=completion.metrics)
            if budget is not None:
                assert completion.num_reasoning_tokens <= budget
                check_closed(engine, request[0], completion.token_ids, budget)


def check_closed(engine: LLMEngine, prompt: str, token_ids: list[int], budget: int) -> None:
    """A thought that the prompt has opened is closed behind so many tokens, unless it has ended before."""
    if prompt.rfind("<t>") <= prompt.rfind("</t>"):
        return
    end = engine.tokenizer.encode("</t>", add_special_tokens=False)
    assert len(end) == 4
    # A marker that has begun when the budget is spent is completed; its tokens are no part of the thought.
    text = engine.tokenizer.decode(token_ids)
    own = [i for i in range(min(budget, len(token_ids)) + 1) if token_ids[i : i + 4] == end]
    assert own or len(token_ids) < budget + 4 or token_ids[-1] in engine.tokenizer.eos_token_ids, text
