"""Which tokens may come next, of many completions at once, found while other work goes on.

llguidance computes masks in threads of its own, without the interpreter's lock; a worker waits for them.
"""

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint32]  # [(vocab_size + 31) // 32], a bit a token, the lowest first


def allows(mask: Mask, token_id: int) -> bool:
    """Whether the token may come."""
    return bool(mask[token_id >> 5] >> (token_id & 31) & 1)


def with_token(mask: Mask, token_id: int) -> Mask:
    """A mask that allows a token, too."""
    mask = mask.copy()
    mask[token_id >> 5] |= 1 << (token_id & 31)
    return mask


def without(mask: Mask, token_ids: Iterable[int]) -> Mask:
    """A mask that does not allow these tokens."""
    mask = mask.copy()
    for token_id in token_ids:
        mask[token_id >> 5] &= ~(1 << (token_id & 31)) & 0xFFFFFFFF
    return mask


class MaskJob:
    """Masks that are being computed, [matchers, words]. They must not change before `wait` has returned."""

    def __init__(self, masks: NDArray[np.uint32], future: "Future[None]") -> None:
        self._masks = masks
        self._future = future
        self._owner = os.getpid()

    def wait(self, row: int) -> Mask | None:
        """The mask of one of the matchers; None in a forked process, where nobody computes it."""
        if self._owner != os.getpid():
            return None
        self._future.result()
        mask: Mask = self._masks[row]
        return mask


class MaskWorker:
    """Computes masks of a vocabulary of so many tokens in up to `num_threads` threads."""

    def __init__(self, vocab_size: int, num_threads: int) -> None:
        self._num_words = (vocab_size + 31) // 32
        self._num_threads = num_threads
        self._owner = 0
        self._worker: ThreadPoolExecutor | None = None
        self._executor: Any = None

    def begin(self, matchers: Sequence[Any]) -> MaskJob:
        """Begins to compute the masks of these."""
        masks = np.zeros((len(matchers), self._num_words), np.uint32)
        worker = self._started()
        pairs = [(matcher, row) for row, matcher in enumerate(matchers)]
        future = worker.submit(self._compute, pairs, masks)
        time.sleep(0)  # lets the worker have the interpreter's lock, which it gives back at once
        return MaskJob(masks, future)

    def _compute(self, pairs: list[tuple[Any, int]], masks: NDArray[np.uint32]) -> None:
        """Has the masks as an argument, as they must be there even if those who wanted them are gone."""
        self._executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, masks.strides[0], len(masks))

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None and self._owner == os.getpid():
            self._worker.shutdown(wait=False)
        self._worker = None

    def _started(self) -> ThreadPoolExecutor:
        if self._worker is None or self._owner != os.getpid():
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._num_threads)
            self._worker = ThreadPoolExecutor(1, "pagellm-masks")
            self._owner = os.getpid()
        return self._worker


def mask_of(matcher: Any, vocab_size: int) -> Mask:
    """The mask of one matcher, computed here and now."""
    mask = np.zeros((vocab_size + 31) // 32, np.uint32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return mask
