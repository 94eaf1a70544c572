"""How every kernel is compiled: three decorators, so that no kernel differs in its settings.

`nogil`, because a team of Python threads runs the kernels side by side; no `fastmath`, because a reduction's
order must be the one that is written (batch invariance). An entry point is what Python calls; the whole
machine code beneath it can be cached on disk with it. Kernels are what kernels call; a shared function is
Python's as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.extending import register_jitable

Function = TypeVar("Function", bound=Callable[..., Any])

_entry_points: list[Any] = []


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function that other kernels call."""
    return numba.njit(nogil=True, error_model="numpy")(function)


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


def by_height(heights: tuple[int, ...], make: Callable[[int], Any]) -> Any:
    """A kernel `(height, *arguments)` that calls the variant `make(height)` with the arguments.

    Register tiles need their height at compile time; this is where a height known only at run time meets
    them. A height that is not among `heights` falls to the last one.
    """
    *shorter, height = heights
    variant = make(height)
    if not shorter:
        return kernel(lambda rows, *arguments: variant(*arguments))
    otherwise = by_height(tuple(shorter), make)

    @kernel
    def choose(rows, *arguments):
        if rows == height:
            variant(*arguments)
        else:
            otherwise(rows, *arguments)

    return choose
