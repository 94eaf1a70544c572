"""Calls of tools in the text of an answer: each form, and that pieces give what the whole gives."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.engine.config import TOOL_CALL_PARSERS
from pagellm.engine.requests.tool_calls import (
    GPT_OSS,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    PARSERS,
    Part,
    Thought,
    ToolCall,
    new_parser,
)

NAMES = ("f", "get_weather")
SPECIALS = (
    "<|im_end|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|python_tag|>",
    "<|eot_id|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "</s>",
    "<|e",
    "<|eot",
)
OSLO = '{"city": "Oslo", "days": [1, {"a": "}\\"]"}]}'


def unsaid(kind: str) -> list[str]:
    """The special tokens that a model with such calls has; these are no text."""
    if kind == GPT_OSS:
        return [one for one in SPECIALS if one.startswith("<|")]
    if kind == MISTRAL:
        return ["[TOOL_CALLS]", "[ARGS]", "</s>"]
    return ["<|im_end|>", "<|eot_id|>", "<|e"]


def parts(kind: str, *pieces: str) -> list[Part]:
    """The parts of a text that comes in pieces, neighbouring texts joined."""
    parser = new_parser(kind, NAMES, unsaid(kind))
    joined: list[Part] = []
    for part in [*(part for piece in pieces for part in parser.append(piece)), *parser.finish()]:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        elif isinstance(part, Thought) and isinstance(last, Thought):
            joined[-1] = Thought(last.text + part.text)
        else:
            joined.append(part)
    return joined


CALL, OTHER = ToolCall("get_weather", OSLO), ToolCall("f", "{}")
H = f'<tool_call>\n{{"name": "get_weather", "arguments": {OSLO}}}\n</tool_call>'
CASES: list[tuple[str, str, list[Part]]] = [
    (HERMES, "hello ", ["hello "]),
    (HERMES, "hello<|im_end|>", ["hello"]),
    (HERMES, H, [CALL]),
    (HERMES, f"Let me see.\n{H}<|im_end|>", ["Let me see.", CALL]),
    (HERMES, f'{H}\n<tool_call>{{"name":"f","arguments":{{}}}}</tool_call>\n', [CALL, OTHER]),
    (HERMES, f"{H} and so", [CALL, "and so"]),
    (HERMES, H.removesuffix("</tool_call>"), [CALL]),
    (HERMES, f'<tool_call>{{"arguments": {OSLO}, "name": "get_weather"}}</tool_call>', [CALL]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', [OTHER]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', [OTHER]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        ['<tool_call>{"name": "f", "arguments": [1]}</tool_call>'],
    ),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {</tool_call>',
        ['<tool_call>{"name": "f", "arguments": {</tool_call>'],
    ),
    (HERMES, '<tool_call>{"name": "f", "argum', ['<tool_call>{"name": "f", "argum']),
    (HERMES, f"<tool_call>oh {H}", ["<tool_call>oh", CALL]),
    (HERMES, '<tool_call>{"name": "f"} no</tool_call>', ['<tool_call>{"name": "f"} no</tool_call>']),
    (HERMES, "<tool_", ["<tool_"]),
    (HERMES, " ", [" "]),
    (HERMES, "", []),
    (LLAMA3_JSON, f'{{"name": "get_weather", "parameters": {OSLO}}}<|eot_id|>', [CALL]),
    (LLAMA3_JSON, f'<|python_tag|>{{"name": "get_weather", "parameters": {OSLO}}}', [CALL]),
    (
        LLAMA3_JSON,
        '{"type": "function", "name": "f", "parameters": {}}; {"name": "f", "parameters": {}}',
        [OTHER, OTHER],
    ),
    (LLAMA3_JSON, '{"name": "nobody", "parameters": {}}', ['{"name": "nobody", "parameters": {}}']),
    (LLAMA3_JSON, ' {"an": "answer"}', [' {"an": "answer"}']),
    (LLAMA3_JSON, '{"name": "f", "para', ['{"name": "f", "para']),
    (LLAMA3_JSON, 'So {"name": "f", "parameters": {}}', ['So {"name": "f", "parameters": {}}']),
    (LLAMA3_JSON, '{"name": "f", "parameters": {}}; but', [OTHER, "; but"]),
    (LLAMA3_JSON, "", []),
    (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {OSLO}}}, {{"name": "f", "arguments": {{}}}}]</s>',  # noqa: E501
        [CALL, OTHER],
    ),
    (MISTRAL, f"[TOOL_CALLS]get_weather[ARGS]{OSLO}[TOOL_CALLS]f[ARGS]{{}}</s>", [CALL, OTHER]),
    (MISTRAL, "Well. [TOOL_CALLS]f{}", ["Well.", OTHER]),
    (MISTRAL, "[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{}", [OTHER]),
    (MISTRAL, "[TOOL_CALLS]f[ARGS]{nothing}", ["[TOOL_CALLS]f{nothing}"]),
    (MISTRAL, "[TOOL_CALLS][{}]", ["[TOOL_CALLS][{}]"]),
    (MISTRAL, "[TOOL_CALLS]", ["[TOOL_CALLS]"]),
    (MISTRAL, "[TOOL", ["[TOOL"]),
    (
        GPT_OSS,
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{OSLO}<|call|>",  # noqa: E501
        [Thought("Hm."), CALL],
    ),
    (GPT_OSS, "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>", [OTHER]),
    (GPT_OSS, "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}", [OTHER]),
    (
        GPT_OSS,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>",  # noqa: E501
        ["I look.", OTHER],
    ),
    (GPT_OSS, "<|channel|>final<|message|>It rains.<|return|>", ["It rains."]),
    (
        GPT_OSS,
        "<|channel|>commentary to=functions.f<|message|>{oh<|call|>",
        ["<|channel|>commentary to=functions.f<|message|>{oh"],
    ),
    (GPT_OSS, "plain", ["plain"]),
    (GPT_OSS, " to=functions.f<|channel|>commentary json<|message|>{}", [OTHER]),
    (GPT_OSS, " to=functions.f and so on", [" to=functions.f and so on"]),
    (GPT_OSS, " to=functions.f", [" to=functions.f"]),
    (GPT_OSS, "to", ["to"]),
    (
        GPT_OSS,
        "<|channel|>final<|message|>to=functions.f<|end|><|start|>assistant<|channel|>final<|message|>.",
        ["to=functions.f."],
    ),
    (GPT_OSS, "tor<|channel|>final<|message|>.", ["tor."]),
]


PUBLISHED = json.loads((Path(__file__).parents[1] / "fixtures/tool_calls/published.json").read_text())


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case['source']}: {case['text'][:60]}")
@pytest.mark.parametrize("by_character", [False, True])
def test_what_the_models_publishers_write_is_read_as_they_read_it(case: Any, by_character: bool) -> None:
    found = parts(case["kind"], *(case["text"] if by_character else [case["text"]]))
    calls = [[one.name, json.loads(one.arguments)] for one in found if isinstance(one, ToolCall)]
    assert calls == case["calls"]
    assert "".join(one for one in found if isinstance(one, str)) == case["said"]
    assert "".join(one.text for one in found if isinstance(one, Thought)) == case["thought"]


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_each_form_is_told_apart(kind: str, text: str, expected: list[Part]) -> None:
    assert parts(kind, text) == expected
    assert parts(kind, *text) == expected, "character by character"


_words = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<|channel|>",
        "<|message|>",
        "<|start|>",
        "<|end|>",
        "<|call|>",
        "<|im_end|>",
        "<|e",
        "analysis",
        "commentary",
        " to=functions.f",
        "final",
        "f",
        '{"name": "f", "arguments": {}}',
        '{"name": "f", "parameters": {"a": "\\"}"}}',
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ";",
        " ",
        "\n",
        "<",
        "{}",
        ",",
        "so",
        H,
        H[:30],
        f"f[ARGS]{OSLO}",
    ]
)


def test_the_setting_takes_what_there_is_a_parser_for() -> None:
    assert TOOL_CALL_PARSERS == PARSERS


@pytest.mark.parametrize("kind", PARSERS)
@given(st.lists(_words, max_size=12).map("".join), st.lists(st.integers(0, 200), max_size=12))
@settings(max_examples=400)
def test_pieces_give_what_the_whole_gives(kind: str, text: str, cuts: list[int]) -> None:
    at = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(at)]
    assert parts(kind, *pieces) == parts(kind, text)
    assert parts(kind, *text) == parts(kind, text)


@pytest.mark.parametrize("kind", PARSERS)
@given(text=st.lists(_words, max_size=12).map("".join))
@settings(max_examples=300)
def test_nothing_is_lost(kind: str, text: str) -> None:
    """But whitespace around calls, and special tokens."""
    kept = "".join(
        part if isinstance(part, str) else part.text if isinstance(part, Thought) else part.arguments
        for part in parts(kind, text)
    )
    letters = [one for one in kept if one.isalpha()]
    rest = iter(text)
    assert all(letter in rest for letter in letters), "in their order"
    if not any(isinstance(part, ToolCall) for part in parts(kind, text)) and kind != GPT_OSS:
        left = text
        for special in sorted(
            [*unsaid(kind), "<|python_tag|>" * (kind == LLAMA3_JSON)], key=len, reverse=True
        ):
            left = left.replace(special, "") if special else left
        if not any(special in text for special in ("<|e", "[")):
            assert kept == left


@pytest.mark.parametrize("kind", PARSERS)
def test_arguments_are_what_was_written(kind: str) -> None:
    arguments = '{ "b":1.0, "a" : "\\u00e9é" ,"b2":[ ]}'
    written: dict[str, Any] = {
        HERMES: f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>',
        LLAMA3_JSON: f'{{"name": "f", "parameters": {arguments}}}',
        MISTRAL: f"[TOOL_CALLS]f[ARGS]{arguments}",
        GPT_OSS: f"<|channel|>commentary to=functions.f<|message|>{arguments}<|call|>",
    }
    [call] = parts(kind, written[kind])
    assert call == ToolCall("f", arguments)
    assert json.loads(call.arguments)["b"] == 1.0


def test_a_long_call_is_read_in_time_that_grows_with_it() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"text": "' + "word " * 40_000
    parser = new_parser(HERMES, NAMES, ["<|im_end|>"])
    for at in range(0, len(text), 5):
        assert parser.append(text[at : at + 5]) == []
    [call] = parser.append('"}}</tool_call>')
    assert isinstance(call, ToolCall)
    assert len(call.arguments) > 200_000
