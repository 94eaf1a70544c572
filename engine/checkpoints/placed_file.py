"""A file that is written piece by piece, by several threads."""

import io
import os
import threading
from typing import Any


class PlacedFile:
    """An open file whose size is known; any thread may put bytes into it."""

    def __init__(self, file: io.FileIO, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._file = file
        self._lock = threading.Lock()
        file.truncate(num_bytes)

    def reserve(self) -> None:
        """Asks for the room of the whole file. Raises `OSError` if there is less."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, self.num_bytes)

    def write(self, place: int, data: Any) -> None:
        """Puts bytes there."""
        left = memoryview(data).cast("B")
        with self._lock:
            self._file.seek(place)
            while left:
                left = left[self._file.write(left) :]

    def sync(self) -> None:
        """Returns when the bytes are on the disk."""
        os.fsync(self._file.fileno())
