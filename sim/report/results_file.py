"""The file of a replay's results: a line of JSON for each request when it ends."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pagellm.engine import checks
from pagellm.engine.errors import ConfigError


class ResultsFile:
    """Raises `ConfigError` where it cannot be written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = checks.path("results", path, ConfigError)
        with self._unwritable():
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, **fields: Any) -> None:
        """Appends the line of one request."""
        with self._unwritable():
            self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Closes the file."""
        with self._unwritable():
            self._file.close()

    @contextmanager
    def _unwritable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"results: {self._path}: {error.strerror}, expected a file to write to"
            ) from error
