"""How every kernel is compiled: four decorators, so that no kernel differs in its settings.

`nogil`, because a team of Python threads runs the kernels side by side; no `fastmath`, because a reduction's
order must be the one that is written (batch invariance). No reference counts (`_nrt`): a count is an atomic
on a cache line that all threads share, and with them attention took 1.6 times as long; so a kernel allocates
nothing, and what it needs is given to it. An entry point is what Python calls; the whole machine code beneath
it can be cached on disk with it. Kernels are what kernels call, and a shared function is Python's as well.

A kernel's code is linked into its callers', to be optimised and become machine code with an entry point, and
has no wrapper for calls from Python. Numba would do all three for each kernel on its own as well, which made
compilation take 1.7 times as long; it has no option for that, so three of its classes are extended here.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.registry import CPUDispatcher
from numba.core.sigutils import normalize_signature
from numba.extending import register_jitable

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


class _LinkedLibrary(JITCodeLibrary):
    """Code that is there to be linked into other code, and neither optimised nor run where it is."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class _KernelCompiler(CompilerBase):
    """Numba's usual passes, without a result that can be called from Python."""

    def define_pipelines(self) -> list[Any]:
        state = self.state
        state.flags.no_cpython_wrapper = state.flags.no_compile = True
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return [DefaultPassBuilder.define_nopython_pipeline(state)]


class _Kernel(CPUDispatcher):
    """A function that kernels call. If Python does, as tests do, it is compiled once more: `alone`."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        super().__init__(
            function, targetoptions={"nopython": True} | _SETTINGS | settings, pipeline_class=_KernelCompiler
        )

    @cached_property
    def alone(self) -> Any:
        return numba.njit(**_SETTINGS)(self.py_func)

    def __call__(self, *arguments: Any) -> Any:
        return self.alone(*arguments)

    # Callers find what was compiled by a key, which is what Python would call, if it could.

    def add_overload(self, result: Any) -> None:
        self.overloads[tuple(result.signature.args)] = result
        result.target_context.insert_user_function(result.fndesc, result.fndesc, [result.library])

    def get_overload(self, signature: Any) -> Any:
        arguments, _ = normalize_signature(signature)
        result: Any = self.overloads[tuple(arguments)]
        return result.fndesc


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function that other kernels call."""
    return _Kernel(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A kernel that is compiled as part of its caller, and so sees the call that its caller is."""
    return _Kernel(function, inline="always")


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
