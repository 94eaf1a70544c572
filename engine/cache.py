"""The user's cache directory: what was downloaded and compiled once is kept there."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`PAGELLM_CACHE`, or `pagellm` in the XDG cache directory; it may not exist yet."""
    override = os.environ.get("PAGELLM_CACHE")
    if override:
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pagellm"
