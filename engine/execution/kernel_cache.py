"""Compiled kernels on disk: a file for each entry point, signature and kind of processor.

It stands where Numba's own cache does, which fails on a damaged file at every start, and looks into no
directory that cannot be written. A file begins with a hash of what it is and what it holds, and appears under
its name only when it is whole; so what was cut, overwritten or exchanged is found, discarded and compiled
again, and any number of processes may compile at once.
"""

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba.core import compiler, serialize

from pagellm.engine.progress import say

_HASH_BYTES = 32
# As Numba's own cache has it.
_dumps: Any = serialize.dumps
_rebuild: Any = compiler.CompileResult._rebuild


class KernelStore:
    """A directory of compiled kernels. is_complete: whether it has all that was compiled or looked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.is_complete = True
        self._has_damage = False

    def cache_of(self, function: Callable[..., Any]) -> "_FunctionCache":
        """The cache of one entry point, for Numba."""
        return _FunctionCache(self, f"{function.__module__}.{function.__qualname__}")

    def read(self, name: str, identity: bytes) -> bytes | None:
        """What is kept under this name; None if that is nothing, or not of this identity."""
        path = self.directory / name
        try:
            content = path.read_bytes() if path.is_file() else None
        except OSError:
            content = None
        if content is None:
            return None
        found, payload = content[:_HASH_BYTES], content[_HASH_BYTES:]
        if found == sha256(identity + payload).digest():
            return payload
        self.discard(name)
        return None

    def discard(self, name: str) -> None:
        """Removes a file that cannot be used."""
        path = self.directory / name
        if not self._has_damage:
            self._has_damage = True
            say(f"{path}: a damaged file; it and others like it are compiled again")
        with suppress(OSError):
            path.unlink()

    def write(self, name: str, identity: bytes, payload: bytes) -> None:
        """Keeps something. Where that is not possible it says so, the first time."""
        path = self.directory / name
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            try:
                unfinished.write_bytes(sha256(identity + payload).digest() + payload)
                unfinished.replace(path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        except OSError as error:
            if self.is_complete:
                say_not_kept(self.directory, error)
            self.is_complete = False


def say_not_kept(directory: Path, error: Exception) -> None:
    """Says that kernels are compiled for this process alone, and why."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    say(
        f"compiled kernels cannot be kept in {directory}: {reason}; they are compiled for this process alone "
        "(PAGELLM_CACHE names another directory)"
    )


class _FunctionCache:
    """One entry point's part of a store, with the methods that Numba calls."""

    def __init__(self, store: KernelStore, function: str) -> None:
        self._store = store
        self._function = function
        self.cache_path = str(store.directory)

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled form for a signature; None if it has to be compiled.

        Numba's cache refreshes the target first, which takes a quarter of a second; code that is only loaded
        needs nothing of that, and compiling does it itself.
        """
        name, identity = self._place(signature, target.codegen())
        payload = self._store.read(name, identity)
        if payload is None:
            return None
        try:
            return _rebuild(target, *pickle.loads(payload))
        except Exception:  # whole and still of no use, as after a change of the machine's libraries
            self._store.discard(name)
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps a compiled form."""
        assert not compiled.library.has_dynamic_globals  # addresses of this process
        name, identity = self._place(signature, compiled.codegen)
        self._store.write(name, identity, _dumps(compiled._reduce()))

    def _place(self, signature: Any, codegen: Any) -> tuple[str, bytes]:
        """The file's name, and all that it must be of: function, signature, processor and its features."""
        identity = repr((self._function, signature, codegen.magic_tuple())).encode()
        return f"{self._function.rpartition('.')[2]}-{sha256(identity).hexdigest()[:16]}.kernel", identity
