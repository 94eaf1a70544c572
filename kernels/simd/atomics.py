"""Counters that threads share, and how a thread waits."""

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pagellm.kernels.simd.llvm import BYTE_POINTER, I32, element_pointer


def _counter_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return element_pointer(context, builder, signature.args[0], *arguments[:2], count=1)


@intrinsic
def atomic_add(_typing: Any, counters: Any, index: Any, amount: Any) -> Any:
    """Adds to an int64 counter that threads share; returns what it held before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), emit


@intrinsic
def atomic_load(_typing: Any, counters: Any, index: Any) -> Any:
    """Reads an int64 counter; what other threads wrote before they stored to it is visible after."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        return builder.load_atomic(pointer, "seq_cst", align=8)

    return types.int64(counters, types.intp), emit


@intrinsic
def atomic_store(_typing: Any, counters: Any, index: Any, value: Any) -> Any:
    """Writes an int64 counter after everything that this thread wrote before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], pointer, "release", align=8)
        return context.get_dummy_value()

    return types.void(counters, types.intp, types.int64), emit


@intrinsic
def atomic_exchange(_typing: Any, counters: Any, index: Any, value: Any) -> Any:
    """Writes an int64 counter that threads share; returns what it held before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("xchg", pointer, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), emit


@intrinsic
def yield_thread(_typing: Any) -> Any:
    """Offers the processor to another thread: what a spinning thread does when its wait gets long."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), emit


def _call_lock(name: str, builder: Any, address: Any, *arguments: Any) -> None:
    lock = builder.inttoptr(address, BYTE_POINTER)
    kind = ir.FunctionType(I32, [BYTE_POINTER, *(a.type for a in arguments)])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [lock, *arguments])


@intrinsic
def acquire_lock(_typing: Any, address: Any) -> Any:
    """Sleeps until one of Python's own thread locks, at an address, is free, and takes it."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _call_lock("PyThread_acquire_lock", builder, arguments[0], I32(1))
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def release_lock(_typing: Any, address: Any) -> Any:
    """Frees one of Python's own thread locks, whoever took it."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _call_lock("PyThread_release_lock", builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit
