"""Compiled kernels on disk: what is damaged is compiled again, and what cannot be kept is compiled anyhow."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from pagellm.engine.execution import compilation
from pagellm.engine.execution.compilation import compile_kernels
from pagellm.engine.execution.kernel_cache import KernelStore

ROOT = Path(__file__).parents[2]


def double(x: Any) -> Any:
    return x + x


def square(x: Any) -> Any:
    return x * x


def compiled(store: KernelStore, function: Callable[[Any], Any] = double) -> Any:
    """A function as a new process has it: compiled or loaded when it is called."""
    dispatcher = numba.njit(function)
    dispatcher._cache = store.cache_of(function)
    return dispatcher


def is_loaded(dispatcher: Any) -> bool:
    """Whether the one signature that was called came from the cache."""
    [hits], misses = dispatcher.stats.cache_hits.values() or [0], dispatcher.stats.cache_misses
    assert hits + sum(misses.values()) == 1
    return bool(hits)


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    store = KernelStore(tmp_path)
    assert compiled(store)(3) == 6
    assert compiled(store, square)(3) == 9
    return store


def test_what_was_compiled_is_loaded(store: KernelStore) -> None:
    again = compiled(store)
    assert (again(4), is_loaded(again)) == (8, True)
    other = compiled(store)
    assert (other(0.5), is_loaded(other)) == (1.0, False)  # another signature
    assert sorted(path.suffix for path in store.directory.iterdir()) == [".kernel"] * 3
    assert store.is_complete


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:32],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"nonsense" * 1000,
        lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_what_is_damaged_is_said_and_compiled_again(
    store: KernelStore, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in store.directory.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    healing = KernelStore(store.directory)
    for function, result in ((double, 8), (square, 16)):
        again = compiled(healing, function)
        assert (again(4), is_loaded(again)) == (result, False)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pagellm: {store.directory}")
    assert line.endswith(": a damaged file; it and others like it are compiled again")
    healed = compiled(KernelStore(store.directory))
    assert (healed(4), is_loaded(healed), capsys.readouterr().err) == (8, True, "")


def test_files_that_were_exchanged_are_compiled_again(store: KernelStore) -> None:
    first, second = store.directory.iterdir()
    first.rename(store.directory / "third")
    second.rename(first)
    (store.directory / "third").rename(second)
    again = compiled(store)
    assert (again(4), is_loaded(again)) == (8, False)


def test_a_whole_file_that_cannot_be_loaded_is_compiled_again(store: KernelStore) -> None:
    cache = store.cache_of(double)
    target = numba.njit(double).targetctx
    signature = numba.typeof(3)
    name, identity = cache._place((signature,), target.codegen())
    assert (store.directory / name).exists()
    for payload in (b"no pickle", b"\x80\x04N."):
        store.write(name, identity, payload)
        again = compiled(store)
        assert (again(4), is_loaded(again)) == (8, False)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_cannot_be_kept_is_said_and_used(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", fail)
    store = KernelStore(tmp_path)
    assert (compiled(store)(3), compiled(store, square)(3)) == (6, 9)
    assert capsys.readouterr().err == (
        f"pagellm: compiled kernels cannot be kept in {tmp_path}: {os.strerror(code)}; they are compiled for "
        "this process alone (PAGELLM_CACHE names another directory)\n"
    )
    assert not store.is_complete
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled(KernelStore(tmp_path))(3)
    assert list(tmp_path.iterdir()) == []


def test_something_else_in_the_place_of_a_file(
    store: KernelStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list(store.directory.iterdir()):
        path.unlink()
        path.mkdir() if "double" in path.name else os.mkfifo(path)
    again = compiled(store)
    assert (again(4), is_loaded(again), store.is_complete) == (8, False, False)
    assert "Is a directory" in capsys.readouterr().err
    again = compiled(store, square)
    assert (again(4), is_loaded(again)) == (16, False)


def test_compilation_leaves_the_garbage_collector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    during = []

    def fail() -> None:
        during.append(gc.get_threshold())
        raise KeyboardInterrupt

    monkeypatch.setattr(compilation, "_ready", False)
    monkeypatch.setattr(compilation, "_run_tiny_model", fail)
    before = gc.get_threshold()
    with pytest.raises(KeyboardInterrupt):
        compile_kernels(show=False)
    assert gc.get_threshold() == before != during[0]


# The whole cache, in processes of their own


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A user's cache that holds every kernel; in it, the directory that does."""
    source = compile_kernels(show=False)
    assert source is not None
    shutil.copytree(source, tmp_path / "kernels" / source.name)
    return tmp_path / "kernels" / source.name


def warmup(cache: Path) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "pagellm", "warmup", "--json"],
        cwd=ROOT,
        env=os.environ | {"PAGELLM_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout), done.stderr


def test_a_cache_that_cannot_be_written_is_used_if_it_is_complete(kept: Path, tmp_path: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in kept.iterdir()}
    for path in (kept, kept.parent, tmp_path):
        path.chmod(0o555)
    try:
        document, error = warmup(tmp_path)
    finally:
        for path in (kept, kept.parent, tmp_path):
            path.chmod(0o755)
    assert (document["directory"], error) == (str(kept), "")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in kept.iterdir()} == before


def test_a_damaged_cache_heals(kept: Path, tmp_path: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in kept.iterdir()}
    smallest = min(kept.iterdir(), key=lambda path: path.stat().st_size)
    smallest.write_bytes(b"")
    document, error = warmup(tmp_path)
    assert document["directory"] == str(kept)
    assert error == f"pagellm: {smallest}: a damaged file; it and others like it are compiled again\n"
    assert warmup(tmp_path)[1] == ""
    assert {path.name for path in kept.iterdir()} == sizes.keys()
