"""The results file of a sweep: a line of JSON for each replay that was finished, so that none is done twice.

A line stands for itself. It names what was replayed (the trace and the step times, by name and by a hash of
their content), the settings that were given, and the summary of the report, without the time that the replay
took: equal replays give equal lines. `key` is a hash of all that the summary follows from.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pagellm.engine import checks
from pagellm.engine.checks import parse_json
from pagellm.engine.errors import ConfigError, ReportError
from pagellm.sim.sweep.serving import Settings, Value

VERSION = 2
# What every line begins with, and by which a torn one is known.
_BEGINNING = f'{{"pagellm_sweep":{VERSION},"key":"'.encode()
# What serves and the defaults of settings that are not given, too: see `Serving.full_settings`.
_Full = Callable[[Settings], dict[str, Value]]


@dataclass(frozen=True)
class Identity:
    """What a sweep replays: the trace and the step times, by name and by the SHA-256 of their content.

    reading: how the trace was read, in words. Names are for people and make no difference.
    """

    trace: str
    trace_sha256: str
    reading: str
    cost_model: str
    cost_model_sha256: str

    @property
    def content(self) -> tuple[str, str, str]:
        """What two identities are equal by."""
        return self.trace_sha256, self.reading, self.cost_model_sha256

    def __str__(self) -> str:
        return f"{self.trace} ({self.trace_sha256[:8]}; {self.reading}) on {self.cost_model}"

    def key(self, full_settings: Settings) -> str:
        """Names a replay with these settings, those that were not given among them."""
        parts = [VERSION, *self.content, full_settings]
        return sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Point:
    """A replay: the settings that were given, and the report's summary, or why there is none.

    The summary has as "fleet" what served and what that took, too.

    extrapolated: look-ups of step times outside of what was measured.
    """

    settings: dict[str, Value]
    summary: dict[str, Any] | None = None
    extrapolated: int = 0
    error: str | None = None


class ResultsFile:
    """The replays of one sweep that are known, in a file if there is one.

    full: the settings of a replay with those that were not given.

    A last line without an end was torn by the end of its writer, and is cut off. Raises `ConfigError` for a
    file that belongs to another trace or other step times or cannot be used, `ReportError` for one that holds
    something else.
    """

    def __init__(self, path: Path | None, identity: Identity, full: _Full) -> None:
        self._path = path
        self._identity = identity
        self._full = full
        self._points: dict[str, Point] = {}
        self._file = None
        if path is None:
            return
        path = checks.path("results", path, ConfigError)
        try:
            content = path.read_bytes() if path.exists() else b""
            *lines, torn = content.split(b"\n")
            for number, line in enumerate(lines, 1):
                self._take(f"{path}:{number}", line)
            if torn and torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:
                raise _no_line(f"{path}:{len(lines) + 1}")
            # Unbuffered: a line is one write, so an interrupt finds it written or not.
            self._file = path.open("ab", buffering=0)
            if torn:
                self._file.truncate(len(content) - len(torn))
        except OSError as error:
            raise self._failed(error) from None

    def get(self, settings: Settings) -> Point | None:
        """The replay with these settings, if it is known."""
        found = self._points.get(self._identity.key(self._full(settings)))
        return None if found is None else Point(dict(settings), found.summary, found.extrapolated)

    def add(self, point: Point) -> None:
        """Takes in a replay that was finished."""
        key = self._identity.key(self._full(point.settings))
        self._points[key] = point
        if self._file is None:
            return
        line = {
            "pagellm_sweep": VERSION,
            "key": key,
            **asdict(self._identity),
            "settings": point.settings,
            "extrapolated": point.extrapolated,
            "summary": point.summary,
        }
        try:
            self._file.write(json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _take(self, place: str, line: bytes) -> None:
        try:
            found: Mapping[str, Any] = parse_json(line)
            identity = Identity(**{name: found[name] for name in Identity.__dataclass_fields__})
            point = Point(dict(found["settings"]), dict(found["summary"]), found["extrapolated"])
            key = found["key"]
            if found["pagellm_sweep"] != VERSION:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            version = _version_of(line)
            if version is None:
                raise _no_line(place) from None
            raise ReportError(
                f"results: {place}: found a line of version {version}, expected {VERSION}: give another file"
            ) from None
        if identity.content != self._identity.content:
            raise ConfigError(
                f"results: {place}: found a sweep of {identity}, expected one of {self._identity}, "
                "or another file"
            )
        self._points[key] = point

    def _failed(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"results: {self._path}: {error.strerror or error}, expected a file to read and write"
        )


def _version_of(line: bytes) -> int | None:
    """The version of a line of a sweep's results, if it is one of another version."""
    found = re.match(rb'\{"pagellm_sweep":(\d{1,9}),"key":"', line)
    return None if found is None or int(found[1]) == VERSION else int(found[1])


def _no_line(place: str) -> ReportError:
    return ReportError(f"results: {place}: found something else, expected a line of a sweep's results")
