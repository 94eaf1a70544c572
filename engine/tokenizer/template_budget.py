"""What a chat template may spend: units of work, and seconds.

A unit is about a character that is made or looked at. Whatever a template does is paid for before it is done,
so no single operation is long or makes anything big; and since everything that it makes was paid for, its
memory is bounded, too. This module knows what operations cost, and nothing of how they are intercepted.
"""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence, Sized
from itertools import chain
from string import Formatter
from typing import Any

_UNITS = 1 << 25
_UNITS_A_CHARACTER_OF_INPUT = 16
_SECONDS = 3.0
_MAX_INTEGER_BITS = 1 << 12
_MAX_WIDTH = 10_000  # of a padded field
_OBJECT = 16  # of a string or a list, beside its content

_CONTAINERS: tuple[type, ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_PERCENT_FIELD = re.compile(r"%[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")
_AFTER_KEY = re.compile(r"\)[-#0 +]*(\d+)?(?:\.(\d+))?")


def words(text: str) -> frozenset[str]:
    """The set of the text's words."""
    return frozenset(text.split())


class LimitError(Exception):
    """The template did more than any chat needs."""


class Budget:
    """What is left to one rendering. input_size: of all that the template is given, in units."""

    def __init__(self, input_size: int) -> None:
        self._left = _UNITS + _UNITS_A_CHARACTER_OF_INPUT * input_size
        self._deadline = time.monotonic() + _SECONDS
        self._sizes: dict[int, tuple[object, int]] = {}  # of containers, by identity; they are kept alive

    def spend(self, units: int) -> None:
        """Pays for something before it is done. Raises `LimitError` if that is too much."""
        self._left -= max(units, 0)
        if self._left < 0:
            raise LimitError("more work than any chat needs: loops, calls, or texts and lists that it makes")
        if time.monotonic() > self._deadline:
            raise LimitError(f"more than {_SECONDS:g} seconds")

    def size(self, value: Any) -> int:
        """The units of a value with all that is in it, as often as it is in it."""
        if isinstance(value, str | bytes):
            return _OBJECT + len(value)
        if isinstance(value, range):
            return _OBJECT * (1 + len(value))
        if isinstance(value, Collection) and isinstance(value, _CONTAINERS):
            known = self._sizes.get(id(value))
            if known is not None:
                return known[1]
            self.spend(_OBJECT + len(value))
            items = chain(value, value.values()) if isinstance(value, dict) else value
            total = _OBJECT + sum(_OBJECT // 2 + self.size(item) for item in items)
            self._sizes[id(value)] = value, total
            return total
        return _OBJECT

    def sizes(self, values: Iterable[object]) -> int:
        """The units of several values."""
        return sum(map(self.size, values))

    def made(self, value: Any) -> Any:
        """Pays for a value that an operation gave, and returns it; what it is to give later is paid then."""
        if isinstance(value, str | bytes):
            self.spend(_OBJECT + len(value))
        elif isinstance(value, int):
            check_integer(value)
        elif isinstance(value, list | tuple):
            self.spend(_OBJECT + 2 * len(value))
        elif isinstance(value, dict):
            self.spend(_OBJECT * (1 + len(value)))
        elif isinstance(value, Iterator) and not isinstance(value, Sized):
            return self._drawn(value)
        return value

    def _drawn(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(_OBJECT // 2)
            yield self.made(value)

    def unrolled(self, value: Any) -> Any:
        """A list in the place of what can be gone through only once; anything else as it is."""
        return list(self._drawn(value)) if isinstance(value, Iterator) else value


def check_integer(value: int) -> None:
    """Raises `LimitError` for an integer of too many digits."""
    if value.bit_length() > _MAX_INTEGER_BITS:
        raise LimitError(f"an integer of more than {_MAX_INTEGER_BITS} bits")


def binary_operation(budget: Budget, operator: str, left: Any, right: Any) -> int:
    """The cost of an arithmetic operator between two values."""
    if isinstance(left, int) and isinstance(right, int):
        check_integer(right)
        factor = abs(right) if operator == "**" else 1
        if left.bit_length() * factor > _MAX_INTEGER_BITS:
            raise LimitError(f"an integer of more than {_MAX_INTEGER_BITS} bits")
    elif operator == "*":
        count, repeated = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(count, int) and isinstance(repeated, Sized):
            return _OBJECT + 2 * max(count, 0) * len(repeated)
    elif operator == "%" and isinstance(left, str):
        return percent_format(budget, left, right)
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        return _OBJECT + 2 * (len(left) + len(right))
    return _OBJECT


def percent_format(budget: Budget, template: str, values: object) -> int:
    """The cost of `template % values`."""
    budget.spend(_OBJECT * (1 + template.count("%") + template.count(")")))
    fields = [*_PERCENT_FIELD.finditer(template), *_AFTER_KEY.finditer(template if "%(" in template else "")]
    widths = [_width(width) for field in fields for width in field.groups() if width]
    return len(template) + sum(widths) + template.count("%") * 4 * budget.size(values)


def brace_format(budget: Budget, template: str, values: Iterable[object]) -> int:
    """The cost of `template.format(...)`."""
    budget.spend(_OBJECT * (1 + template.count("{")))
    fields = [field for field in Formatter().parse(template) if field[1] is not None]
    widths = [_width(width) for *_, spec, _ in fields for width in re.findall(r"\d+|{", spec or "")]
    return len(template) + sum(widths) + len(fields) * 4 * budget.sizes(values)


def _width(written: str) -> int:
    """The number in a format; one that only comes with the values is not allowed."""
    if not written.isdecimal() or len(written) > 6 or int(written) > _MAX_WIDTH:
        raise LimitError(f"a field of more than {_MAX_WIDTH} characters, or of a computed width")
    return int(written)


def string_method(budget: Budget, text: str, name: str, args: Sequence[Any]) -> int:
    """The cost of a method of a string."""
    first, second = (*args, None, None)[:2]
    cost = _OBJECT + 3 * len(text) + budget.sizes(args)  # a letter may have up to three in the other case
    if isinstance(first, str) and name in _SEARCHES:
        # Searches from the left are linear in the worst case, but for short needles; from the right they
        # are not, and stripping looks every character up.
        longest = 128 if name in ("count", "find", "index", "partition", "replace", "split") else len(first)
        cost += len(text) * min(len(first), longest) // 16
    if name in ("center", "ljust", "rjust", "zfill"):
        cost += max(first, 0) if isinstance(first, int) else 0
    elif name == "replace" and isinstance(first, str) and isinstance(second, str):
        cost += text.count(first) * len(second)
    elif name == "join" and isinstance(first, Sized):
        cost += len(text) * len(first)
    elif name in ("split", "rsplit"):
        pieces = len(text) // 2 if not isinstance(first, str) or not first else text.count(first)
        cost += _OBJECT * (min(pieces, second) if isinstance(second, int) and second >= 0 else pieces)
    elif name == "splitlines":
        cost += _OBJECT * sum(map(text.count, _LINE_ENDS))
    return cost


_SEARCHES = words(
    "count find index partition replace split rfind rindex rpartition rsplit strip lstrip rstrip"
)


def filter_call(budget: Budget, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The cost of a filter, the value that it is applied to being the first of its arguments.

    Some of it is paid here, before the arguments are looked into.
    """
    if name in _LIGHT_FILTERS or not args:
        return _OBJECT
    value, *others = args
    num_items = len(value) if isinstance(value, Sized) else 0
    cost = budget.sizes(args) + budget.sizes(kwargs.values())
    budget.spend(cost)
    others += kwargs.values()
    if name in _STRING_METHOD_OF_FILTER:
        return string_method(budget, str(value), _STRING_METHOD_OF_FILTER[name], others)
    if name == "format":
        return percent_format(budget, str(value), kwargs or tuple(args[1:]))
    if name == "sum" and not all(isinstance(other, int | float | str | None) for other in others):
        raise LimitError("a sum of lists")
    if name == "join":
        return cost + num_items * max([len(str(other)) for other in others], default=0)
    if name in _QUADRATIC_FILTERS:
        return _OBJECT * cost + cost * cost // 64
    # Numbers are widths, counts and digits.
    numbers = [abs(other) for other in others if isinstance(other, int | float)]
    most = max(numbers, default=0)
    if most > _MAX_WIDTH or (name == "round" and most > 300) or (name == "tojson" and most > 64):
        raise LimitError(f"the filter {name} with {most:g}")
    if name == "indent":
        widths = [len(other) if isinstance(other, str) else int(most) for other in (*others, 4)]
        return cost + (str(value).count("\n") + 1) * max(widths)
    return _COST_FACTORS.get(name, 1) * cost + _OBJECT * num_items + int(most)


LAZY_FILTERS = words("batch d default first map reject rejectattr select selectattr")
_LIGHT_FILTERS = words(
    "attr count d default first items last length map reject rejectattr safe select selectattr"
)
_STRING_METHOD_OF_FILTER = {"trim": "strip", "replace": "replace", "upper": "upper", "lower": "lower"}
_QUADRATIC_FILTERS = words("filesizeformat pprint striptags urlize wordwrap xmlattr")
_COST_FACTORS = {
    "e": 6, "escape": 6, "forceescape": 6, "groupby": 4, "dictsort": 4, "sort": 4, "string": 4, "title": 8,
    "tojson": 12, "unique": 4, "urlencode": 12, "wordcount": 8,
}  # fmt: skip
