"""What is installed is one package, `pagellm`, and every way to find it finds the same."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_folder_of_code_is_installed_beneath_one_name() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [ROOT / "pagellm", *(ROOT / name for name in ("engine", "kernels", "sim"))]
    files = [file for folder in folders for file in folder.glob("**/*.py")]
    names = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    expected = {name if name == "pagellm" else f"pagellm.{name}" for name in names}
    assert sorted(listed) == sorted(expected)


def test_the_readmes_map_names_every_file_of_code_and_no_other() -> None:
    table = (ROOT / "README.md").read_text("utf-8").partition("| file | what it is |")[2].partition("\n\n")[0]
    named: set[Path] = set()
    for row in table.splitlines()[2:]:
        first, *others = re.findall("`([^`]+)`", row.split("|")[1])
        named |= {ROOT / first, *((ROOT / first).parent / name for name in others)}
    assert [path for path in named if not path.exists()] == []
    files = {file for top in ("pagellm", "engine", "kernels", "sim") for file in (ROOT / top).rglob("*.py")}
    files -= {ROOT / top / "__init__.py" for top in ("engine", "kernels", "sim")}
    assert {file for file in files if not named & {file, *file.parents}} == set()


@pytest.mark.parametrize("name", ["engine", "kernels", "sim"])
def test_an_old_import_says_what_the_name_is_now(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}.anything"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {name}: import it as pagellm.{name}"


def test_a_bare_checkout_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pagellm", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("generate", "chat", "bench", "warmup"))
    assert all(command in done.stdout for command in ("replay", "calibrate", "sweep", "trace"))


def test_the_package_imports_nothing_before_it_is_used() -> None:
    program = "import sys; before = set(sys.modules); import pagellm; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "pagellm\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a copy of the sources is built into, by the setuptools that are installed."""
    versions = {package.name: package.version for package in metadata.distributions()}
    if "pip" not in versions or int(versions.get("setuptools", "0").partition(".")[0]) < 71:
        pytest.skip("needs pip, and setuptools 71 or later, which needs nothing else to build a wheel")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pagellm", "engine", "kernels", "sim"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", "-w", output, source], check=True, timeout=300)
    [path] = output.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, as an installer unpacks it."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def _python(installed: Path, *arguments: str) -> str:
    """What Python prints where the wheel is found before all else, and the repository is not."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_installs_one_package_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        top_level = archive.read(next(name for name in names if name.endswith("top_level.txt"))).decode()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pagellm"}
    assert top_level.split() == ["pagellm"]
    assert set(_sources()) <= names, sorted(set(_sources()) - names)
    assert "pagellm/py.typed" in names


def _sources() -> Iterator[str]:
    """Every file of the packages, as it is named beneath the one that is installed."""
    for file in (ROOT / "pagellm").glob("*.py"):
        yield f"pagellm/{file.name}"
    for folder in ("engine", "kernels", "sim"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield f"pagellm/{file.relative_to(ROOT).as_posix()}"


@pytest.mark.parametrize("name", ["engine", "kernels", "sim"])
def test_an_installed_wheel_leaves_others_names_alone(installed: Path, name: str) -> None:
    (installed / f"{name}.py").write_text("whose = 'another project'")
    program = f"import {name}, pagellm.{name}; print({name}.whose, pagellm.{name}.__file__)"
    file = installed / "pagellm" / name / "__init__.py"
    assert _python(installed, "-c", program) == f"another project {file}\n"
    (installed / f"{name}.py").unlink()


def test_an_installed_wheel_has_every_command_and_its_data(installed: Path) -> None:
    from pagellm import __version__

    assert _python(installed, "-m", "pagellm", "--version") == f"pagellm {__version__}\n"
    commands = _python(installed, "-m", "pagellm", "--help")
    assert all(name in commands for name in ("generate", "chat", "bench", "warmup"))
    assert all(name in commands for name in ("replay", "calibrate", "sweep", "trace"))
    trace, page = str(ROOT / "examples/traces/azure_2023_conversation.csv"), installed.parent / "page.html"
    options = ["--limit", "9", "--roofline", "l4,smollm2-135m", "--report", str(page)]
    assert "requests      9: 9 finished" in _python(installed, "-m", "pagellm", "replay", trace, *options)
    assert page.stat().st_size > 10_000
    program = "import pagellm.engine, pagellm; print(pagellm.LLM.__module__, pagellm.__file__)"
    assert _python(installed, "-c", program) == (
        f"pagellm.engine.llm {installed / 'pagellm' / '__init__.py'}\n"
    )
