"""The user's cache directory: what was downloaded and compiled once is kept there."""

import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from pagellm.engine.errors import ConfigError
from pagellm.engine.progress import say


def cache_dir() -> Path:
    """`PAGELLM_CACHE`, or `pagellm` in the XDG cache directory; it may not exist yet.

    For a user without a home, as in many containers, it is a directory in the temporary folder that only this
    user can write to; one line says so. Raises `ConfigError` if that cannot be made.
    """
    override = os.environ.get("PAGELLM_CACHE")
    if override:
        path = os.path.expanduser(override)
        if path.startswith("~"):
            raise ConfigError(f"PAGELLM_CACHE: found {override!r}, whose home is not known, expected a path")
        return Path(path).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, by the XDG Base Directory Specification
        return Path(base) / "pagellm"
    home = os.path.expanduser("~")
    return Path(home, ".cache", "pagellm") if os.path.isabs(home) else _temporary_dir()


@cache
def _temporary_dir() -> Path:
    """Made if it is not there. Code is loaded from it, so nobody else may be able to write there."""
    try:
        path = Path(tempfile.gettempdir()) / f"pagellm-{os.getuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"the user has no home, and a cache among the temporary files cannot be made: {error}; expected "
            "PAGELLM_CACHE to name a directory"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ConfigError(
            f"{path}: found what others own or can write, expected a directory of this user's alone, or "
            "PAGELLM_CACHE to name another"
        )
    say(f"the user has no home: the cache is {path} (PAGELLM_CACHE names another)")
    return path
