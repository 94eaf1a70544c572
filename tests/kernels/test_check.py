"""`PAGELLM_CHECK=1`: an access outside its array ends the process with its numbers, and a right one does not.

Each case runs in a process of its own, because a wrong one does not come back.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import numpy as np
from pagellm.kernels import simd
from pagellm.kernels.jit import kernel

@kernel
def access(x, counters, index):
    {statement}

access(np.zeros(64, np.float32), np.zeros(4, np.int64), {index})
print("came back")
"""
TILE = "simd.start_tile(2, 1, x, 0)"
UPDATE = f"simd.write_tile(simd.outer_product({TILE}, 2, x, {{x}}, 9, x, {{w}}), 2, x, 0, 16, True)"


def run(statement: str, index: int, check: str = "1", then: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement, index=index) + then],
        env=os.environ | {"PAGELLM_CHECK": check},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("statement", "last", "elements"),
    [
        ("simd.store(x, index, simd.broadcast(np.float32(1)))", 48, 16),
        ("simd.store_bfloat16(x, index, simd.load(x, 0))", 56, 8),
        ("simd.store_int8(x, index, simd.load(x, 0))", 60, 4),
        ("simd.store(x, 0, simd.load_bfloat16(x, index))", 56, 8),
        ("simd.write_tile(simd.start_tile(2, 1, x, 0), 2, x, index, 20, False)", 28, 36),
        ("simd.write_tile(simd.start_tile(1, 2, x, index), 1, x, 0, 0, False)", 32, 32),
        (UPDATE.format(x="index", w="0"), 54, 10),
        (UPDATE.format(x="0", w="index"), 48, 16),
        ("simd.atomic_add(counters, index, 1)", 3, 1),
        ("x[index] = 1", 63, 1),
    ],
)  # fmt: skip
def test_an_access_outside_its_array_aborts_with_its_numbers(
    statement: str, last: int, elements: int
) -> None:
    size = 4 if "counters" in statement else 64
    right = run(statement, last)
    assert (right.returncode, right.stdout) == (0, "came back\n"), right.stderr
    wrong = run(statement, last + 1)
    assert wrong.returncode != 0
    assert wrong.stdout == ""
    numbers = f"elements {last + 1} to {last + elements} of an array of {size}"
    assert wrong.stderr.startswith(f"pagellm: {numbers}, in __main__.access\n")


@pytest.mark.parametrize("index", [-1, -(2**40)])
def test_a_vector_before_its_array_aborts(index: int) -> None:
    wrong = run("simd.store(x, index, simd.load(x, 0))", index)
    assert wrong.stderr.startswith(f"pagellm: elements {index} to {index + 15} of an array of 64")


def test_prefetching_asks_for_anything() -> None:
    assert run("simd.prefetch(x, index)", 10**6).stdout == "came back\n"


def test_without_the_flag_nothing_is_checked() -> None:
    """The code has no call that ends the process."""
    for check in ("0", "", "1"):
        copy = "simd.store(x, index, simd.load(x, 0))"
        assembly = run(copy, 0, check, "print(*access.alone.inspect_asm().values())").stdout
        assert "vmov" in assembly or "mov" in assembly
        assert ("abort" in assembly) == (check == "1")
