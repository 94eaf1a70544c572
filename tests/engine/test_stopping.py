"""Stop strings, fed in arbitrary pieces."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import SamplingParams
from pagellm.engine.requests.stopping import StopAutomaton, StopChecker

_texts = st.text(alphabet="ab", max_size=12)
_stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


def feed(checker: StopChecker, pieces: list[str]) -> tuple[list[str], str | None]:
    """Feeds pieces as tokens until a stop; returns what could be shown after each, and the stop string."""
    shown = []
    for number, piece in enumerate(pieces, 1):
        stop = checker.append(piece, number)
        shown.append(checker.text if stop else checker.safe_text)
        if stop:
            return shown, stop
    return shown, None


@given(pieces=st.lists(_texts, max_size=8), stops=_stops)
def test_the_text_ends_before_the_stop_string_that_is_completed_first(
    pieces: list[str], stops: list[str]
) -> None:
    checker = StopChecker(SamplingParams(stop=stops))
    shown, stop = feed(checker, pieces)
    consumed = "".join(pieces[: len(shown)])
    if stop is None:
        assert checker.text == "".join(pieces)
        assert not any(s in consumed for s in stops)
    else:
        assert checker.text + stop == consumed[: len(checker.text) + len(stop)]
        assert not any(s in "".join(pieces[: len(shown) - 1]) for s in stops)
        assert min(consumed.find(s) for s in stops if s in consumed) == len(checker.text)


@given(pieces=st.lists(_texts, max_size=8), stops=_stops)
def test_what_has_been_shown_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
    checker = StopChecker(SamplingParams(stop=stops))
    shown, _ = feed(checker, pieces)
    for before, after in pairwise([*shown, checker.text]):
        assert after.startswith(before)


def test_the_stop_string_stays_where_it_is_wanted() -> None:
    checker = StopChecker(SamplingParams(stop="bb", include_stop_str_in_output=True))
    assert feed(checker, ["ab", "ba"]) == (["ab", "abb"], "bb")


def test_before_min_tokens_nothing_stops() -> None:
    checker = StopChecker(SamplingParams(stop="b", min_tokens=2))
    assert feed(checker, ["b", "b", "a", "b"]) == (["b", "bb", "bba", "bba"], "b")


@given(
    tokens=st.lists(st.tuples(_texts, st.booleans()), max_size=8),
    stops=st.lists(st.text(alphabet="abX", min_size=1, max_size=4), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_are_found_past_and_over_hidden_special_tokens(
    tokens: list[tuple[str, bool]], stops: list[str], include: bool
) -> None:
    """X is a special token: it is searched for where it is, and what is left of the text without it."""
    checker = StopChecker(SamplingParams(stop=stops, include_stop_str_in_output=include))
    visible, whole, shown = "", "", ""
    for number, (text, special) in enumerate(tokens, 1):
        stop = checker.append(text, number, "X" * special)
        visible, whole = visible + text, whole + text + "X" * special
        places = [(visible.index(s), -len(s), s) for s in stops if s in visible]
        places += [
            (whole[: whole.index(s)].replace("X", "").__len__(), -len(s), s) for s in stops if s in whole
        ]
        expected = min(places, default=None)
        assert stop == (expected and expected[2])
        if expected:
            assert checker.text == visible[: expected[0]] + expected[2] * include
            assert checker.text.startswith(shown)
            return
        assert checker.safe_text.startswith(shown)
        shown = checker.safe_text


def test_a_stop_string_within_a_hidden_special_token_is_not_seen() -> None:
    checker = StopChecker(SamplingParams(stop=["end", "|>"]))
    assert checker.append("a", 1, "<|end|>") is None
    assert checker.append("the end", 2) == "end"


@given(stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=8), text=_texts)
def test_the_automaton_knows_every_end(stops: list[str], text: str) -> None:
    automaton, state = StopAutomaton(tuple(dict.fromkeys(stops))), 0
    for end, character in enumerate(map(ord, text), 1):
        state = automaton.step(state, character)
        longest = max((s for s in stops if text[:end].endswith(s)), key=len, default="")
        node = automaton.found[state]
        assert (automaton.text_of(node) if node else "") == longest
        prefixes = {s[:size] for s in stops for size in range(len(s) + 1)}
        assert automaton.depths[state] == max(len(p) for p in prefixes if text[:end].endswith(p))


def test_a_long_stop_string_and_many_are_found() -> None:
    long = "ab" * 20_000
    checker = StopChecker(SamplingParams(stop=[long, *map(str, range(2000, 4000))]))
    assert all(checker.append("ab", number) is None for number in range(1, 20_000))
    assert checker.safe_text == ""
    assert checker.append("a3", 20_000) is None
    assert checker.safe_text == "ab" * 19_999 + "a"
    assert checker.append("456", 20_001) == "3456"
