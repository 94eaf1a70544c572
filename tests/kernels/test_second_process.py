"""Two processes compile what one does alone: the same code, whatever becomes of the second one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from pagellm.kernels import jit
from pagellm.kernels.quick_jit import ApartKernel, code_of
from pagellm.kernels.second_process import SecondProcess
from tests.kernels import apart

ROOT = Path(__file__).parents[2]
VECTOR = types.Array(types.int64, 1, "C")


@pytest.fixture
def second() -> Iterator[SecondProcess]:
    """The second process of a compilation that is under way."""
    with jit.two_processes():
        assert ApartKernel.second is not None
        yield ApartKernel.second


def doubles() -> tuple[list[float], list[int]]:
    """What the entry point gives, compiled anew: of floats, and then of integers."""
    kernel = ApartKernel(apart.double_all.py_func, **apart.double_all._settings)

    @numba.njit(nogil=True, _nrt=False, no_cfunc_wrapper=True)
    def doubled(x: Any, out: Any) -> None:
        kernel(x, out)

    floats, ints = np.zeros(3), np.zeros(2, np.int64)
    doubled(np.array([0.5, 2.0, -1.0]), floats)
    doubled(np.array([21, 4]), ints)
    return floats.tolist(), ints.tolist()


RIGHT = ([1.0, 4.0, -2.0], [42, 8])


def test_the_second_process_compiles_what_it_is_asked_for(second: SecondProcess) -> None:
    assert doubles() == RIGHT
    answers = [second.answer(number) for number in range(2)]
    assert all(answer is not None and answer[1].startswith(b"BC") for answer in answers)


def test_its_code_is_that_of_one_process() -> None:
    """Its instructions are, that is: functions have other names in each process."""
    programs = [
        subprocess.run(
            [sys.executable, "-c", INSTRUCTIONS.format(compilers=compilers)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for compilers in ("jit.two_processes()", "nullcontext()")
    ]
    assert programs[0] == programs[1]
    assert programs[0].count("\n") > 10


INSTRUCTIONS = """
from contextlib import nullcontext
import numpy as np
from pagellm.kernels import jit
from pagellm.kernels.quick_jit import ApartKernel
from tests.kernels.apart import doubled

with {compilers}:
    doubled(np.ones(3), np.ones(3))
    if ApartKernel.second is not None:
        assert ApartKernel.second.answer(0) is not None
[code] = doubled.inspect_asm().values()
for line in code.splitlines():
    if line.startswith("\\t") and not line.startswith("\\t.") and "$" not in line and "_Z" not in line:
        print(line.strip())
"""


def test_without_a_second_process_this_one_compiles_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/an-application")
    with jit.two_processes():
        assert ApartKernel.second is None
        assert doubles() == RIGHT


def test_a_second_process_that_ends_is_done_without(second: SecondProcess) -> None:
    second._process.kill()
    second._process.wait()
    assert doubles() == RIGHT
    assert second.answer(0) is None


def test_one_for_another_machine_gives_no_code(
    second: SecondProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = second.ask
    monkeypatch.setattr(
        second, "ask", lambda module, kernel, arguments, machine: ask(module, kernel, arguments, "other")
    )
    assert doubles() == RIGHT
    assert [second.answer(number) for number in range(2)] == [None, None]


def test_code_for_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="the machine: found other"):
        code_of(apart.double_all, (VECTOR, VECTOR), "other")


def test_a_kernel_with_a_result_is_refused() -> None:
    machine = apart.sum_of.targetctx.codegen().magic_tuple()
    with pytest.raises(TypeError, match=r"the result of .*: found int64, expected none"):
        code_of(apart.sum_of, (VECTOR,), machine)


def test_no_second_process_is_left_behind(second: SecondProcess) -> None:
    process, number = second._process, second.ask("a module", "kernel", (VECTOR,), "machine")
    second.close()
    assert process.returncode is not None
    assert second.answer(number) is None


PARENT = """
import time
from pagellm.kernels.second_process import SecondProcess
print(SecondProcess()._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_the_second_process_ends_when_the_first_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        second = int(first.stdout.readline())
        os.kill(first.pid, signal.SIGKILL)
    for _ in range(600):
        try:
            os.kill(second, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{second}/stat").exists() and " Z " in Path(f"/proc/{second}/stat").read_text():
            return  # ended, and nobody has asked how
        time.sleep(0.1)
    pytest.fail("it is there after a minute")
