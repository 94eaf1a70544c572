"""The JSON files of a model's directory, which are small and hold an object."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import CheckpointError
from pagellm.engine.files import read_plain
from pagellm.engine.quantized_config import PARTS

CONFIG_FILE = "config.json"
# Of a configuration and of an index of shards.
MAX_JSON_BYTES = 16 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object."""
    try:
        value = parse_json(read_plain(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; expected a Hugging Face model directory") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def config_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and what in it describes the language model of a larger one.

    By what stands before the names of their keys: nothing, or a section's name and a dot.
    """
    sections = {f"{name}.": config.get(name) for name in PARTS}
    return {"": config} | {prefix: part for prefix, part in sections.items() if isinstance(part, dict)}
