"""The few LLVM operations that every kernel is built from; nothing else in the project emits LLVM IR.

`llvm` has the types and the addresses, `vectors` what is done by lane, `tiles` and `byte_tiles` the register
tiles of floats and of short integers, `planes` how levels of few bits become bytes, `atomics` what threads
share, `calls` how they make one call together.

A vector has `LANES` lanes of 32 bits on every machine; LLVM splits it into as many registers as the host's
instruction set needs, so the same kernels run on AVX-512, AVX2, plain x86-64 and 64-bit Arm. Lane arithmetic
is written with the ordinary operators (`a * b + c` rounds twice, `fma(a, b, c)` once where the machine can).
The dot products of short types use the host's own instruction where it has one and a portable form with the
same exact integers elsewhere.

Arrays are float32 throughout: a "word" is one of their elements, which may hold a float, two bfloat16, four
int8, eight int4 or an int32.
"""

from pagellm.kernels.simd.atomics import (
    acquire_lock,
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
    release_lock,
    yield_thread,
)
from pagellm.kernels.simd.byte_tiles import (
    INT4_PAIRS,
    INT8_OFFSET,
    add_scaled,
    add_scaled_float16,
    dot_int4,
    dot_int8,
    int4_sums,
    start_int_tile,
    zero_int_tile,
)
from pagellm.kernels.simd.calls import call_again, this_call
from pagellm.kernels.simd.float_levels import e4m3_intrinsics, float_table_intrinsics, int8_intrinsics
from pagellm.kernels.simd.llvm import LANES, REGISTERS_PER_VECTOR, host_has
from pagellm.kernels.simd.planes import (
    dot_levels,
    dot_nibbles,
    expand_levels,
    expand_nibbles,
    load_float16,
    load_high_nibbles,
    load_int8,
    load_low_nibbles,
    load_powers,
    table_intrinsics,
)
from pagellm.kernels.simd.tiles import (
    PAIR_WORDS,
    dot_bfloat16,
    load_tile,
    outer_product,
    outer_product_bfloat16,
    outer_product_float16,
    start_tile,
    transposed,
    write_tile,
)
from pagellm.kernels.simd.vectors import (
    absolute,
    broadcast,
    exp,
    first_lane,
    fma,
    load,
    load_bfloat16,
    load_int32,
    maximum,
    nearest,
    prefetch,
    reduce_add,
    reduce_max,
    store,
    store_bfloat16,
    store_int8,
    store_int32,
    store_within,
    vector,
    where_at_least,
)

__all__ = [
    "INT4_PAIRS",
    "INT8_OFFSET",
    "LANES",
    "PAIR_WORDS",
    "REGISTERS_PER_VECTOR",
    "absolute",
    "acquire_lock",
    "add_scaled",
    "add_scaled_float16",
    "atomic_add",
    "atomic_exchange",
    "atomic_load",
    "atomic_store",
    "broadcast",
    "call_again",
    "dot_bfloat16",
    "dot_int4",
    "dot_int8",
    "dot_levels",
    "dot_nibbles",
    "e4m3_intrinsics",
    "exp",
    "expand_levels",
    "expand_nibbles",
    "first_lane",
    "float_table_intrinsics",
    "fma",
    "host_has",
    "int4_sums",
    "int8_intrinsics",
    "load",
    "load_bfloat16",
    "load_float16",
    "load_high_nibbles",
    "load_int8",
    "load_int32",
    "load_low_nibbles",
    "load_powers",
    "load_tile",
    "maximum",
    "nearest",
    "outer_product",
    "outer_product_bfloat16",
    "outer_product_float16",
    "prefetch",
    "reduce_add",
    "reduce_max",
    "release_lock",
    "start_int_tile",
    "start_tile",
    "store",
    "store_bfloat16",
    "store_int8",
    "store_int32",
    "store_within",
    "table_intrinsics",
    "this_call",
    "transposed",
    "vector",
    "where_at_least",
    "write_tile",
    "yield_thread",
    "zero_int_tile",
]
