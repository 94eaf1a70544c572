"""Files that are written at the end of long work, whole or not at all; whether they can be is told first."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pagellm.engine import checks
from pagellm.engine.errors import PagellmError


def check_writable(name: str, path: str | os.PathLike[str], error: type[PagellmError]) -> None:
    """Raises an error if a file could not be written there; leaves nothing behind. name: what it would be."""
    path = checks.path(name, path, error)
    try:
        if path.is_dir():
            raise error(f"{path}: found a directory, expected a file to write")
        if path.exists() and not path.is_file():
            return
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as bad:
        raise error(f"{path}: cannot be written: {bad.strerror or bad}") from bad


def write_whole(name: str, path: str | os.PathLike[str], text: str, error: type[PagellmError]) -> None:
    """Writes a text; a pipe or device is written as it is, and a link stays one."""
    path = checks.path(name, path, error)
    # A name in a text may hold half of a surrogate pair, which UTF-8 has no bytes for.
    content = text.encode(errors="xmlcharrefreplace")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _replace(path.resolve(), content)
    except OSError as bad:
        raise error(f"{path}: cannot be written: {bad.strerror or bad}") from bad


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise
