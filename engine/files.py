"""Files that come from outside: opened only if they are plain files, and read only up to a bound.

A FIFO would keep the reader waiting for ever and a device may have no end.
"""

import errno
import io
import os
import stat
from pathlib import Path

# More than any configuration, index or tokenizer that is published.
MAX_TEXT_BYTES = 64 << 20


def open_plain(path: Path) -> io.FileIO:
    """The file, open for reading without a buffer. Raises `OSError` if it cannot be, or is no plain file."""
    # Without O_NONBLOCK, opening a FIFO waits for a writer; a plain file does not care.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError:  # a NUL, or characters that no file name can have
        raise OSError(errno.EINVAL, "no possible name of a file") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no plain file")
        return io.FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """All of a file. Raises `OSError` as `open_plain` does, and if the file is longer than `max_bytes`."""
    with io.BufferedReader(open_plain(path)) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes")
    return content


def read_plain_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """All of a UTF-8 text without the byte order mark that it may begin with, every end of a line a newline.

    Raises `OSError` as `read_plain` does, and `UnicodeDecodeError`.
    """
    return io.StringIO(read_plain(path, max_bytes).decode("utf-8-sig"), newline=None).read()
