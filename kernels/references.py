"""Named tuples that kernels hand on as one pointer, however many arrays they hold.

Numba hands a named tuple on as all of its numbers, an array as five and two for each dimension: what a step
is given would be some 400 arguments of each kernel and of each of its calls, and an eighth of what compiling
takes. Nobody changes the tuple as long as a reference to it is used, so its numbers are read
where they are needed and stay in registers as arguments would.
"""

from hashlib import sha256
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.core.datamodel.registry import register_default
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic

from pagellm.kernels.simd.llvm import I32


class _Reference(types.Type):
    """The type of a reference. Its fields are those of the named tuple; a named tuple in it is one, too."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields
        super().__init__(f"reference to {fields.name}")

    @property
    def mangling_args(self) -> Any:
        """A short name in machine code: a tuple's own has the types of all its fields."""
        digest = sha256(self.fields.name.encode()).hexdigest()[:16]
        return f"{self.fields.instance_class.__name__}_{digest}", ()


@register_default(_Reference)
class _ReferenceModel(PrimitiveModel):
    def __init__(self, manager: Any, reference: _Reference) -> None:
        fields = manager.lookup(reference.fields).get_value_type()
        super().__init__(manager, reference, fields.as_pointer())


@infer_getattr
class _Fields(AttributeTemplate):
    key = _Reference

    def generic_resolve(self, reference: _Reference, name: str) -> Any:  # type: ignore[override]
        if name not in reference.fields.fields:
            return None
        kind = reference.fields.types[reference.fields.fields.index(name)]
        return _Reference(kind) if isinstance(kind, types.BaseNamedTuple) else kind


@lower_getattr_generic(_Reference)
def _field(_context: Any, builder: Any, reference: _Reference, pointer: Any, name: str) -> Any:
    index = reference.fields.fields.index(name)
    place = builder.gep(pointer, [I32(0), I32(index)], inbounds=True)
    is_tuple = isinstance(reference.fields.types[index], types.BaseNamedTuple)
    return place if is_tuple else _read(builder, place)


def _read(builder: Any, place: Any) -> Any:
    """The value at a place, read number by number: LLVM keeps track of these, not of whole structures."""
    kind = place.type.pointee
    if not isinstance(kind, ir.Aggregate):
        number = builder.load(place)
        number.set_metadata("invariant.load", builder.module.add_metadata([]))
        return number
    value = ir.Constant(kind, ir.Undefined)
    for index in range(len(kind.elements)):
        part = _read(builder, builder.gep(place, [I32(0), I32(index)], inbounds=True))
        value = builder.insert_value(value, part, index)
    return value


@intrinsic
def reference_to(_typing: Any, fields: Any) -> Any:
    """A reference to a named tuple: to a copy on the stack, which lasts as long as the function that asks."""
    if not isinstance(fields, types.BaseNamedTuple):
        return None

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        copy = cgutils.alloca_once_value(builder, arguments[0])
        # What is read there later never changes, so it must not be looked for before it is written: LLVM is
        # not told that this is where the copy is.
        kind = ir.FunctionType(copy.type, [copy.type])
        return builder.asm(kind, "", "=r,0,~{memory}", [copy], side_effect=True)

    return _Reference(fields)(fields), emit
