"""What is installed is one package, `pagellm`, and every way to find it finds the same."""

import subprocess
import sys
import tomllib
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
