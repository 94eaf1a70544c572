"""Grammars of calls on vocabularies whose markers are special tokens, as Mistral's and gpt-oss's have them.

The texts are what the models write: of Mistral's as `mistral_common` encodes a call, of gpt-oss's as its
harmony format is described.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine.grammar.compiler import GrammarCompiler
from pagellm.engine.grammar.masks import allows
from pagellm.engine.grammar.state import GrammarState
from pagellm.engine.grammar.tool_grammar import Tool, ToolGrammars
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.requests.tool_calls import GPT_OSS, MISTRAL, ToolCall, new_parser
from pagellm.engine.tokenizer import Tokenizer
from tests.engine.test_tokenizer import load_json, small_json

pytest.importorskip("llguidance")
MARKERS = {
    MISTRAL: ("[TOOL_CALLS]", "[ARGS]", "</s>"),
    GPT_OSS: (
        "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>",
    ),
}  # fmt: skip
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS = [Tool("get_weather", CITY, True, 0), Tool("now", {"type": "object", "properties": {}}, True, 1)]
OSLO = '{"city": "Oslo"}'
# Kind, sources of the template, text, the calls in it.
CALLS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    (
        MISTRAL,
        "[TOOL_CALLS]",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {OSLO}}}, {{"name": "now", "arguments": {{}}}}]',
        [("get_weather", {"city": "Oslo"}), ("now", {})],
    ),
    (
        MISTRAL,
        "[TOOL_CALLS][ARGS]",
        f"[TOOL_CALLS]get_weather[ARGS]{OSLO}[TOOL_CALLS]now[ARGS]{{}}",
        [("get_weather", {"city": "Oslo"}), ("now", {})],
    ),
    (
        GPT_OSS,
        "",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{OSLO}",
        [("get_weather", {"city": "Oslo"})],
    ),
]


def tokenizer_of(directory: Path, kind: str) -> Tokenizer:
    """The 256 bytes, three merges, and the markers as special tokens, the last of which ends a text."""
    data = small_json()
    first = len(data["model"]["vocab"])
    data["added_tokens"] = [
        {"id": first + index, "content": content, "special": True, "normalized": False, "lstrip": False,
         "rstrip": False, "single_word": False}
        for index, content in enumerate(MARKERS[kind])
    ]  # fmt: skip
    ends = MARKERS[kind][-1:] if kind == MISTRAL else MARKERS[kind][-2:]
    eos = [first + MARKERS[kind].index(content) for content in ends]
    return load_json(directory, data, generation_config={"eos_token_id": eos}, config={"eos_token_id": eos})


def state_of(tokenizer: Tokenizer, kind: str, sources: str, **how: Any) -> GrammarState:
    grammar = ToolGrammars(kind, tokenizer, sources).grammar(TOOLS, answer=None, **how)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, 1)
    try:
        return GrammarState(compiler.compile(StructuredOutputs(grammar=grammar)))
    finally:
        compiler.close()


def goes(state: GrammarState, token_ids: list[int]) -> int:
    """How many of the tokens the grammar lets come."""
    for number, token_id in enumerate(token_ids):
        if state.is_complete or not (
            token_id == state.forced[0] if state.forced else allows(state.mask(), token_id)
        ):
            return number
        state.append(token_id)
    return len(token_ids)


@pytest.mark.parametrize("may_say", [False, True])
@pytest.mark.parametrize(("kind", "sources", "text", "calls"), CALLS, ids=["v3", "v11", "gpt-oss"])
def test_a_call_is_written_with_its_special_tokens(
    tmp_path: Path, kind: str, sources: str, text: str, calls: Any, may_say: bool
) -> None:
    tokenizer = tokenizer_of(tmp_path, kind)
    ids = tokenizer.encode(text)
    assert sum(token_id in tokenizer.special_ids for token_id in ids) == sum(
        text.count(m) for m in MARKERS[kind]
    )
    state = state_of(tokenizer, kind, sources, may_say=may_say, is_parallel=True)
    assert goes(state, ids) == len(ids)
    assert state.is_complete or allows(state.mask(), tokenizer.eos_token_ids[0])
    # What the client gets of it.
    parser = new_parser(kind, [tool.name for tool in TOOLS], [])
    found = [one for one in (*parser.append(text), *parser.finish()) if isinstance(one, ToolCall)]
    assert [(one.name, json.loads(one.arguments)) for one in found] == calls


@pytest.mark.parametrize(("kind", "sources", "text", "calls"), CALLS, ids=["v3", "v11", "gpt-oss"])
def test_letters_that_look_like_a_marker_begin_no_call(
    tmp_path: Path, kind: str, sources: str, text: str, calls: Any
) -> None:
    tokenizer = tokenizer_of(tmp_path, kind)
    ids = tokenizer.encode(text, parse_special=False)
    assert not set(ids) & set(tokenizer.special_ids)
    required = state_of(tokenizer, kind, sources, may_say=False, is_parallel=True)
    assert goes(required, ids) == 0
    if kind == MISTRAL:  # there it is something that is said
        free = state_of(tokenizer, kind, sources, may_say=True, is_parallel=True)
        assert goes(free, ids) == len(ids)
        assert allows(free.mask(), tokenizer.eos_token_ids[0])


@pytest.mark.parametrize(("kind", "sources", "text", "calls"), CALLS, ids=["v3", "v11", "gpt-oss"])
def test_a_call_of_another_function_or_with_other_arguments_does_not_come(
    tmp_path: Path, kind: str, sources: str, text: str, calls: Any
) -> None:
    tokenizer = tokenizer_of(tmp_path, kind)
    for may_say in (False, True):
        for right, wrong in (("get_weather", "get_whatever"), ('"Oslo"', '"Bonn"')):
            ids = tokenizer.encode(text.replace(right, wrong))
            state = state_of(tokenizer, kind, sources, may_say=may_say, is_parallel=True)
            assert goes(state, ids) < len(ids)
    if len(calls) > 1:
        single = state_of(tokenizer, kind, sources, may_say=False, is_parallel=False)
        assert goes(single, tokenizer.encode(text)) < len(tokenizer.encode(text))
