"""Stop strings, fed in arbitrary pieces."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import SamplingParams
from pagellm.engine.stopping import StopChecker

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
