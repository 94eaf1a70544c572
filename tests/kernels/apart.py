"""Kernels that test_second_process.py has compiled apart: another process must find them in a module."""

from typing import Any

from pagellm.kernels.jit import entry_point, kernel, kernel_apart


@kernel
def _double(x):  # type: ignore[no-untyped-def]
    return 2 * x


@kernel_apart
def double_all(x: Any, out: Any) -> None:
    """`out[i] = 2 * x[i]`."""
    for i in range(x.size):
        out[i] = _double(x[i])


@kernel_apart
def sum_of(x: Any) -> Any:
    """A kernel that has a result, as none should have that is compiled apart."""
    total = x[0]
    for i in range(1, x.size):
        total += x[i]
    return total


@entry_point
def doubled(x: Any, out: Any) -> None:
    """Calls the kernel above."""
    double_all(x, out)
