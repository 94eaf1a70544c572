"""Structured output: what has a form has it, whoever else is being served, and costs others nothing."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagellm.engine import (
    LLM,
    BeamSearchParams,
    EngineConfig,
    FinishReason,
    LLMEngine,
    RequestError,
    RequestOutput,
    SamplingParams,
    StructuredOutputs,
)
from pagellm.engine.grammar.compiler import GrammarCompiler
from pagellm.engine.grammar.masks import MaskWorker
from pagellm.engine.grammar.state import GrammarState
from pagellm.engine.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import model_path
from tests.engine.test_sentencepiece import EXPECTED as SENTENCEPIECE
from tests.engine.test_sentencepiece import gguf, of_json
from tests.engine.test_tokenizer import gpt2

pytest.importorskip("llguidance")

TINY = str(model_path("llama_tiny"))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TAGGED = {
    "structures": [
        {"begin": "<n>", "schema": {"type": "integer", "maximum": 9, "minimum": 0}, "end": "</n>"}
    ],
    "triggers": ["<n>"],
}


def is_compact(text: str) -> bool:
    return text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "kind"]
        and len(person["name"]) <= 6
        and person["age"] in range(100)
        and person["kind"] in ("cat", "dog")
    )


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: regex.fullmatch(pattern, text) is not None


CHOICES = ["yes", "no", 'say "maybe"\n']
FORMS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json": ({"json": PERSON}, is_person),
    "json as text": ({"json": json.dumps(PERSON)}, is_person),
    "json without whitespace": (
        {"json": PERSON, "disable_any_whitespace": True},
        lambda text: is_person(text) and is_compact(text),
    ),
    "regex": ({"regex": r"[a-f]{2,9}(-[0-9]+)?!"}, matches(r"[a-f]{2,9}(-[0-9]+)?!")),
    "choice": ({"choice": CHOICES}, lambda text: text in CHOICES),
    "lark": ({"grammar": 'start: "<" word+ ">"\nword: /[a-c]{1,3}/ " "'}, matches(r"<([a-c]{1,3} )+>")),
    "gbnf": ({"grammar": 'root ::= "<" ([a-c] " ")+ ">"'}, matches(r"<([a-c] )+>")),
    "json object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "structural tag": (
        {"structural_tag": TAGGED},
        lambda text: all(map(matches("(?s)[0-9]</n>.*"), text.split("<n>")[1:])),
    ),
    "formats": (
        {"structural_tag": {"type": "structural_tag", "format": {"type": "sequence", "elements": [
            {"type": "const_string", "value": "a:"},
            {"type": "tag", "begin": "[", "content": {"type": "regex", "pattern": "[xyz]{1,3}"}, "end": "]"},
            {"type": "or", "elements": [{"type": "json_schema", "json_schema": {"type": "boolean"}},
                                        {"type": "const_string", "value": "none"}]},
        ]}}},
        matches(r"a:\[[xyz]{1,3}\](true|false|none)"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(TINY, num_blocks=200, block_size=4, show_progress=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def small() -> Iterator[LLMEngine]:
    """So little memory that sequences make way, in every way there is."""
    engine = LLMEngine(
        TINY,
        EngineConfig(
            num_blocks=40, block_size=3, max_model_len=100, max_num_batched_tokens=16, preemption="swap",
            num_swap_blocks=30, policy="shortest_job",
        ),
    )  # fmt: skip
    yield engine
    engine.close()


def params(form: Any, **others: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": 120, **others}, structured=form)


@pytest.mark.parametrize("name", FORMS)
def test_an_output_that_ends_by_itself_has_its_form(llm: LLM, name: str) -> None:
    form, has_it = FORMS[name]
    outputs = llm.generate(["ab", "ab"], [params(form, n=12), params(form, temperature=0)])
    ended = 0
    for completion in [one for output in outputs for one in output.outputs]:
        if completion.finish_reason == "stop":
            ended += 1
            assert has_it(completion.text), completion.text
        else:
            assert completion.finish_reason == "length"
    assert ended, "some end within 120 tokens"


def tokenizers() -> list[Any]:
    """One of each family: bytes, SentencePiece with and without byte tokens, Unigram."""
    names = [f"gguf {name}" for name in SENTENCEPIECE["gguf"]]
    names += [f"json {name}" for name in SENTENCEPIECE["tokenizers"]]
    return ["gpt2", "llama_tiny", *names]


def tokenizer_called(name: str, directory: Any) -> Tokenizer:
    kind, _, rest = name.partition(" ")
    if kind == "gguf":
        return gguf(rest)
    if kind == "json":
        return of_json(directory, rest)
    return gpt2() if name == "gpt2" else load_tokenizer(model_path(name))


@pytest.mark.parametrize("name", tokenizers())
def test_a_mask_allows_exactly_the_tokens_that_a_form_may_go_on_with(name: str, tmp_path: Any) -> None:
    tokenizer = tokenizer_called(name, tmp_path)
    if not tokenizer.eos_token_ids:
        tokenizer = copy(tokenizer)
        tokenizer.eos_token_ids = (min(tokenizer.special_ids),)
    pattern, as_bytes = r"[a-zé ]{1,6}(,[0-9a ]+)*", rb"(?:[a-z ]|\xc3\xa9){1,6}(?:,[0-9a ]+)*"
    compiler = GrammarCompiler(tokenizer, tokenizer.model_vocab_size + 3, 1)
    state = GrammarState(compiler.compile(StructuredOutputs(regex=pattern)))
    rng = np.random.default_rng(0)
    said = b""
    for _ in range(8):
        mask = state.mask()
        allowed = {t for t in range(tokenizer.model_vocab_size + 3) if mask[t // 32] >> (t % 32) & 1}
        expected = set()
        for token in range(tokenizer.model_vocab_size):
            data = tokenizer.token_bytes(token)
            if token in tokenizer.special_ids or not data or token in tokenizer.eos_token_ids:
                continue
            if regex.fullmatch(as_bytes, said + data, partial=True):
                expected.add(token)
        if regex.fullmatch(as_bytes, said):
            expected |= set(tokenizer.eos_token_ids)
        assert allowed == expected, said
        chosen = int(rng.choice(sorted(allowed - set(tokenizer.eos_token_ids))))
        said += tokenizer.token_bytes(chosen)
        state.append(chosen)
    compiler.close()


@pytest.mark.parametrize("name", tokenizers())
def test_a_text_within_another_is_the_bytes_of_its_tokens(name: str, tmp_path: Any) -> None:
    tokenizer = tokenizer_called(name, tmp_path)
    for text in ('{"name": "Zoë"', " a  b\n", "x", "12, 345"):
        ids = tokenizer.encode_within(text)
        joined = b"".join(map(tokenizer.token_bytes, ids))
        assert tokenizer.decode(ids, continues=True) == joined.decode("utf-8", "replace")


SERVED = [{"json": PERSON}, {"regex": "[a-f]{3,30}"}, {"choice": ["yes", "no"]}, {"json_object": True}, None]


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[[list[int], SamplingParams], list[Any]]]:
    engine = LLMEngine(
        TINY,
        EngineConfig(
            num_blocks=9, block_size=16, max_model_len=100, enable_prefix_caching=False, num_threads=1
        ),
    )

    def serve(prompt: list[int], params: SamplingParams) -> list[Any]:
        output = engine.add_request("0", prompt, params)
        while engine.has_unfinished:
            engine.step()
        return [output.token_ids, output.text, output.finish_reason, output.outputs[0].logprobs]

    yield serve
    engine.close()


@given(
    drawn=st.lists(
        st.tuples(
            st.sampled_from([(5, 6, 7, 8, 9, 10), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14), (40,)]),
            st.lists(st.integers(1, 3), min_size=1, max_size=9),
            st.sampled_from(SERVED),
            st.sampled_from([0.0, 1.0]),
            st.integers(0, 3),
            st.sampled_from([1, 1, 3]),
            st.sampled_from([None, None, 1]),
            st.integers(0, 6),
        ),
        min_size=1,
        max_size=7,
    ),
    failures=st.frozensets(st.integers(0, 20), max_size=2),
)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_an_answer_with_a_form_does_not_depend_on_how_it_was_served(
    small: LLMEngine, alone: Any, drawn: list[Any], failures: frozenset[int]
) -> None:
    """Preempted, swapped, forked, in chunks, with cached prefixes, after steps that failed."""
    outputs: list[tuple[list[int], SamplingParams, RequestOutput]] = []
    step = 0
    run = small.runner.run
    while step < 8 or small.has_unfinished:
        for number, (prefix, suffix, form, temperature, seed, n, logprobs, arrival) in enumerate(drawn):
            if arrival == step:
                own = SamplingParams(
                    structured=form, temperature=temperature, seed=seed, n=n, logprobs=logprobs, max_tokens=40
                )
                prompt = [*prefix, *suffix]
                outputs.append((prompt, own, small.add_request(f"{number}", prompt, own)))
        if step in failures and small.has_unfinished:

            def broken(*arguments: Any) -> Any:
                run(*arguments)
                raise MemoryError

            small.runner.run = broken  # type: ignore[method-assign]
            with pytest.raises(MemoryError):
                small.step()
            small.runner.run = run  # type: ignore[method-assign]
        else:
            small.step()
        small.scheduler.check()
        step += 1
    for prompt, own, output in outputs:
        for completion in output.outputs:
            got = [completion.token_ids, completion.text, completion.finish_reason, completion.logprobs]
            assert got == alone(prompt, own.of_completion(completion.index))


def test_tokens_that_are_forced_are_taken_at_once_and_one_by_one_they_are_the_same(llm: LLM) -> None:
    form = {"json": PERSON, "disable_any_whitespace": True}
    steps = []

    def count_steps(**others: Any) -> RequestOutput:
        before = len(steps)
        llm.engine.runner.run, run = lambda *a: (steps.append(1), run(*a))[1], llm.engine.runner.run  # type: ignore[method-assign]
        [output] = llm.generate("ab", params(form, temperature=0, **others))
        llm.engine.runner.run = run  # type: ignore[method-assign]
        steps[before:] = [len(steps) - before]
        return output

    at_once, singly = count_steps(), count_steps(logprobs=1)
    assert at_once.token_ids == singly.token_ids
    assert steps[1] == len(singly.token_ids)
    assert steps[0] < steps[1] / 2


def test_the_log_probability_of_a_forced_token_is_the_models_own(llm: LLM) -> None:
    prompt = [5, 6, 7]
    [output] = llm.generate([prompt], params({"regex": "hello [0-9]{2} world"}, logprobs=2))
    assert output.outputs[0].logprobs is not None
    whole = [*prompt, *output.token_ids]
    [scored] = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert scored.prompt_logprobs is not None
    assert output.outputs[0].logprobs == scored.prompt_logprobs[len(prompt) :]


def test_neighbours_without_a_form_keep_their_bits(llm: LLM) -> None:
    free = SamplingParams(temperature=0.9, seed=3, max_tokens=20, logprobs=3)
    [expected] = llm.generate("ab", free)
    first, *_, last = llm.generate(["ab", "ab", "ab"], [free, params({"json": PERSON}), free])
    for output in (first, last):
        assert (output.token_ids, output.outputs[0].logprobs) == (
            expected.token_ids,
            expected.outputs[0].logprobs,
        )


def test_completions_of_one_prompt_are_those_of_it_alone(llm: LLM) -> None:
    own = params({"json": PERSON}, n=5, temperature=1.0)
    [output] = llm.generate("ab", own)
    for completion in output.outputs:
        [single] = llm.generate("ab", own.of_completion(completion.index))
        assert (completion.token_ids, completion.text) == (single.token_ids, single.text)
    assert len({completion.text for completion in output.outputs}) > 1


def test_a_stream_is_the_whole_answer(llm: LLM) -> None:
    own = params({"json": PERSON}, temperature=1.0)
    [output] = llm.generate("ab", own)
    assert "".join(llm.stream("ab", own)) == output.text


def test_whitespace_is_bounded_unless_it_is_asked_for_otherwise(llm: LLM) -> None:
    [space] = llm.tokenizer.encode(" ")
    likes_spaces = params({"json": PERSON}, logit_bias={space: 1e4}, temperature=0, max_tokens=220)
    [output] = llm.generate("ab", likes_spaces)
    assert output.finish_reason == "stop"
    assert max(map(len, regex.findall(r"[ \n]+", output.text.split('"name"')[0]))) == 8
    [other] = llm.generate(
        "ab", replace(likes_spaces, structured={"json": PERSON, "whitespace_pattern": " {0,3}"})
    )
    assert other.text.startswith('{   "name"')


# How other parameters meet a form.


def test_the_end_of_text_comes_where_the_form_is_complete_and_nowhere_else(llm: LLM) -> None:
    eos = llm.tokenizer.eos_token_ids[0]
    likes_to_end = {"logit_bias": {eos: 1e4}, "temperature": 0}
    [output] = llm.generate("ab", params({"regex": "[a-c]{3,9}"}, **likes_to_end))
    assert (len(output.text), output.finish_reason, output.outputs[0].stop_reason) == (3, "stop", eos)
    assert output.token_ids[-1] == eos
    hates_to_end = {"logit_bias": {eos: -1e4}, "temperature": 0}
    [output] = llm.generate("ab", params({"regex": "[a-c]{3,9}"}, **hates_to_end))
    assert (len(output.text), output.finish_reason, output.outputs[0].stop_reason) == (9, "stop", None)
    assert eos not in output.token_ids


def test_min_tokens_keeps_the_end_away_as_long_as_more_may_follow(llm: LLM) -> None:
    eos = llm.tokenizer.eos_token_ids[0]
    own = params({"regex": "[a-c]{3,9}"}, logit_bias={eos: 1e4}, temperature=0, min_tokens=6)
    [output] = llm.generate("ab", own)
    assert (len(output.token_ids), output.token_ids[-1]) == (7, eos)
    [output] = llm.generate("ab", replace(own, min_tokens=50))
    assert (len(output.text), output.finish_reason) == (9, "stop")


def test_ignore_eos_goes_on_as_long_as_more_may_follow(llm: LLM) -> None:
    eos = llm.tokenizer.eos_token_ids[0]
    own = params({"regex": "[a-c]{3,9}"}, logit_bias={eos: 1e4}, temperature=0, ignore_eos=True)
    [output] = llm.generate("ab", own)
    assert (len(output.text), output.finish_reason, eos in output.token_ids) == (9, "stop", False)


def test_a_stop_string_a_stop_token_and_max_tokens_end_it_anywhere(llm: LLM) -> None:
    form = {"json": PERSON, "disable_any_whitespace": True}
    [output] = llm.generate("ab", params(form, stop=['"na']))
    assert (output.text, output.finish_reason, output.outputs[0].stop_reason) == ("{", "stop", '"na')
    [token] = llm.tokenizer.encode(":")
    [output] = llm.generate("ab", params(form, stop_token_ids=[token]))
    assert (output.text, output.outputs[0].stop_reason) == ('{"name":', token)
    [output] = llm.generate("ab", params(form, max_tokens=3))
    assert (output.finish_reason, len(output.token_ids)) == ("length", 3)
    llm.engine.scheduler.check()


def test_what_a_request_forbids_it_does_not_get_even_where_nothing_else_may_come(llm: LLM) -> None:
    [n] = llm.tokenizer.encode("n")
    form = {"json": PERSON, "disable_any_whitespace": True}
    for own in (params(form, logit_bias={n: -math.inf}), params(form, logit_bias={n: -math.inf}, logprobs=0)):
        [output] = llm.generate("ab", own)
        assert output.finish_reason is FinishReason.ERROR
        assert "every token was forbidden" in (output.outputs[0].error or "")
    [a, b, c] = (llm.tokenizer.encode(letter)[0] for letter in "abc")
    allowed = {t: -math.inf for t in range(llm.engine.spec.vocab_size) if t not in (a, c)}
    [output] = llm.generate("ab", params({"regex": "[abx]{4}c"}, logit_bias=allowed))
    assert (output.text, b) == ("aaaac", b)


def test_penalties_count_what_was_forced(llm: LLM) -> None:
    [x] = llm.tokenizer.encode("x")
    own = params({"regex": "xxxx[x-z]"}, temperature=0, logit_bias={x: 5.0})
    [output] = llm.generate("ab", own)
    assert output.text == "xxxxx"
    [output] = llm.generate("ab", replace(own, frequency_penalty=2.0))
    assert output.text != "xxxxx"


THOUGHTFUL = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def thoughtful() -> Iterator[LLM]:
    llm = LLM(TINY, num_blocks=200, block_size=4, reasoning_markers="<t>...</t>", show_progress=False)
    yield llm
    llm.close()


def test_a_form_is_that_of_the_answer_behind_a_thought(thoughtful: LLM) -> None:
    in_thought = [*THOUGHTFUL, {"role": "assistant", "content": "<t>so"}]
    own = params({"json": PERSON}, thinking_token_budget=5)
    [output] = thoughtful.chat(in_thought, own, continue_final_message=True)
    assert output.num_reasoning_tokens == 5
    assert is_person(output.text)
    assert not regex.match(r"\s*\{", output.reasoning or "")


def test_a_model_may_open_a_thought_before_its_form_begins(thoughtful: LLM) -> None:
    [less, t, more] = (thoughtful.tokenizer.encode(one)[0] for one in "<t>")
    own = params(
        {"json": PERSON}, temperature=0, thinking_token_budget=3, logit_bias={less: 100.0}, max_tokens=180
    )
    [output] = thoughtful.chat(THOUGHTFUL, own)
    assert output.token_ids[:3] == [less, t, more]
    assert output.reasoning == "<<", "and the third began a marker"
    assert is_person(output.text)
    [singly] = thoughtful.chat(THOUGHTFUL, replace(own, logprobs=0))
    assert singly.token_ids == output.token_ids
    [output] = thoughtful.chat(THOUGHTFUL, replace(own, logit_bias={less: -100.0}))
    assert output.reasoning is None
    assert is_person(output.text)


# At the door.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "structured: found no form"),
    "two": ({"regex": "a", "choice": ["b"]}, "found regex and choice, expected one of"),
    "unknown": ({"yaml": "a"}, "found the field 'yaml'"),
    "no schema": ({"json": 3}, "structured.json: found 3, expected a JSON object"),
    "no json": ({"json": "{"}, "structured.json: found malformed JSON"),
    "no choice": ({"choice": []}, "structured.choice: found \\[\\]"),
    "keyword": ({"json": {"not": {"type": "string"}}}, "structured.json: .*not"),
    "remote": ({"json": {"$ref": "https://example.com/a.json"}}, "structured.json: .*example.com"),
    "no pointer": ({"json": {"$ref": "#/$defs/a"}}, "structured.json: .*does not exist"),
    "itself": ({"json": {"$ref": "#"}}, "structured.json: found one that no text has"),
    "regex": ({"regex": "(a"}, "structured.regex: .*regex"),
    "lark": ({"grammar": "start: nowhere"}, "structured.grammar: .*nowhere"),
    "gbnf": ({"grammar": 'root ::= "a'}, "structured.grammar: "),
    "tag": ({"structural_tag": {"format": {"type": "wheel"}}}, "structured.structural_tag: .*wheel"),
    "deep": ({"json": '{"items":' * 400 + "{}" + "}" * 400}, "structured.json: "),
    "huge": ({"regex": "a" * 300_000}, "found 300000 characters, expected at most 262144"),
    "no match": ({"json": {"enum": []}}, "structured.json: "),
    "many rules": (
        {"grammar": "start: r0\n" + "\n".join(f'r{i}: "a" r{(i + 1) % 5000}?' for i in range(5000))},
        "takes more memory or depth than it may have",
    ),
    "slow regex": ({"regex": "[a-z]?" * 40_000}, "takes more than"),
    "exponential": (
        {"grammar": "\n".join(["start: R0", *(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)), 'R40: "a"'])},
        "too big|takes more than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_be_had_is_refused_by_its_name_and_harms_nobody(llm: LLM, name: str) -> None:
    form, message = REFUSED[name]
    with pytest.raises(RequestError, match=message) as error:
        llm.generate("ab", params(form))
    assert len(str(error.value)) < 600
    [output] = llm.generate("ab", params({"choice": ["fine"]}))
    assert output.text == "fine"


def test_a_form_that_is_given_up_at_its_compilation_leaves_the_next_one_as_it_is(llm: LLM) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="takes more than"):
            llm.engine.compile_form(StructuredOutputs(regex="[a-y]?" * 40_000))
        llm.engine.compile_form(StructuredOutputs(regex=f"a{{{time.monotonic_ns() % 1000}}}"))


def children_of(process_id: int) -> list[int]:
    path = Path(f"/proc/{process_id}/task/{process_id}/children")
    if not path.exists():
        pytest.skip("needs a system that tells of children")
    return [int(child) for child in path.read_text().split()]


def test_hostile_grammars_cost_a_child_each_and_nobody_the_start_of_a_process(llm: LLM) -> None:
    compiler = GrammarCompiler(llm.tokenizer, llm.tokenizer.vocab_size, 1)
    compiler.compile(StructuredOutputs(regex="a"))
    trial = compiler._trial
    assert trial is not None
    assert trial._process is not None
    process_id, seen = trial._process.pid, set[int]()
    for letter in "xyz":
        seen.update(children_of(process_id))
        with pytest.raises(RequestError, match="takes more than"):
            compiler.compile(StructuredOutputs(regex=f"[a-{letter}]?" * 40_000))
        compiler.compile(StructuredOutputs(regex=f"a{letter}"))
        assert trial._process.pid == process_id
    [child] = children_of(process_id)
    assert len(seen) == 3
    assert child not in seen
    connection = trial._children[-1]._connection
    assert connection is not None
    os.kill(child, signal.SIGKILL)  # as a system does that is short of memory
    while not connection.poll():
        time.sleep(0.001)
    compiler.compile(StructuredOutputs(regex="b"))
    os.kill(process_id, signal.SIGKILL)
    trial._process.wait()
    with pytest.raises(RequestError, match="takes more than"):
        compiler.compile(StructuredOutputs(regex="[b-z]?" * 40_000))
    compiler.compile(StructuredOutputs(regex="c"))
    assert trial._process.pid != process_id
    check_ends(compiler)


def check_ends(compiler: GrammarCompiler) -> None:
    trial = compiler._trial
    assert trial is not None
    assert trial._process is not None
    under_way = [trial._process.pid, *children_of(trial._process.pid)]
    assert len(under_way) > 1
    compiler.close()
    for ended in under_way:
        with pytest.raises(ProcessLookupError):
            os.kill(ended, 0)


def test_hostile_grammars_that_come_together_are_tried_side_by_side(llm: LLM) -> None:
    compiler = GrammarCompiler(llm.tokenizer, llm.tokenizer.vocab_size, 1)
    forms = [StructuredOutputs(regex=f"[a-{letter}]?" * 40_000) for letter in "uvwxyz"]
    forms += [StructuredOutputs(regex=f"{letter}+") for letter in "abcd"]

    def said(form: StructuredOutputs) -> str:
        try:
            return repr(compiler.compile(form).new_matcher().is_error())
        except RequestError as error:
            return str(error)

    with ThreadPoolExecutor(len(forms)) as pool:
        answers = list(pool.map(said, forms))
    assert all("takes more than" in answer for answer in answers[:6])
    assert answers[6:] == ["False"] * 4
    check_ends(compiler)


def test_masks_that_nobody_waits_for_any_more_are_there_until_they_are_computed() -> None:
    """They are written by their address: where they had been would be somebody else's by then."""
    has_begun, goes_on = threading.Event(), threading.Event()

    class Slow:
        def unsafe_compute_mask_ptr(self, *_: object) -> None:
            has_begun.set()
            goes_on.wait()

    worker = MaskWorker(64, 1)
    worker._started()
    worker._executor = Slow()
    job = worker.begin([None])
    masks = weakref.ref(job._masks)
    try:
        assert has_begun.wait(60)
        del job
        gc.collect()
        assert masks() is not None
    finally:
        goes_on.set()
        worker.close()


def test_beam_search_takes_no_form() -> None:
    with pytest.raises(TypeError, match="structured"):
        BeamSearchParams(structured={"regex": "a"})  # type: ignore[call-arg]


def test_without_llguidance_the_extra_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        RequestError, match=r"llguidance is not installed \(pip install 'pagellm\[structured\]'\)"
    ):
        llm.generate("ab", params({"regex": "never asked before"}))


def test_nothing_without_a_form_imports_llguidance() -> None:
    code = (
        "import sys; from pagellm import LLM\n"
        f"llm = LLM({TINY!r}, num_blocks=20, show_progress=False); llm.generate('a')\n"
        "sys.exit('llguidance' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_that_ask_for_the_same_are_equal_and_share_a_grammar(llm: LLM) -> None:
    one, other = StructuredOutputs(json=PERSON), StructuredOutputs(json=json.dumps(PERSON))
    assert (one, hash(one)) == (other, hash(other))
    compiler = llm.engine._grammars
    assert compiler.compile(one) is compiler.compile(other)


def test_a_model_class_is_a_schema() -> None:
    class Person:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return PERSON

    assert StructuredOutputs(json=Person) == StructuredOutputs(json=PERSON)


@pytest.mark.weights
def test_a_real_model_writes_a_real_schema(smollm: LLM) -> None:
    message = [{"role": "user", "content": "Describe Tom, a cat who is 7 years old, as JSON."}]
    [output] = smollm.chat(
        message, SamplingParams(temperature=0, max_tokens=100, structured={"json": PERSON})
    )
    assert is_person(output.text)
    assert json.loads(output.text) == {"name": "Tom", "age": 7, "kind": "cat"}
