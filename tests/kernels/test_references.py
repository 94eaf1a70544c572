"""A reference to a named tuple reads as the tuple does: fields of all kinds, in kernels that get it."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from numba.core.errors import TypingError

from pagellm.kernels.jit import entry_point, kernel
from pagellm.kernels.references import reference_to


class Pair(NamedTuple):
    """All of one type."""

    first: int
    second: int


class Inner(NamedTuple):
    """A tuple in a tuple."""

    pair: Pair
    table: Any


class Outer(NamedTuple):
    """Fields of several kinds."""

    flag: bool
    number: float
    inner: Inner
    values: Any


@kernel
def _sum(outer, row):  # type: ignore[no-untyped-def]
    pair, table = outer.inner.pair, outer.inner.table
    total = outer.number * (pair.first - pair.second)
    for i in range(table.shape[1]):
        total += table[row, i]
    return total if outer.flag else -total


@kernel
def _fill(outer):  # type: ignore[no-untyped-def]
    for row in range(outer.values.size):
        outer.values[row] += _sum(outer, row)


@entry_point
def fill(outer):  # type: ignore[no-untyped-def]
    """Adds to each value the sum that goes with its row."""
    _fill(reference_to(outer))


@entry_point
def fill_by_value(outer):  # type: ignore[no-untyped-def]
    """The same."""
    _fill(outer)


def outer(flag: bool, kind: Any, values: Any) -> Outer:
    """A table of two rows, and the values that go with them."""
    return Outer(flag, 2.0, Inner(Pair(7, 4), np.array([[1, 2, 3], [4, 5, 6]], kind)), values)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", [np.float32, np.int64])
@pytest.mark.parametrize("call", [fill, fill_by_value])
def test_all_fields_are_read_and_arrays_are_written(call: Any, kind: Any, flag: bool) -> None:
    values = np.array([0.5, 100.0])
    call(outer(flag, kind, values))
    sign = 1.0 if flag else -1.0
    assert values.tolist() == [0.5 + sign * 12.0, 100.0 + sign * 21.0]


def test_tuples_of_one_name_and_other_types_are_told_apart() -> None:
    strided = np.zeros(4)[::2]  # an array of another layout
    for _ in range(2):
        fill(outer(True, np.int64, strided))
    assert strided.tolist() == [24.0, 42.0]


def test_a_field_that_there_is_not_is_refused() -> None:
    @entry_point
    def read(outer: Any) -> Any:
        return reference_to(outer).nothing

    with pytest.raises(TypingError, match="Unknown attribute 'nothing' of type reference to Outer"):
        read(outer(True, np.int64, np.zeros(2)))


def test_only_a_named_tuple_is_referred_to() -> None:
    @entry_point
    def read(x: Any) -> Any:
        return reference_to(x)

    with pytest.raises(TypingError, match="reference_to"):
        read(np.zeros(2))
