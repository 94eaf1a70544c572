"""Work that is done piece by piece; files and directories that have their names when they are whole."""

import io
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.errors import CheckpointError, ConfigError, named
from pagellm.kernels.quantizers import UnscalableError, quantize

# Of what a thread works on, in float32: it stays in the processor's cache, with a few times as much besides.
PIECE_BYTES = 1 << 18


def quantized(
    where: str,
    dtype: str,
    rows: NDArray[np.float32],
    first: int,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Rows of a tensor from `first` on, in a type; where: the tensor.

    Raises `CheckpointError` for what the type cannot hold.
    """
    try:
        return quantize(dtype, rows, importance)
    except UnscalableError as error:
        raise CheckpointError(
            f"{where}: found values that are {error} in rows {first} to {first + len(rows) - 1}, "
            f"expected such as {dtype} holds"
        ) from None


def in_turn(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], int]], ahead: int) -> Iterator[int]:
    """What jobs give, in their order; no more than `ahead` of them wait."""
    under_way: deque[Future[int]] = deque()
    for job in jobs:
        under_way.append(pool.submit(job))
        if len(under_way) > ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


@contextmanager
def whole_file(path: Path, force: bool = False) -> Iterator[tuple[io.FileIO, Path]]:
    """A new file, and where it lies until it is whole; then it is at `path`, and if that fails nowhere.

    force: whether a file that is there is replaced. Raises `ConfigError` if it is not to be, and for a place
    where nothing can be written, or where there is no more room.
    """
    with _unfinished(path, force) as temporary:
        with temporary.open("x+b", buffering=0) as file:
            yield file, temporary
            os.fsync(file.fileno())
        check_free(path, force)
        temporary.replace(path)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """The same for a new directory, in the place of nothing or of an empty one."""
    with _unfinished(path, False) as temporary:
        temporary.mkdir()
        yield temporary
        check_free(path, False)
        temporary.replace(path)


@contextmanager
def _unfinished(path: Path, force: bool) -> Iterator[Path]:
    check_free(path, force)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)


def check_free(path: Path, force: bool = False) -> None:
    """Raises `ConfigError` if there is something that is not to be replaced: an empty directory may be."""
    try:
        is_there, is_file = os.path.lexists(path), path.is_file()
        is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named(str(path))}: cannot be written: {error}") from None
    if path.name in ("", ".."):  # what is there would be gone from under whoever stands in it
        raise ConfigError(f"{path}: found no name of its own, expected a name that is free")
    if is_there and not is_file and not is_empty:
        raise ConfigError(f"{path}: found something that is no plain file, expected a name that is free")
    if is_file and not force:
        raise ConfigError(f"{path}: found a file, expected a name that is free, or --force to replace it")
