"""From a model's name to the path of its files: a local path, a known name, or an id on the hub.

A local path wins if it exists. Knows where models come from; does not read what is in them beyond seeing
that a model is there.
"""

import os
import re
from os import PathLike
from pathlib import Path

from pagellm.engine.checkpoints.fetch import fetch
from pagellm.engine.checkpoints.gguf import MAGIC
from pagellm.engine.checkpoints.gguf_parts import gguf_in
from pagellm.engine.checkpoints.huggingface import INDEX_FILE, WEIGHTS_FILE, has_weights, missing_weights
from pagellm.engine.checkpoints.json_files import CONFIG_FILE
from pagellm.engine.checkpoints.known_models import KNOWN_MODELS
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.files import open_plain

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = [
    CONFIG_FILE,
    "generation_config.json",
    "*quant*_config.json",
    "model*.safetensors",
    INDEX_FILE,
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]


def resolve_model(name: str | PathLike[str], progress: bool = True) -> Path:
    """The directory or GGUF file of a model, fetched first if need be; `progress` shows a fetch on stderr.

    A path object is only ever a path. Raises `CheckpointError` if there is no such model or it cannot be
    fetched.
    """
    if not isinstance(name, str | PathLike):
        raise CheckpointError(f"model: found {found(name)}, expected {_choices()}")
    text = os.fspath(name)
    if isinstance(text, str) and text and "\0" not in text:
        path = os.path.expanduser(text)
        if os.path.exists(path):
            return _local(Path(path))
        if isinstance(name, str) and name in KNOWN_MODELS:
            return fetch(KNOWN_MODELS[name], progress)
        if isinstance(name, str) and HUB_ID.fullmatch(name) and not name.endswith(".gguf"):
            return _from_hub(name, progress)
    raise CheckpointError(f"{found(text)}: no such model; expected {_choices()}")


def _choices() -> str:
    known = ", ".join(sorted(KNOWN_MODELS))
    return f"an existing path (a directory or a .gguf file), a known name ({known}) or a hub id (org/name)"


def _local(path: Path) -> Path:
    try:
        if path.is_dir():
            if not has_weights(path):
                if (gguf := gguf_in(path)) is not None:
                    return _local(gguf)
                raise CheckpointError(f"{path}: no model in this directory: {missing_weights(path)}")
            if not (path / CONFIG_FILE).exists():
                raise CheckpointError(f"{path}: no model in this directory: weights, but no {CONFIG_FILE}")
            return path
        with open_plain(path) as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if magic != MAGIC:
        raise CheckpointError(
            f"{path}: begins with {magic!r}, expected a GGUF file ({MAGIC!r}),"
            f" or the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return path


def _from_hub(name: str, progress: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise CheckpointError(
            f"{found(name)}: no such path, and fetching it from the hub needs: pip install 'pagellm[hub]';"
            f" expected {_choices()}"
        ) from None
    if not progress:
        disable_progress_bars()
    try:
        path = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    # The library raises its own errors, those of its HTTP client and those of the system.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{found(name)}: no such path, and the hub did not give it: {lines[0][:200]};"
            " it is fetched by what pip install 'pagellm[hub]' brings, with access to the network"
        ) from error
    return _local(path)
