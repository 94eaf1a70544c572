"""Numbas other than the one that is known: kernels are compiled another way, or one clear error says why not.

Numba is changed in a process of its own, before the kernels are imported.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llvmlite import ir
from numba.core.errors import LoweringError

from pagellm.kernels.simd.calls import _require_convention
from pagellm.kernels.simd.llvm import I64

ROOT = Path(__file__).parents[2]
PROGRAM = """
{change}
import numpy as np
from pagellm.kernels import jit
from pagellm.kernels.threads import ThreadTeam, barrier, new_counters, share_call

@jit.kernel
def double(x):
    return 2 * x

@jit.entry_point
def doubled(thread, mailbox, counters, out):
    num_threads = share_call(thread, mailbox)
    out[thread] = double(thread + 1)
    barrier(counters, num_threads)

out = np.zeros(3, np.int64)
ThreadTeam(3).run(doubled, new_counters(), out)
print(jit._QuickKernel is not None, double(5), *out)
"""
CHANGES = {
    "a class is gone": "import numba.core.codegen as c; del c.JITCodeLibrary",
    "a library needs more": """
import numba.core.codegen as c
class Other(c.JITCodeLibrary):
    def __init__(self, codegen, name, kind):
        super().__init__(codegen, name)
c.JITCodeLibrary = Other
""",
    "another constructor": """
import numba.core.registry as r
class Other(r.CPUDispatcher):
    def __init__(self, function):
        super().__init__(function)
r.CPUDispatcher = Other
""",
    "callers look another way": """
import numba.core.dispatcher as d
def get_call_template(self, args, kws):
    raise KeyError(args)
d.Dispatcher._original, old = d.Dispatcher.get_call_template, d.Dispatcher.get_call_template
d.Dispatcher.get_call_template = lambda self, args, kws: (
    get_call_template(self, args, kws) if type(self).__name__ == "QuickKernel" else old(self, args, kws)
)
""",
}


def run(change: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(change=change)],
        env=os.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_known_numba_compiles_quickly() -> None:
    done = run("")
    assert (done.stdout, done.stderr) == ("True 10 2 4 6\n", "")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_numba_compiles_its_own_way_with_one_line_of_notice(change: str) -> None:
    done = run(change)
    assert done.stdout == "False 10 2 4 6\n", done.stderr
    [notice] = done.stderr.splitlines()
    assert notice.startswith("pagellm: Numba ")
    assert "compiles kernels its own way, which takes longer" in notice


def function_of(*names: str) -> Any:
    """An LLVM function with arguments of these names, in this order: pointers where a dot comes first."""
    kinds = [I64.as_pointer() if name.startswith(".") else I64 for name in names]
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), kinds), "entry")
    for argument, name in zip(function.args, names, strict=True):
        argument.name = name
    return function


def context_of(first: int) -> Any:
    """A target context whose calls have their arguments from the LLVM argument `first` on."""
    return SimpleNamespace(call_conv=SimpleNamespace(get_arguments=lambda function: function.args[first:]))


def test_the_order_of_arguments_that_a_team_relies_on_is_proved_when_a_call_is_compiled() -> None:
    _require_convention(context_of(2), function_of(".ret", ".excinfo", "arg.thread", "arg.mailbox.0"))


@pytest.mark.parametrize(
    ("first", "names"),
    [
        (2, (".ret", ".excinfo", "arg.mailbox.0", "arg.thread")),
        (3, (".ret", ".excinfo", ".env", "arg.thread")),
        (1, (".ret", "arg.thread", "arg.mailbox.0", "x")),
        (2, ("ret", ".excinfo", "arg.thread", "x")),
        (2, (".ret", ".excinfo", ".thread", "x")),
    ],
)
def test_another_order_of_arguments_is_refused(first: int, names: tuple[str, ...]) -> None:
    with pytest.raises(LoweringError, match=r"passes arguments as \[.*expected two pointers and arg\.thread"):
        _require_convention(context_of(first), function_of(*names))


NAMED = """
from pagellm.kernels import jit
from numba.core.bytecode import FunctionIdentity

print(FunctionIdentity.from_function(jit.plain).unique_id)
"""


def test_no_two_processes_give_their_functions_the_same_names_in_machine_code() -> None:
    """Code from the cache would be mixed with code that was compiled here."""
    runs = [
        subprocess.run([sys.executable, "-c", NAMED], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (int(run.stdout) for run in runs)
    assert abs(first - second) > 1_000_000
