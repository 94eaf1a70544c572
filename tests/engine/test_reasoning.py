"""Thoughts are told apart from answers, however the text comes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine.requests.reasoning import Markers, Piece, ReasoningParser

THINK = Markers("<think>", "</think>")


def parsed(
    tokens: list[str], markers: Markers = THINK, in_thought: bool = False
) -> tuple[str, str, ReasoningParser]:
    """The thoughts and the answer of a text that comes in these tokens."""
    parser = ReasoningParser(markers, in_thought)
    answer: list[Piece] = []
    for number, token in enumerate(tokens, 1):
        answer += parser.append(token, number)
    answer += parser.finish()
    return parser.reasoning, "".join(piece.text for piece in answer), parser


def oracle(text: str, markers: Markers, in_thought: bool) -> tuple[str, str]:
    """The thoughts and the answer of a whole text, from the definition."""
    thoughts = []
    rest, has_thought = text, in_thought
    while True:
        if not in_thought:
            begun = rest.lstrip()
            if begun.startswith(markers.start):
                rest = begun.removeprefix(markers.start)
            elif begun.startswith(markers.end):  # the end of a thought that nobody knew of, and that is empty
                rest, has_thought = begun.removeprefix(markers.end), True
                continue
            else:
                answer = begun if has_thought else rest
                return "\n".join(filter(None, thoughts)), answer
        thought, _, rest = rest.partition(markers.end)
        thoughts.append(thought.strip())
        in_thought, has_thought = False, True


@pytest.mark.parametrize(
    ("tokens", "reasoning", "answer"),
    [
        (["<think>", "\n", "I am", "\n", "</think>", "\n\n", "Hi"], "I am", "Hi"),
        (["<think>\n\n</think>\n\nHi"], "", "Hi"),
        ([" <", "thi", "nk>a</", "think", ">b"], "a", "b"),
        (["<think>", "never", " ends\n"], "never ends", ""),
        (["<think>", "nearly </thi"], "nearly </thi", ""),
        (["Say <think> and </think>."], "", "Say <think> and </think>."),
        (["<think>a</think>Say <think>."], "a", "Say <think>."),
        (["<think>a</think>\n<think> b </think>c"], "a\nb", "c"),
        (["\n <", "b>"], "", "\n <b>"),
        (["  \n"], "", "  \n"),
        (["<thin"], "", "<thin"),
        ([], "", ""),
    ],
)
def test_what_is_a_thought_and_what_is_answered(tokens: list[str], reasoning: str, answer: str) -> None:
    assert parsed(tokens)[:2] == (reasoning, answer)


@pytest.mark.parametrize(
    ("tokens", "reasoning", "answer"),
    [
        (["I am", "\n</think>", "\n\nHi"], "I am", "Hi"),
        (["</think>Hi"], "", "Hi"),
        (["cut off"], "cut off", ""),
    ],
)
def test_a_prompt_may_have_opened_the_thought(tokens: list[str], reasoning: str, answer: str) -> None:
    assert parsed(tokens, in_thought=True)[:2] == (reasoning, answer)
    assert parsed(tokens, Markers("", "</think>"))[:2] == (reasoning, answer)


_texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", " ", "\n", "a", "é", "</thi"]),
    max_size=14,
).map("".join)


@given(text=_texts, in_thought=st.booleans(), cuts=st.sets(st.integers(0, 60)))
def test_the_text_may_be_cut_into_any_tokens(text: str, in_thought: bool, cuts: set[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    tokens = [text[first:last] for first, last in pairwise(places)]
    assert parsed(tokens, in_thought=in_thought)[:2] == oracle(text, THINK, in_thought)


@given(text=_texts, in_thought=st.booleans(), cuts=st.sets(st.integers(0, 60)))
def test_both_only_grow(text: str, in_thought: bool, cuts: set[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parser = ReasoningParser(THINK, in_thought)
    reasoning = ""
    for number, (first, last) in enumerate(pairwise(places), 1):
        parser.append(text[first:last], number)
        assert parser.reasoning.startswith(reasoning)
        reasoning = parser.reasoning
    parser.finish()
    assert parser.reasoning.startswith(reasoning)


def test_special_tokens_that_are_left_out_of_the_text_are_markers_too() -> None:
    markers = Markers("<|channel|>analysis<|message|>", "<|end|>")
    parser = ReasoningParser(markers)
    answer = parser.append("", 1, "<|channel|>")
    answer += parser.append("analysis", 2)
    answer += parser.append("", 3, "<|message|>")
    answer += parser.append("hm", 4)
    answer += parser.append("", 5, "<|note|>")
    answer += parser.append("", 6, "<|end|>")
    answer += parser.append("", 7, "<|start|>")
    answer += parser.append("so", 8)
    assert (parser.reasoning, parser.num_reasoning_tokens) == ("hm", 2)
    assert answer == [Piece("<|start|>", True, 7), Piece("so", False, 8)]


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        (["<think>", "a", "b", "</think>", "c"], 2),
        (["<", "think", ">", "\n", "a", "</", "think", ">", "c"], 2),
        (["<think>a", "b</think>"], 2),
        (["<think>", "a", "</", "x"], 3),
        (["<think>", "", "é", "</think>"], 2),  # the first byte of a character has no text yet
        (["<think>", "</think>", "a"], 0),
        (["a", "b"], 0),
    ],
)
def test_tokens_of_thoughts_are_counted_without_their_markers(tokens: list[str], count: int) -> None:
    assert parsed(tokens)[2].num_reasoning_tokens == count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><response>b</response>", ("a", "b")),
        ("<think>a</think>\n<response>\nb</resp</response>c", ("a", "\nb</respc")),
        ("<response>b", ("", "b")),
        ("<think>a</think>b<response>c</response>", ("a", "b<response>c</response>")),
        ("<response>b</respons", ("", "b</respons")),
    ],
)
@given(cuts=st.sets(st.integers(1, 50)))
def test_tags_around_an_answer_are_no_part_of_it(
    text: str, expected: tuple[str, str], cuts: set[int]
) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parser = ReasoningParser(THINK, answer_tags=Markers("<response>", "</response>"))
    answer: list[Piece] = []
    for number, (first, last) in enumerate(pairwise(places), 1):
        answer += parser.append(text[first:last], number)
    answer += parser.finish()
    assert (parser.reasoning, "".join(piece.text for piece in answer)) == expected


@pytest.mark.parametrize("text", ["", "auto!", "<think>", "<think>...", "...", "x" * 300 + "...y"])
def test_markers_are_both_named(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whoever asks makes a message of it)
        Markers.read(text)


def test_markers_may_have_no_start() -> None:
    assert Markers.read("...</think>") == Markers("", "</think>")
    assert Markers.read(" <think> ... </think>") == THINK
