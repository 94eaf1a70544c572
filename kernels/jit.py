"""How every kernel is compiled: four decorators, so that no kernel differs in its settings.

`nogil`, because a team of Python threads runs the kernels side by side; no `fastmath`, because a reduction's
order must be the one that is written (batch invariance). No reference counts (`_nrt`): a count is an atomic
on a cache line that all threads share, and with them attention took 1.6 times as long; so a kernel allocates
nothing, and what it needs is given to it. An entry point is what Python calls; the whole machine code beneath
it can be cached on disk with it. Kernels are what kernels call, and a shared function is Python's as well.

Kernels are compiled by `kernels.quick_jit` where the installed Numba is one that it can extend, which is
tried out when this is imported, and else by Numba's own way: the same code, in 1.7 times the time.
"""

import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import numba
from numba.core.bytecode import FunctionIdentity
from numba.extending import register_jitable

from pagellm.kernels.second_process import SecondProcess
from pagellm.kernels.simd.llvm import CHECKED

Function = TypeVar("Function", bound=Callable[..., Any])

_SETTINGS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
    "_nrt": False,
    "boundscheck": CHECKED,
}
_entry_points: list[Any] = []

# A function's name in machine code ends with a number that Numba counts from 1 in each process. Code from the
# cache was named by another process; of two functions with one name LLVM takes the one that was there first,
# which may be the same kernel made for another height or format. So no two processes count from one number.
FunctionIdentity._unique_ids = count(secrets.randbits(60))


def _quick_kernels() -> tuple[Any, Any]:
    """`QuickKernel` and `ApartKernel`, or None, and a line on standard error, where Numba is another."""
    try:
        from pagellm.kernels.quick_jit import ApartKernel, QuickKernel, try_out

        try_out(**_SETTINGS)
        return QuickKernel, ApartKernel
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(
            f"pagellm: Numba {numba.__version__} compiles kernels its own way, which takes longer ({reason})",
            file=sys.stderr,
        )
        return None, None


_QuickKernel, _ApartKernel = _quick_kernels()


def _compiled(function: Callable[..., Any], kind: Any = _QuickKernel, **settings: Any) -> Any:
    if kind is not None:
        return kind(function, **_SETTINGS, **settings)
    dispatcher = numba.njit(**_SETTINGS, **settings)(function)
    dispatcher.alone = dispatcher
    return dispatcher


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function that other kernels call; `alone` is what Python calls."""
    return _compiled(function)


def kernel_apart(function: Callable[..., Any]) -> Any:
    """Compiles a kernel without a result, which a second process may do while this one goes on."""
    return _compiled(function, _ApartKernel)


@contextmanager
def two_processes() -> Iterator[None]:
    """Compiles with a second process from now on, where there can be one: see `kernels.second_process`."""
    second = None
    if _ApartKernel is not None:
        with suppress(OSError):
            _ApartKernel.second = second = SecondProcess()
    try:
        yield
    finally:
        if second is not None:
            _ApartKernel.second = None
            second.close()


def inlined(function: Callable[..., Any]) -> Any:
    """A kernel that is compiled as part of its caller, and so sees the call that its caller is."""
    return _compiled(function, inline="always")


def entry_point(function: Callable[..., Any]) -> Any:
    """Compiles a function that Python calls on its first call, or loads it from the cache."""
    dispatcher = numba.njit(**_SETTINGS)(function)
    _entry_points.append(dispatcher)
    return dispatcher


def cache_compiled(cache_of: Callable[[Callable[..., Any]], Any]) -> None:
    """Lets the entry points of this package find what was compiled before, and keep what is compiled.

    cache_of: gives the cache of a function, with the methods of Numba's `_Cache`.
    """
    for dispatcher in _entry_points:
        if dispatcher.py_func.__module__.startswith(f"{__package__}."):
            dispatcher._cache = cache_of(dispatcher.py_func)


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
    them. At most seven ascending heights.
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
