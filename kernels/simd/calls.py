"""A call that other threads make again: its code and its arguments as two addresses."""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import LoweringError
from numba.extending import intrinsic

from pagellm.kernels.simd.llvm import I32, I64

_CALL = ir.FunctionType(ir.VoidType(), [I64, I64])  # the first argument, the address of the others


@intrinsic
def this_call(_typing: Any) -> Any:
    """The call under way of the function that this is written in: two addresses for `call_again`.

    They are those of the code and of a copy of the arguments on the stack, which lasts as long as the call.
    """

    def emit(context: Any, builder: Any, signature: Any, _arguments: Any) -> Any:
        function = builder.function
        _require_convention(context, function)
        result, error, _, *arguments = function.args
        copy = cgutils.alloca_once(builder, ir.LiteralStructType([a.type for a in arguments]))
        for i, argument in enumerate(arguments):
            builder.store(argument, builder.gep(copy, [I32(0), I32(i)]))
        again = ir.Function(builder.module, _CALL, builder.module.get_unique_name("call_again"))
        again.linkage = "internal"
        again.attributes.add("noinline")
        body = ir.IRBuilder(again.append_basic_block())
        copied = body.inttoptr(again.args[1], copy.type)
        values = [body.load(body.gep(copied, [I32(0), I32(i)])) for i in range(len(arguments))]
        own = [body.alloca(pointer.type.pointee) for pointer in (result, error)]
        body.call(function, [*own, again.args[0], *values])
        body.ret_void()
        addresses = [builder.ptrtoint(pointer, I64) for pointer in (again, copy)]
        return context.make_tuple(builder, signature.return_type, addresses)

    return types.UniTuple(types.int64, 2)(), emit


def _require_convention(context: Any, function: Any) -> None:
    """Raises `LoweringError` unless an entry point's code takes its arguments in the order known here.

    That is where the result and an error go, then the arguments, of which `thread` is the first; `call_again`
    puts another number in its place.
    """
    arguments = list(context.call_conv.get_arguments(function))
    where = list(function.args[: len(function.args) - len(arguments)])
    if (
        len(where) == 2
        and all(isinstance(pointer.type, ir.PointerType) for pointer in where)
        and [a.name for a in arguments] == [a.name for a in function.args[2:]]
        and (arguments[0].type, arguments[0].name) == (I64, "arg.thread")
    ):
        return
    raise LoweringError(
        f"Numba {numba.__version__} passes arguments as {[a.name for a in function.args][:4]}, expected two "
        "pointers and arg.thread: a team of threads cannot share such a call"
    )


@intrinsic
def call_again(_typing: Any, code: Any, arguments: Any, first: Any) -> Any:
    """Makes the same call as `this_call` with another int64 as the first argument."""

    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        function = builder.inttoptr(values[0], _CALL.as_pointer())
        builder.call(function, [values[2], values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit
