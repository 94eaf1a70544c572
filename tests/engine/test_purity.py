"""Laws 1 and 7: the scheduler and what it needs are pure state machines, and dependencies point one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATE_MACHINES = sorted((ROOT / "engine" / "scheduling").rglob("*.py"))
IMPURE = {
    *("asyncio", "concurrent", "datetime", "io", "multiprocessing", "os", "pathlib", "queue", "random"),
    *("secrets", "socket", "subprocess", "sys", "threading", "time", "uuid"),
    *("llvmlite", "numba", "numpy"),
}
IMPURE_BUILTINS = {"__import__", "eval", "exec", "id", "input", "open", "print"}


def imports(path: Path) -> Iterator[str]:
    """The absolute name of every module that a file imports, at its top or inside, or loads by its name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args:
                yield from (str(n.value) for n in ast.walk(argument) if isinstance(n, ast.Constant))


def packages_of(path: Path) -> set[str]:
    """The top-level packages that a file imports, ours by the names of their folders."""
    return {name.removeprefix("pagellm.").partition(".")[0] for name in imports(path)}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", STATE_MACHINES, ids=name_of)
def test_a_state_machine_imports_no_clock_thread_io_chance_or_arrays(path: Path) -> None:
    assert packages_of(path) & IMPURE == set()


@pytest.mark.parametrize("path", STATE_MACHINES, ids=name_of)
def test_a_state_machine_reads_nothing_but_its_arguments(path: Path) -> None:
    names = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
    assert names & IMPURE_BUILTINS == set()


@pytest.mark.parametrize("path", STATE_MACHINES, ids=name_of)
def test_nothing_asks_whether_it_is_simulated(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert [name for name in names if "simulat" in name.lower()] == []


@pytest.mark.parametrize("path", files_of("kernels"), ids=name_of)
def test_kernels_know_neither_the_engine_nor_the_simulator(path: Path) -> None:
    assert packages_of(path) & {"engine", "sim"} == set()


@pytest.mark.parametrize("path", files_of("engine"), ids=name_of)
def test_the_engine_does_not_know_the_simulator(path: Path) -> None:
    assert "sim" not in packages_of(path)


def test_the_scheduler_can_be_imported_without_numpy_and_numba() -> None:
    program = (
        "import sys, pagellm.engine.scheduling.scheduler\n"
        "print(*sorted({'numpy', 'numba', 'llvmlite', 'pagellm.kernels', 'pagellm.sim'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
