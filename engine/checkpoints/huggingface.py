"""Hugging Face directories: config.json beside model.safetensors, in one file or in indexed shards.

The safetensors library checks each file's header (lengths, shapes, types, offsets); the byte ranges are
then taken from that header, because the library's NumPy reader has no bfloat16 and reads through a memory
map. Knows where the files of a model lie; does not know what its configuration means.
"""

import json
import math
import os
from contextlib import ExitStack, closing
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pagellm.engine.checkpoints.base import BLOCK_SIZES, Checkpoint, Tensor, WeightFile
from pagellm.engine.checkpoints.json_files import CONFIG_FILE, read_json_object
from pagellm.engine.checkpoints.quantized import join_quantized
from pagellm.engine.errors import CheckpointError, found

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# More than any published file has; the format's own limit would let a file ask for gigabytes.
MAX_HEADER_BYTES = 8 << 20
# Of a file, on every system that is in use.
MAX_NAME_BYTES = 255
UNSUPPORTED_SUFFIXES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


def open_huggingface(directory: Path) -> Checkpoint:
    """Opens a directory of config.json and safetensors."""
    config = read_json_object(directory / CONFIG_FILE)
    with ExitStack() as opened:

        def open_file(name: str) -> WeightFile:
            return opened.enter_context(closing(WeightFile(directory / name)))

        files: list[WeightFile] = []
        tensors = None
        if (directory / WEIGHTS_FILE).exists():
            files = [open_file(WEIGHTS_FILE)]
            tensors = _read_header(files[0])
        if (directory / INDEX_FILE).exists():
            weight_map = _read_index(directory)
            if tensors is None or not _is_whole(directory, tensors, weight_map):
                _check_shards(directory, weight_map)
                files = [open_file(shard) for shard in sorted(set(weight_map.values()))]
                tensors = _select(weight_map, files)
        if tensors is None:
            raise CheckpointError(f"{directory}: {missing_weights(directory)}")
        tensors, method = join_quantized(directory, config, tensors)
        opened.pop_all()
    return Checkpoint(directory, "safetensors", config, tensors, tuple(files), quantization=method)


def _is_whole(directory: Path, tensors: dict[str, Tensor], weight_map: dict[str, str]) -> bool:
    """Whether model.safetensors is the model although there is an index, too.

    It is not if it lacks tensors of the index: then something else left it there. If both it and the shards
    have all of them, nobody can tell which is meant, and that is a `CheckpointError`.
    """
    if not tensors.keys() >= weight_map.keys():
        return False
    shards = set(weight_map.values())
    if shards == {WEIGHTS_FILE} or not all((directory / shard).exists() for shard in shards):
        return True
    raise CheckpointError(
        f"{directory}: found both {WEIGHTS_FILE} and {INDEX_FILE} with its shards, each a whole model, "
        "expected one of them: remove the other"
    )


def has_weights(directory: Path) -> bool:
    """Whether the directory has the weights of a model, as far as the names of its files say."""
    return any((directory / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))


def missing_weights(directory: Path) -> str:
    """Why a directory without the expected weight files cannot be read."""
    expected = f"expected {WEIGHTS_FILE} or {INDEX_FILE}"
    others = sorted(p.name for p in directory.iterdir() if p.suffix in UNSUPPORTED_SUFFIXES)
    if others:
        return f"weights only as {others[0]}, {expected}; only safetensors and GGUF are supported"
    return f"no weights, {expected}, or one model in GGUF"


def _read_index(directory: Path) -> dict[str, str]:
    """Which shard holds which tensor."""
    path = directory / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map: found {found(weight_map)}, expected tensor names and file names"
        )
    shards: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in shards:
            continue
        if not _is_file_name(shard):
            raise CheckpointError(
                f"{path}: tensor {found(name)} is in {found(shard)},"
                " expected a file name in the same directory"
            )
        shards.add(shard)
    return weight_map


def _is_file_name(name: object) -> bool:
    """Whether a file of a directory can be called so."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    try:
        return len(os.fsencode(name)) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _check_shards(directory: Path, weight_map: dict[str, str]) -> None:
    for shard, name in {shard: name for name, shard in weight_map.items()}.items():
        if not (directory / shard).exists():
            raise CheckpointError(f"{directory / shard}: not found, but {INDEX_FILE} has {found(name)} there")


def _select(weight_map: dict[str, str], files: list[WeightFile]) -> dict[str, Tensor]:
    shards = {file.path.name: _read_header(file) for file in files}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            path = files[0].path.with_name(shard)
            raise CheckpointError(f"{path}: no tensor {found(name)}, but {INDEX_FILE} says it is there")
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
        reason = _explain(raw_header, file.num_bytes - data_start) or str(error)[:200]
        raise CheckpointError(f"{file.path}: not a valid safetensors file: {reason}") from error
    header = json.loads(raw_header)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        tensors[name] = Tensor(name, shape, dtype, file, data_start + begin, end - begin)
    return tensors


def _explain(raw_header: bytes, data_bytes: int) -> str | None:
    """The first tensor whose bytes are not there: two errors that the library reports without a name."""
    try:
        for name, entry in json.loads(raw_header).items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if end > data_bytes:
                return f"tensor {found(name)} ends at byte {found(end)} of the data, of {data_bytes} bytes"
            expected = math.prod(shape) * BLOCK_SIZES[dtype][1]
            if end - begin != expected:
                return (
                    f"tensor {found(name)} has {found(end - begin)} bytes, expected {found(expected)} "
                    f"for {dtype} {found(shape)}"
                )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # The header is broken in another way, which the library's own message tells.
        pass
    return None
