"""Hugging Face directories: config.json beside model.safetensors, in one file or in indexed shards.

The safetensors library checks each file's header (lengths, shapes, types, offsets); the byte ranges are
then taken from that header, because the library's NumPy reader has no bfloat16 and reads through a memory
map. Knows where the files of a model lie; does not know what its configuration means.
"""

import json
import math
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pagellm.engine.checkpoints.base import BLOCK_SIZES, Checkpoint, Tensor, WeightFile
from pagellm.engine.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
UNSUPPORTED_SUFFIXES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


def open_huggingface(directory: Path) -> Checkpoint:
    """Open a directory of config.json and safetensors."""
    config = read_json_object(directory / CONFIG_FILE)
    with ExitStack() as opened:
        if (directory / WEIGHTS_FILE).is_file():
            file = opened.enter_context(closing(WeightFile(directory / WEIGHTS_FILE)))
            files, tensors = [file], _read_header(file)
        elif (directory / INDEX_FILE).is_file():
            weight_map = _read_index(directory)
            files = [
                opened.enter_context(closing(WeightFile(directory / shard)))
                for shard in sorted(set(weight_map.values()))
            ]
            tensors = _select(weight_map, files)
        else:
            raise CheckpointError(f"{directory}: {missing_weights(directory)}")
        opened.pop_all()
    return Checkpoint(directory, "safetensors", config, tensors, tuple(files))


def missing_weights(directory: Path) -> str:
    """Why a directory without the expected weight files cannot be read."""
    expected = f"expected {WEIGHTS_FILE} or {INDEX_FILE}"
    others = sorted(p.name for p in directory.iterdir() if p.suffix in UNSUPPORTED_SUFFIXES)
    if others:
        return f"weights only as {others[0]}, {expected}; only safetensors and GGUF are supported"
    ggufs = sorted(p.name for p in directory.iterdir() if p.suffix == ".gguf")
    if ggufs:
        return f"a directory with GGUF files, name the file itself: {directory / ggufs[0]}"
    return f"no weights, {expected}"


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; expected a Hugging Face model directory") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def _read_index(directory: Path) -> dict[str, str]:
    """Which shard holds which tensor; every shard is a file of this directory."""
    path = directory / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {weight_map!r}, expected tensor names and file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise CheckpointError(
                f"{path}: tensor {name!r} is in {shard!r}, expected a file name in the same directory"
            )
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard}: not found, but {INDEX_FILE} has {name!r} there")
    return weight_map


def _select(weight_map: dict[str, str], files: list[WeightFile]) -> dict[str, Tensor]:
    shards = {file.path.name: _read_header(file) for file in files}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            path = files[0].path.with_name(shard)
            raise CheckpointError(f"{path}: no tensor {name!r}, but {INDEX_FILE} says it is there")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_header(file: WeightFile) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Format: https://huggingface.co/docs/safetensors (a little-endian u64 header length, a JSON header whose
    offsets count from the header's end, the data).
    """
    prefix = file.read(0, min(8, file.num_bytes)).tobytes()
    header_bytes = int.from_bytes(prefix, "little")
    if file.num_bytes < 8 or not 0 < header_bytes <= min(file.num_bytes - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file.path}: a safetensors header of {header_bytes} bytes in a file of {file.num_bytes},"
            f" expected one that fits and has at most {MAX_HEADER_BYTES}; the file may be cut short"
        )
    raw_header = file.read(8, header_bytes).tobytes()
    data_start = 8 + header_bytes
    try:
        with safe_open(file.path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        reason = _explain(raw_header, file.num_bytes - data_start) or str(error)
        raise CheckpointError(f"{file.path}: not a valid safetensors file: {reason}") from error
    header = json.loads(raw_header)
    header.pop("__metadata__", None)
    return {
        name: Tensor(name, tuple(entry["shape"]), entry["dtype"], file, data_start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _explain(raw_header: bytes, data_bytes: int) -> str | None:
    """The first tensor whose bytes are not there: two errors that the library reports without a name."""
    try:
        for name, entry in json.loads(raw_header).items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if end > data_bytes:
                return f"tensor {name!r} ends at byte {end} of the data, but there are {data_bytes} bytes"
            expected = math.prod(shape) * BLOCK_SIZES[dtype][1]
            if end - begin != expected:
                return f"tensor {name!r} has {end - begin} bytes, expected {expected} for {dtype} {shape}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # The header is broken in another way, which the library's own message tells.
        pass
    return None
