"""The kernels' numerics under lesser code generation: what other machines than this one compute.

Each instruction set is compiled for in a process of its own, whose environment tells Numba of another
processor. A set that this processor lacks is skipped.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from llvmlite import binding

from pagellm.engine.config import usable_cores
from tests.kernels.machine_code import (  # noqa: F401  of this machine
    test_code_keeps_to_its_machine,
    test_code_makes_use_of_its_machine,
)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Everything that computes; the team of threads and this file have nothing to do with instructions.
NUMERICS = [
    str(HERE / f"test_{name}.py")
    for name in ("simd", "packing", "matmul", "attention", "norm", "rope", "activation", "sampling")
]
CODE = str(HERE / "machine_code.py")

SSE2 = "sse sse2"
AVX = f"{SSE2} sse3 ssse3 sse4.1 sse4.2 popcnt avx"
AVX2 = f"{AVX} avx2 fma f16c bmi bmi2 lzcnt movbe"
AVX512 = f"{AVX2} avx512f avx512cd avx512bw avx512dq avx512vl adx"


@dataclass(frozen=True)
class Machine:
    """A processor to compile for, and the rows and columns of a tile that suit it."""

    name: str
    cpu: str
    features: str
    group: int
    panel: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "NUMBA_CPU_NAME": self.cpu,
            "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in self.features.split()),
        }

    @property
    def lacking(self) -> str | None:
        """What this processor has not; None if it has all that is needed."""
        if not binding.get_process_triple().startswith("x86_64"):
            return "this is no x86-64 processor"
        host = binding.get_host_cpu_features()
        features = [f for f in self.features.split() if f != "neon" and not host.get(f, False)]
        return f"this processor has no {', '.join(features)}" if features else None


MACHINES = [
    Machine("unknown", "x86-64", "", 3, 16),
    Machine("baseline", "x86-64", SSE2, 3, 16),
    Machine("avx", "sandybridge", AVX, 6, 16),
    Machine("avx2", "haswell", AVX2, 6, 16),
    Machine("avx2-vnni", "haswell", f"{AVX2} avxvnni", 6, 16),
    Machine("avx512", "skylake-avx512", AVX512, 12, 32),
    # The portable forms that 64-bit Arm takes, on this processor; float16 by an instruction, as there.
    Machine("arm", "x86-64", "neon f16c", 6, 16),
]
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


def run(arguments: list[str], environment: dict[str, str]) -> str:
    """What a Python process prints that must end well."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "PYTEST_"))}
    process = subprocess.run(
        [sys.executable, *arguments], env=inherited | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, f"{process.stdout[-8000:]}\n{process.stderr[-2000:]}"
    return process.stdout


def run_tests(files: list[str], environment: dict[str, str]) -> None:
    options = ["--hypothesis-profile=quick", "-q", "-p", "no:cacheprovider"]
    run(["-m", "pytest", *options, *files], environment)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """The numerics on each machine that is asked for and can be, on all cores: most of it is compilation."""
    asked = (
        item.callspec.params["machine"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_the_numerics_hold_on.__name__
    )
    with ThreadPoolExecutor(usable_cores()) as pool:
        yield {
            machine.name: pool.submit(run_tests, [*NUMERICS, CODE], machine.environment)
            for machine in asked
            if machine.lacking is None
        }
        pool.shutdown(cancel_futures=True)


@each_machine
def test_the_numerics_hold_on(machine: Machine, runs: dict[str, Future[None]]) -> None:
    if machine.lacking is not None:
        pytest.skip(machine.lacking)
    runs[machine.name].result()


@each_machine
def test_the_sizes_of_tiles_follow_the_features_of(machine: Machine) -> None:
    program = "from pagellm.kernels.packing import GROUP, PANEL; print(GROUP, PANEL)"
    assert run(["-c", program], machine.environment).split() == [str(machine.group), str(machine.panel)]


def test_the_numerics_hold_where_numba_does_without_avx() -> None:
    """By its user's wish, or of its own accord on some processors that have it."""
    run_tests([str(HERE / "test_simd.py"), str(HERE / "test_matmul.py")], {"NUMBA_ENABLE_AVX": "0"})
