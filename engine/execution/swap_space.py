"""The second tier of KV blocks: in memory, or in a file.

Knows bytes by block number. What they mean and when they move is the block manager's and the runner's
business.
"""

import os
import tempfile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.errors import ConfigError


class SwapSpace(Protocol):
    """Blocks of `block_words` float32 words each. Both operations raise `OSError` where the medium fails."""

    def write(self, slot: int, block: NDArray[np.float32]) -> None:
        """Keeps a block's words, [block_words]."""

    def read(self, slot: int) -> NDArray[np.float32]:
        """The words that were kept, [block_words]."""

    def close(self) -> None:
        """Gives the memory or the disk space back."""


class MemorySwapSpace:
    """Blocks in memory, which the system hands out as they are first written."""

    def __init__(self, num_blocks: int, block_words: int) -> None:
        self._blocks: NDArray[np.float32] = np.empty((num_blocks, block_words), np.float32)

    def write(self, slot: int, block: NDArray[np.float32]) -> None:
        self._blocks[slot] = block

    def read(self, slot: int) -> NDArray[np.float32]:
        block: NDArray[np.float32] = self._blocks[slot]
        return block

    def close(self) -> None:
        self._blocks = np.empty((0, 0), np.float32)


class FileSwapSpace:
    """Blocks in a file without a name, which vanishes with the process however that ends.

    Its room is reserved at the start, so that a full disk shows then. It is read and written by calls rather
    than mapped into memory: where a medium fails under a mapping, the system kills the process and with it
    every request; a call returns an error, and one sequence is computed again.
    """

    def __init__(self, num_blocks: int, block_words: int, directory: str) -> None:
        self._block_bytes = 4 * block_words
        size = num_blocks * self._block_bytes
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"swap_dir: {directory}: {error.strerror}, expected a directory to write to"
            ) from error
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"swap_dir: {directory}: {error.strerror}, expected room for {size} bytes"
            ) from error

    def write(self, slot: int, block: NDArray[np.float32]) -> None:
        left = block.data.cast("B")
        position = slot * self._block_bytes
        while left:
            written = os.pwrite(self._file.fileno(), left, position)
            left, position = left[written:], position + written

    def read(self, slot: int) -> NDArray[np.float32]:
        block = np.empty(self._block_bytes // 4, np.float32)
        left = block.data.cast("B")
        position = slot * self._block_bytes
        while left:
            count = os.preadv(self._file.fileno(), [left], position)
            if count == 0:
                raise OSError(f"the swap file ends at byte {position}")
            left, position = left[count:], position + count
        return block

    def close(self) -> None:
        self._file.close()
