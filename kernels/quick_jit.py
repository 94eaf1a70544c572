"""Kernels compiled with less work than Numba's own way takes.

A kernel's code is linked into its callers', to be optimised and become machine code with an entry point, and
has no wrapper for calls from Python. Numba would do all three for each kernel on its own as well, which made
compilation take 1.7 times as long; it has no option for that, so three of its classes are extended here. They
are no part of what Numba promises: `kernels.jit` tries them out, and does without them where they fail.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numba
from llvmlite.binding import Linkage, parse_bitcode
from numba import types
from numba.core.bytecode import FunctionIdentity
from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder, compile_result
from numba.core.compiler_lock import global_compiler_lock
from numba.core.funcdesc import ExternalFunctionDescriptor
from numba.core.registry import CPUDispatcher
from numba.core.sigutils import normalize_signature

from pagellm.kernels.second_process import Code, SecondProcess


class _LinkedLibrary(JITCodeLibrary):
    """Code that is there to be linked into other code, and neither optimised nor run where it is.

    Numba links what a function calls into it, and the whole into its callers, and so what is deep down once
    for each level above. Here everything is linked once, where it is asked for.
    """

    def finalize(self) -> None:
        self._finalize_dynamic_globals()
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.external:
                function.linkage = "linkonce_odr"  # several of the libraries that are linked may have it
        for library in self._linking_libraries:
            self._reload_init.update(library._reload_init)
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        if self._shared_module is None:
            self._shared_module = self._final_module.clone()
            # Callers come first: of what nobody calls yet, nothing is linked.
            for library in self._called({self}):
                is_linked = isinstance(library, _LinkedLibrary)
                module = library._final_module if is_linked else library._get_module_for_linking()
                self._shared_module.link_in(module, preserve=True)
        return self._shared_module

    def _called(self, seen: set[CPUCodeLibrary]) -> Iterator[CPUCodeLibrary]:
        """All that is called in here, directly or not, each once and behind one that calls it."""
        for library in self._linking_libraries:
            if library not in seen:
                seen.add(library)
                yield library
                if isinstance(library, _LinkedLibrary):
                    yield from library._called(seen)


class _PromisedLibrary(JITCodeLibrary):
    """Code that is there by the time when it is linked. code: gives it; its function gets this one's name."""

    code: Callable[[], Code]

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        if self._shared_module is None:
            name, bitcode = self.code()
            module = parse_bitcode(bitcode)
            module.get_function(name).name = self.name
            self._shared_module = module
        return self._shared_module


class _KernelCompiler(CompilerBase):
    """Numba's usual passes, without a result that can be called from Python."""

    def define_pipelines(self) -> list[Any]:
        state = self.state
        state.flags.no_cpython_wrapper = state.flags.no_compile = True
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return [DefaultPassBuilder.define_nopython_pipeline(state)]


class QuickKernel(CPUDispatcher):
    """A function that kernels call. If Python does, as tests do, it is compiled once more: `alone`."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        super().__init__(
            function, targetoptions={"nopython": True} | settings, pipeline_class=_KernelCompiler
        )
        self._settings = {name: value for name, value in settings.items() if name != "inline"}

    @cached_property
    def alone(self) -> Any:
        """The same function compiled by Numba's own way, for calls from Python."""
        return numba.njit(**self._settings)(self.py_func)

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


class ApartKernel(QuickKernel):
    """A kernel without a result, whose callers are compiled before it if `second` compiles it meanwhile."""

    second: SecondProcess | None = None

    def compile(self, signature: Any) -> Any:
        arguments = tuple(normalize_signature(signature)[0])
        with global_compiler_lock:
            if self.second is not None and arguments not in self.overloads:
                self.add_overload(self._promised(arguments, self.second))
        return super().compile(signature)

    def anew(self) -> QuickKernel:
        """The same kernel, of which nothing is compiled yet."""
        return QuickKernel(self.py_func, **self._settings)

    def _promised(self, arguments: tuple[Any, ...], second: SecondProcess) -> Any:
        target: Any = self.targetctx
        codegen = target.codegen()
        function, machine = self.py_func, codegen.magic_tuple()
        name = FunctionIdentity.from_function(function).unique_name  # in this process and among others
        descriptor = ExternalFunctionDescriptor(f"{function.__module__}.{name}", types.none, arguments)
        number = second.ask(function.__module__, function.__qualname__, arguments, machine)
        library = _PromisedLibrary(codegen, descriptor.mangled_name)
        library.code = lambda: second.answer(number) or code_of(self, arguments, machine)
        return compile_result(
            typing_context=self.typingctx,
            target_context=target,
            entry_point=descriptor,
            signature=types.none(*arguments),
            objectmode=False,
            fndesc=descriptor,
            library=library,
        )


def code_of(kernel: ApartKernel, arguments: tuple[Any, ...], machine: Any) -> Code:
    """Compiles a kernel for some types of arguments.

    Raises `ValueError` if this process does not compile for the machine that is meant, as Numba's
    `magic_tuple` has it, and `TypeError` if the kernel has a result.
    """
    target: Any = kernel.targetctx
    own = target.codegen().magic_tuple()
    if own != machine:
        raise ValueError(f"the machine: found {machine}, expected {own}")
    compiled = kernel.anew()
    compiled.compile(arguments)
    result: Any = compiled.overloads[arguments]
    if result.signature.return_type != types.none:
        raise TypeError(f"the result of {kernel}: found {result.signature.return_type}, expected none")
    result.library.finalize()
    return result.fndesc.mangled_name, result.library._get_module_for_linking().as_bitcode()


def try_out(**settings: Any) -> None:
    """Raises something if this Numba is not the one that is extended here: compiles a call of a kernel."""

    def double(x):
        return 2 * x

    doubled = QuickKernel(double, **settings)
    found = numba.njit(**settings)(lambda x: doubled(x) + 1)(20)
    if found != 41:
        raise RuntimeError(f"found {found} for 2 * 20 + 1")
