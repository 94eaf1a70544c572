"""How every kernel is compiled: four decorators, so that no kernel differs in its settings.

`nogil`, because a team of Python threads runs the kernels side by side; no `fastmath`, because a reduction's
order must be the one that is written (batch invariance). No reference counts (`_nrt`): a count is an atomic
on a cache line that all threads share, and with them attention took 1.6 times as long; so a kernel allocates
nothing, and what it needs is given to it. An entry point is what Python calls; the whole machine code beneath
it can be cached on disk with it. Kernels are what kernels call, an inlined one is compiled in its one caller,
and a shared function is Python's as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.extending import register_jitable

Function = TypeVar("Function", bound=Callable[..., Any])

_SETTINGS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
    "_nrt": False,
}
_entry_points: list[Any] = []


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function that other kernels call."""
    return numba.njit(**_SETTINGS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A large kernel with one caller, in which it is compiled: each level of calls is optimised once more."""
    return numba.njit(**_SETTINGS, inline="always")(function)


def entry_point(function: Callable[..., Any]) -> Any:
    """Compiles a function that Python calls on its first call, or loads it from the cache."""
    dispatcher = kernel(function)
    _entry_points.append(dispatcher)
    return dispatcher


def cache_on_disk(directory: Path) -> None:
    """Keeps what entry points compile from now on in a writable directory, and finds it there again.

    Numba notices neither an edit in another file than the entry point's own, nor another version of itself,
    so the directory must be one that belongs to these sources alone. Machine code for another processor has
    another name in it. Numba's global setting is changed only for the moment in which it is read.
    """
    config: Any = numba.config
    previous = config.CACHE_DIR
    config.CACHE_DIR = str(directory)
    try:
        for dispatcher in _entry_points:
            dispatcher.enable_caching()
    finally:
        config.CACHE_DIR = previous


def shared(function: Function) -> Function:
    """Lets kernels call a function that stays plain Python for everybody else: the arithmetic of layouts."""
    register_jitable(function)
    return function


@shared
def plain(value: Any) -> Any:
    """A constant as an argument like any other: Numba compiles a callee anew for each literal it is given."""
    return bool(value) if isinstance(value, bool) else int(value)


def by_height(heights: tuple[int, ...], make: Callable[[int], Any]) -> Any:
    """A kernel `(rows, *arguments)` that calls `make(height)` of the least height that holds `rows` rows.

    Register tiles need their height at compile time; this is where a number known only at run time meets
    them. At most seven ascending heights; one flat kernel, because each level of calls is optimised again.
    """
    variants = [make(height) for height in heights]
    limits = heights + heights[-1:] * (7 - len(heights))
    first, second, third, fourth, fifth, sixth, last = variants + variants[-1:] * (7 - len(variants))

    @kernel
    def choose(rows, *arguments):
        if rows <= limits[0]:
            first(*arguments)
        elif rows <= limits[1]:
            second(*arguments)
        elif rows <= limits[2]:
            third(*arguments)
        elif rows <= limits[3]:
            fourth(*arguments)
        elif rows <= limits[4]:
            fifth(*arguments)
        elif rows <= limits[5]:
            sixth(*arguments)
        else:
            last(*arguments)

    return choose
