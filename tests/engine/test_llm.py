"""The offline API and the engine under it, on a small random model with a tokenizer."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagellm.engine import (
    LLM,
    CheckpointError,
    ConfigError,
    EngineConfig,
    FinishReason,
    LLMEngine,
    PagellmError,
    RequestError,
    SamplingParams,
)
from tests.conftest import model_path

TINY = str(model_path("llama_tiny"))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(TINY, num_blocks=32, block_size=4, show_progress=False)
    yield llm
    llm.close()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    llm.engine.scheduler.check()
    assert not llm.engine.has_unfinished
    assert llm.engine.block_manager.num_free_blocks == llm.engine.block_manager.num_blocks


def test_a_batch_gives_one_output_a_prompt_in_order(llm: LLM) -> None:
    outputs = llm.generate(["ab", [1, 2, 3], "abc"], GREEDY)
    assert [output.prompt for output in outputs] == ["ab", None, "abc"]
    assert [output.prompt_token_ids for output in outputs][1] == [1, 2, 3]
    assert all(len(output.token_ids) == 8 for output in outputs)
    assert all(output.finish_reason is FinishReason.LENGTH for output in outputs)
    assert llm.generate("abc", GREEDY)[0].token_ids == outputs[2].token_ids


def test_the_text_is_what_the_tokens_decode_to(llm: LLM) -> None:
    [output] = llm.generate("ab", GREEDY)
    assert output.text == llm.tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_a_stream_yields_the_text_of_generate(llm: LLM) -> None:
    assert "".join(llm.stream("ab", GREEDY)) == llm.generate("ab", GREEDY)[0].text


def test_a_stream_left_early_gives_its_request_up(llm: LLM) -> None:
    stream = llm.stream("ab", GREEDY)
    next(stream)
    stream.close()


def test_a_stream_dropped_before_it_is_read_gives_its_request_up(llm: LLM) -> None:
    stream = llm.stream("ab", GREEDY)
    assert llm.engine.has_unfinished
    del stream
    assert not llm.engine.has_unfinished


def test_closing_one_stream_leaves_its_siblings_alone(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=12, ignore_eos=True)
    [[first, second]] = llm.stream_all(["ab"], params)
    next(first)
    first.close()
    assert "".join(second) == llm.generate("ab", params)[0].outputs[1].text


def test_logits_that_are_no_numbers_end_the_request_with_an_error() -> None:
    llm = LLM(TINY, num_blocks=32, show_progress=False)
    llm.engine.runner.weights.values[:] = np.nan
    [output] = llm.generate("ab", GREEDY)
    assert (output.finish_reason, output.token_ids) == (FinishReason.ERROR, [])
    with pytest.raises(PagellmError, match="finite"):
        list(llm.stream("cd", GREEDY))
    assert llm.engine.block_manager.num_free_blocks == 32
    llm.close()


def test_a_request_whose_every_token_is_forbidden_ends_with_an_error(llm: LLM) -> None:
    bias = dict.fromkeys(range(llm.engine.spec.vocab_size), float("-inf"))
    forbidden = SamplingParams(temperature=0, max_tokens=4, logit_bias=bias)
    bad, good = llm.generate(["ab", "ab"], [forbidden, GREEDY])
    assert bad.finish_reason is FinishReason.ERROR
    assert len(good.token_ids) == 8


def test_streams_that_run_together_give_what_each_gives_alone(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=7, max_tokens=6, ignore_eos=True)
    streams = llm.stream_all(["ab", "cd"], params)
    texts = [["".join(completion) for completion in request] for request in streams]
    alone = [llm.generate(prompt, params)[0] for prompt in ("ab", "cd")]
    assert texts == [[completion.text for completion in output.outputs] for output in alone]


def test_logits_have_a_row_for_each_token_and_predict_the_greedy_one(llm: LLM) -> None:
    logits = llm.logits([1, 2, 3, 4, 5])
    assert logits.shape == (5, llm.engine.spec.vocab_size)
    [output] = llm.generate([1, 2, 3, 4, 5], GREEDY)
    assert int(np.argmax(logits[-1])) == output.token_ids[0]


def test_prompt_logprobs_are_the_log_softmax_of_the_logits(llm: LLM) -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3, logprobs=0)
    [output] = llm.generate([prompt], params)
    logits = llm.logits(prompt).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for index, logprob in enumerate(output.prompt_logprobs[1:], 1):
        assert logprob is not None
        assert logprob.token_id == prompt[index]
        assert logprob.logprob == pytest.approx(expected[index - 1, prompt[index]], abs=1e-4)
        best = np.argsort(-expected[index - 1], kind="stable")[:3]
        assert [token for token, _ in logprob.top] == best.tolist()
    assert output.outputs[0].logprobs is not None
    assert output.outputs[0].logprobs[0].logprob == pytest.approx(expected[-1].max(), abs=1e-4)
    assert output.outputs[0].logprobs[0].top == ()


def test_a_completion_of_n_is_what_its_seed_gives_alone(llm: LLM) -> None:
    [together] = llm.generate("ab", SamplingParams(n=3, seed=10, max_tokens=8, ignore_eos=True))
    for index, completion in enumerate(together.outputs):
        [alone] = llm.generate("ab", SamplingParams(seed=10 + index, max_tokens=8, ignore_eos=True))
        assert completion.token_ids == alone.token_ids


def test_without_a_seed_two_requests_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=2.0, ignore_eos=True)
    first, second = llm.generate(["ab", "ab"], params)
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_the_text_before_it_even_across_tokens(llm: LLM, length: int) -> None:
    [free] = llm.generate("ab", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    stop = free.text[4 : 4 + length]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[stop])
    [output] = llm.generate("ab", params)
    assert output.text == free.text[: free.text.index(stop)]
    assert output.finish_reason is FinishReason.STOP
    assert output.outputs[0].stop_reason == stop
    assert "".join(llm.stream("ab", params)) == output.text


def test_a_stop_token_ends_the_output_and_is_part_of_it(llm: LLM) -> None:
    [free] = llm.generate("ab", GREEDY)
    token = free.token_ids[3]
    end = free.token_ids.index(token) + 1
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[token])
    [output] = llm.generate("ab", params)
    assert output.token_ids == free.token_ids[:end]
    assert output.finish_reason is FinishReason.STOP
    assert output.outputs[0].stop_reason == token


def test_min_tokens_keeps_stop_tokens_away(llm: LLM) -> None:
    [free] = llm.generate("ab", GREEDY)
    params = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=free.token_ids[:1], min_tokens=5)
    [output] = llm.generate("ab", params)
    assert len(output.token_ids) >= 5
    assert free.token_ids[0] not in output.token_ids[:5]


def test_the_models_own_end_token_ends_unless_it_is_ignored(llm: LLM) -> None:
    eos = llm.tokenizer.eos_token_ids[0]
    to_eos = SamplingParams(temperature=0, max_tokens=4, logit_bias={eos: 1e6})
    [ended] = llm.generate("ab", to_eos)
    assert (ended.token_ids, ended.finish_reason, ended.text) == ([eos], FinishReason.STOP, "")
    to_length = SamplingParams(temperature=0, max_tokens=4, logit_bias={eos: 1e6}, ignore_eos=True)
    [ignored] = llm.generate("ab", to_length)
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 4, FinishReason.LENGTH)


def test_extreme_filters_stay_within_the_vocabulary(llm: LLM) -> None:
    for temperature in (1e-30, 1e-6, 1e30):
        for top_p in (1e-300, 0.5, 1.0):
            params = SamplingParams(temperature=temperature, top_p=top_p, top_k=3, max_tokens=4, seed=1)
            [output] = llm.generate("ab", params)
            assert all(0 <= token < llm.engine.spec.vocab_size for token in output.token_ids)


def test_a_stop_token_that_the_model_lacks_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="stop_token_ids: found token id 999999"):
        llm.generate("ab", SamplingParams(stop_token_ids=[999999], min_tokens=1))


def test_numpy_token_ids_are_token_ids(llm: LLM) -> None:
    [output] = llm.generate(np.array([1, 2, 3]), GREEDY)  # type: ignore[arg-type]
    assert output.prompt_token_ids == [1, 2, 3]
    assert type(output.prompt_token_ids[0]) is int


def test_an_empty_conversation_is_refused(llm: LLM) -> None:
    for messages in ([], "hello", [1]):
        with pytest.raises(RequestError, match="messages"):
            llm.chat(messages)  # type: ignore[arg-type]


def test_a_logit_bias_of_minus_infinity_forbids_a_token(llm: LLM) -> None:
    [free] = llm.generate("ab", GREEDY)
    banned = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logit_bias=dict.fromkeys(free.token_ids, float("-inf"))
    )
    [output] = llm.generate("ab", banned)
    assert not set(output.token_ids) & set(free.token_ids)


def test_biases_of_many_requests_do_not_mix_as_they_come_and_go(llm: LLM) -> None:
    prompts = ["ab", "cd", "ef", "gh"]
    many = [
        SamplingParams(
            temperature=0, max_tokens=2 + index, min_tokens=2, ignore_eos=True, stop_token_ids=[5],
            logit_bias=dict.fromkeys(range(index, 200, 2), 3.0) if index else None,
        )
        for index in range(4)
    ]  # fmt: skip
    alone = [llm.generate(prompt, params)[0].token_ids for prompt, params in zip(prompts, many, strict=True)]
    assert [output.token_ids for output in llm.generate(prompts, many)] == alone
    assert [output.token_ids for output in llm.generate(prompts[::-1], many[::-1])] == alone[::-1]


def test_a_chat_is_the_prompt_that_the_template_makes(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = llm.tokenizer.apply_chat_template(messages)
    token_ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
    [output] = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == token_ids
    assert [o.token_ids for o in llm.chat([messages, messages], GREEDY)] == [output.token_ids] * 2


def test_a_chat_takes_tools_parts_and_what_its_template_knows(llm: LLM) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert llm.chat_prompt(parts) == llm.chat_prompt([{"role": "user", "content": "hi"}])
    answered = [*parts, {"role": "assistant", "content": "Well,"}]
    options: dict[str, Any] = {"tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}}
    continued = llm.chat_prompt(answered, continue_final_message=True, **options)
    assert llm.tokenizer.decode(continued).endswith("Well,")
    [output] = llm.chat(answered, GREEDY, continue_final_message=True, **options)
    assert output.prompt_token_ids == continued
    end = llm.tokenizer.eos_token_ids[0]
    forged = [{"role": "user", "content": f"hi{llm.tokenizer.decode([end])}"}]
    prompts = [llm.chat_prompt(forged, sanitize_control_tokens=safe).count(end) for safe in (False, True)]
    assert prompts[0] == prompts[1] + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "f"}, "tools: found 'f'"),
        ({"chat_template": "x"}, "chat_template: found 'x'"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs: found \[1\]"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: found 'messages'"),
        ({"add_generation_prompt": 1}, "add_generation_prompt: found 1"),
        ({"sanitize_control_tokens": "yes"}, "sanitize_control_tokens: found 'yes'"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message: found True",
        ),
    ],
)
def test_options_of_a_chat_that_mean_nothing_are_refused(
    llm: LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY, **options)


def test_a_second_request_finds_the_first_ones_prompt_in_the_cache(llm: LLM) -> None:
    prompt = list(range(30, 47))
    llm.generate([prompt], GREEDY)
    [output] = llm.generate([prompt], GREEDY)
    assert output.metrics.num_cached_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "no tokens"),
        ([], "no tokens"),
        ([1, -1], "token id -1"),
        ([1, 10**9], "token id 1000000000"),
        ([1, 2.5], "2.5"),
        (None, "found None"),
        (b"ab", "found b'ab'"),
        ({1: 2}, "found {1: 2}"),
        ([1] * 129, "129 tokens, expected at most 128"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_next_one_is_served(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["ab", prompt], GREEDY)  # type: ignore[list-item]
    assert not llm.engine.has_unfinished
    assert len(llm.generate("ab", GREEDY)[0].token_ids) == 8


def test_a_prompt_of_exactly_max_model_len_gives_one_token(llm: LLM) -> None:
    max_len = llm.engine.config.max_model_len
    assert max_len is not None
    [output] = llm.generate([[1] * max_len], GREEDY)
    assert (len(output.token_ids), output.finish_reason) == (1, FinishReason.LENGTH)
    assert llm.logits([1] * max_len).shape[0] == max_len


def test_prompts_in_vllms_forms_are_served(llm: LLM) -> None:
    expected = llm.generate(["ab", [1, 2, 3]], GREEDY)
    outputs = llm.generate([{"prompt": "ab"}, {"prompt_token_ids": np.array([1, 2, 3])}], GREEDY)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert llm.generate({"prompt": "ab"}, GREEDY)[0].token_ids == expected[0].token_ids
    assert "".join(llm.stream({"prompt": "ab"}, GREEDY)) == expected[0].text


def test_a_text_is_one_prompt_wherever_several_may_be_given(llm: LLM) -> None:
    [[stream]] = llm.stream_all("abc", GREEDY)
    assert "".join(stream) == llm.generate("abc", GREEDY)[0].text


@pytest.mark.parametrize("prompts", [{"ab"}, (text for text in ["ab"]), 7, None])
def test_prompts_of_another_kind_are_refused_everywhere(llm: LLM, prompts: Any) -> None:
    for serve in (llm.generate, llm.stream_all, llm.beam_search):
        with pytest.raises(RequestError, match="prompts: found"):
            serve(prompts)
    with pytest.raises(RequestError, match="prompt: found"):
        llm.stream(prompts)


@pytest.mark.parametrize("params", [{"temperature": 0}, [{"temperature": 0}], "greedy"])
def test_parameters_of_another_kind_are_refused_everywhere(llm: LLM, params: Any) -> None:
    for serve in (llm.generate, llm.stream, llm.stream_all):
        with pytest.raises(RequestError, match="sampling_params: found"):
            serve("ab", params)
    with pytest.raises(RequestError, match="sampling_params: found"):
        llm.engine.add_request("bad", "ab", params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arrival_time": "x"}, "arrival_time: found 'x'"),
        ({"arrival_time": float("nan")}, "arrival_time: found nan"),
        ({"arrival_time": True}, "arrival_time: found True"),
        ({"return_logits": 1}, "return_logits: found 1"),
        ({"fork_of": 1}, "fork_of: found 1"),
        ({"request_id": []}, r"request_id: found \[\]"),
        ({"request_id": "\ud800"}, r"request_id: .* is a lone surrogate"),
        (
            {"sampling_params": SamplingParams(logit_bias={10**9: 1.0})},
            "logit_bias: found token id 1000000000",
        ),
    ],
)
def test_whatever_else_a_request_carries_is_checked_at_the_door(
    llm: LLM, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.engine.add_request(**{"request_id": "bad", "prompt": "ab"} | arguments)


def test_a_request_does_not_follow_what_its_caller_changes_afterwards(llm: LLM) -> None:
    prompt, stop, stop_token_ids = [1, 2, 3], ["never"], [0]
    logit_bias = {5: -1.0}
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logit_bias=logit_bias, stop=stop,
        stop_token_ids=stop_token_ids,
    )  # fmt: skip
    [expected] = llm.generate([prompt], params)
    output = llm.engine.add_request("copied", prompt, params)
    llm.engine.step()
    prompt[:] = [9, 9, 9]
    output.prompt_token_ids.clear()
    stop.append(expected.text[-2:])
    stop_token_ids.append(expected.token_ids[2])
    logit_bias.update({10**9: 1.0, expected.token_ids[3]: -np.inf})
    while llm.engine.has_unfinished:
        llm.engine.step()
    assert output.token_ids == expected.token_ids


def test_an_output_says_what_it_was_served_with(llm: LLM) -> None:
    [output] = llm.generate("ab", SamplingParams(temperature=0.5, max_tokens=4))
    assert output.sampling_params.temperature == 0.5
    [again] = llm.generate("ab", output.sampling_params)  # with the seed that was drawn
    assert again.token_ids == output.token_ids
    assert llm.generate("ab")[0].sampling_params.max_tokens == SamplingParams().max_tokens


@pytest.mark.parametrize("wanted", ["prompt_logprobs", "logits"])
def test_a_fork_whose_prompts_logits_are_wanted_computes_them(llm: LLM, wanted: str) -> None:
    prompt, engine = list(range(1, 10)), llm.engine
    params = SamplingParams(
        temperature=0,
        max_tokens=3,
        ignore_eos=True,
        prompt_logprobs=2 if wanted == "prompt_logprobs" else None,
    )
    alone = engine.add_request("alone", prompt, params, return_logits=wanted == "logits")
    while engine.has_unfinished:
        engine.step()
    engine.add_request("parent", prompt, GREEDY)
    engine.step()
    fork = engine.add_request("fork", prompt, params, return_logits=wanted == "logits", fork_of="parent")
    while engine.has_unfinished:
        engine.step()
    assert fork.token_ids == alone.token_ids
    assert fork.prompt_logprobs == alone.prompt_logprobs
    if wanted == "logits":
        assert fork.logits is not None
        assert alone.logits is not None
        assert np.array_equal(fork.logits, alone.logits)
        assert fork.logits.any(axis=1).all()


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_a_stop_string_that_is_a_special_token_stops(llm: LLM, skip_special_tokens: bool) -> None:
    eos = llm.tokenizer.eos_token_ids[0]
    stop = llm.tokenizer.decode([eos])
    params = SamplingParams(
        temperature=0, max_tokens=4, logit_bias={eos: 1e6}, ignore_eos=True, stop=[stop],
        skip_special_tokens=skip_special_tokens,
    )  # fmt: skip
    [output] = llm.generate("ab", params)
    assert (output.token_ids, output.text, output.finish_reason) == ([eos], "", FinishReason.STOP)
    assert output.outputs[0].stop_reason == stop
    [included] = llm.generate("ab", replace(params, include_stop_str_in_output=True))
    assert included.text == stop


def test_a_request_id_in_use_is_refused(llm: LLM) -> None:
    llm.engine.add_request("same", "ab", GREEDY)
    with pytest.raises(RequestError, match="same"):
        llm.engine.add_request("same", "ab", GREEDY)
    llm.engine.abort("same")


def test_abort_in_every_state_frees_everything(llm: LLM) -> None:
    engine = llm.engine
    long_prompt = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for steps in range(7):  # waiting, prefill, decodes, finished
        output = engine.add_request("one", list(range(1, 9)), long_prompt)
        for _ in range(steps):
            engine.step()
        engine.abort("one")
        assert output.finished
        assert output.finish_reason is (FinishReason.LENGTH if steps >= 4 else FinishReason.ABORT)
        assert len(output.token_ids) == min(steps, 4)
    assert engine.abort("unknown") is None


def test_an_interrupted_step_leaves_the_engine_able_to_serve(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate("ab", GREEDY)[0].token_ids
    run = llm.engine.runner.run

    def interrupted(*arguments: object) -> object:
        monkeypatch.setattr(llm.engine.runner, "run", run)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["ab", "cd"], GREEDY)
    assert not llm.engine.has_unfinished
    assert llm.generate("ab", GREEDY)[0].token_ids == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size: found 0"),
        ({"num_blocks": -1}, "num_blocks: found -1"),
        ({"max_num_seqs": 1.5}, "max_num_seqs: found 1.5"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens: found True"),
        ({"max_model_len": 257}, "max_model_len: found 257, expected at most 256"),
        ({"max_model_len": 64, "num_blocks": 2, "block_size": 16}, "expected at most 32"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching: found 1"),
        ({"num_threads": 0}, "num_threads: found 0"),
        ({"num_threads": 10**6}, "num_threads: found 1000000, expected at most 1024"),
        ({"num_blocks": 10**12}, "num_blocks: found 1000000000000"),
        ({"block_size": 10**12}, "block_size 1000000000000"),
    ],
)
def test_a_bad_setting_is_one_clear_error(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(TINY, show_progress=False, **settings)


def test_a_setting_may_be_a_number_of_another_library() -> None:
    config = EngineConfig(block_size=np.int64(4), num_swap_blocks=np.uint8(3), watermark=np.float32(0.5))
    assert config == EngineConfig(block_size=4, num_swap_blocks=3, watermark=0.5)
    assert list(map(type, (config.block_size, config.num_swap_blocks, config.watermark))) == [int, int, float]
    with pytest.raises(ConfigError, match="num_blocks: found an int too long to print"):
        EngineConfig(num_blocks=-(10**5000))
    for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "num_swap_blocks"):
        with pytest.raises(ConfigError, match=f"{name}: found .*, expected an integer of at most 64 bits"):
            EngineConfig(**{name: 10**5000})


def test_an_eviction_policy_that_needs_the_future_is_refused_before_anything_is_loaded() -> None:
    belady = f"{Path(__file__).parents[2] / 'examples' / 'policies' / 'belady.py'}:Belady"
    with pytest.raises(
        ConfigError, match="which needs to know the requests to come, expected it in the replay"
    ):
        LLM("there-is-no-such-model", eviction=belady)


def test_a_small_cache_limits_the_context() -> None:
    llm = LLM(TINY, num_blocks=2, block_size=4, show_progress=False)
    assert llm.engine.config.max_model_len == 8
    with pytest.raises(RequestError, match="expected at most 8"):
        llm.generate([[1] * 9])
    [output] = llm.generate([[1] * 5], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (3, FinishReason.LENGTH)
    llm.close()


def test_a_checkpoint_without_a_tokenizer_serves_token_ids() -> None:
    engine = LLMEngine(str(model_path("llama_mha")))
    output = engine.add_request("ids", [1, 2, 3], GREEDY)
    while engine.has_unfinished:
        engine.step()
    assert (len(output.token_ids), output.text) == (8, "")
    with pytest.raises(RequestError, match="without a tokenizer"):
        engine.add_request("text", "ab", GREEDY)
    with pytest.raises(RequestError, match=r"stop: found \('a',\), expected none: .* without a tokenizer"):
        engine.add_request("stop", [1, 2, 3], replace(GREEDY, stop=("a",)))
    engine.close()


def test_names_of_tokens_say_nothing_where_there_is_no_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "m"
    shutil.copytree(model_path("llama_tiny"), directory)
    (directory / "tokenizer.json").unlink()
    (directory / "tiktoken.model").write_bytes(b"\n\x0e")
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 100000]}')
    llm = LLM(str(directory), show_progress=True)
    said = capsys.readouterr().err
    assert "m: this model came without a tokenizer that is read: tiktoken.model alone" in said
    assert "prompts are token ids" in said
    assert llm.tokenizer.eos_token_ids[0] == 7
    assert 100000 not in llm.tokenizer.eos_token_ids
    assert len(llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids) > 0
    llm.close()


def test_a_model_may_be_a_path_object(tmp_path: Path) -> None:
    LLM(Path(TINY), num_blocks=8, show_progress=False).close()
    with pytest.raises(CheckpointError, match="no such model"):
        LLM(tmp_path / "absent", show_progress=False)


def test_an_error_in_a_gguf_file_s_tokenizer_names_the_file(tmp_path: Path) -> None:
    content = model_path("gguf_llama_f32").read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(content.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"))
    with pytest.raises(
        CheckpointError, match=r"m\.gguf: tokenizer\.ggml\.pre: found None, expected a string"
    ):
        LLM(str(path))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.beam_search("ab", GREEDY), "params: found SamplingParams.*, expected a BeamSearch"),
        (lambda llm: llm.beam_search("ab", {"beam_width": 2}), "params: found {'beam_width': 2}, expected a"),
        (lambda llm: llm.beam_search(["ab", [-1]]), "^request 1: prompt: found token id -1 at 0"),
        (lambda llm: llm.generate(["ab", "cd", ""], GREEDY), "^request 2: prompt: found no tokens"),
        (lambda llm: llm.generate([""], GREEDY), "^prompt: found no tokens"),
        (lambda llm: llm.stream_all(["ab", [-1]], GREEDY), "^request 1: prompt: found token id -1 at 0"),
        (
            lambda llm: llm.stream(["ab", "cd"], GREEDY),
            "prompt: found 2 in a list, .*; stream_all takes several",
        ),
        (lambda llm: llm.stream("ab", SamplingParams(n=3)), "n: found 3, expected 1; stream_all gives"),
    ],
)
def test_a_refusal_names_what_is_wrong_and_where(
    llm: LLM, call: Callable[[LLM], object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        call(llm)


def test_logits_of_an_aborted_request_are_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm.engine.step

    def aborting() -> object:
        for request_id in list(llm.engine._requests):
            llm.engine.abort(request_id)
        return step()

    monkeypatch.setattr(llm.engine, "step", aborting)
    with pytest.raises(PagellmError, match="logits: the request was aborted"):
        llm.logits([1, 2, 3])
