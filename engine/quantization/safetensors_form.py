"""A directory of safetensors in another element type, with the small files that belong to it.

Tensors keep their names and shapes; all that are floating-point numbers get the type, rounded to the nearest.
What a quantizer wrote as several tensors becomes one, of the values that its levels stand for.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from pagellm.engine.checkpoints import BLOCK_SIZES, Checkpoint, Tensor
from pagellm.engine.checkpoints.huggingface import WEIGHTS_FILE
from pagellm.engine.checkpoints.json_files import CONFIG_FILE, config_parts, read_json_object
from pagellm.engine.checkpoints.placed_file import PlacedFile
from pagellm.engine.checkpoints.quantized import Mxfp4Tensor, QuantizedTensor, StackedTensor
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import ModelSpec, is_left_over
from pagellm.engine.progress import progress
from pagellm.engine.quantization.pieces import PIECE_BYTES, in_turn, quantized
from pagellm.engine.quantization.writing import Written
from pagellm.engine.quantized_config import SETTINGS, SETTINGS_FILES

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# What comes along of the other files, by how they end; not the indices of weights.
_SMALL = (".json", ".txt", ".model", ".jinja")
_INDEX = ".index.json"
_TEMPLATES = "additional_chat_templates"
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")


def write_safetensors(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    directory: Path,
    dtype: str,
    num_threads: int = 1,
    show: bool = False,
) -> Written:
    """Writes a directory's model into another directory, which is there and empty. dtype: of `TYPES`.

    Raises `CheckpointError` for a model that is no directory, and `OSError`.
    """
    if checkpoint.format != "safetensors":
        raise CheckpointError(f"{checkpoint.path}: found a GGUF file, expected a directory to make one of")
    parts = (*spec.layers, spec.rest)
    used = {source.tensor for part in parts for sources in part.values() for source in sources}
    tensors = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if name in used or not is_left_over(checkpoint, name)
    ]
    types = {tensor.name: dtype if _is_converted(tensor) else tensor.dtype for tensor in tensors}
    sizes = {
        tensor.name: prod(tensor.shape) * BLOCK_SIZES[dtype][1] if _is_converted(tensor) else tensor.num_bytes
        for tensor in tensors
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for tensor in tensors:
        places[tensor.name], end = end, end + sizes[tensor.name]
        header[tensor.name] = {
            "dtype": types[tensor.name],
            "shape": list(_plain_shape(tensor)),
            "data_offsets": [places[tensor.name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    _copy_small_files(checkpoint, directory, dtype)
    with (directory / WEIGHTS_FILE).open("x+b", buffering=0) as raw:
        file = PlacedFile(raw, start + end)
        file.reserve()
        file.write(0, len(text).to_bytes(8, "little") + text)
        with progress("Converting", end, "bytes", show) as advance, ThreadPoolExecutor(num_threads) as pool:
            jobs = (
                job for tensor in tensors for job in _jobs(tensor, file, start + places[tensor.name], dtype)
            )
            for num_bytes in in_turn(pool, jobs, 2 * num_threads):
                advance(num_bytes)
        file.sync()
    weights = sum(prod(tensor.shape) for tensor in tensors)
    return Written(str(checkpoint.config["model_type"]), start + end, weights, dict(Counter(types.values())))


def _is_converted(tensor: Tensor) -> bool:
    """Masks, counters and single numbers stay as they are."""
    return isinstance(tensor, QuantizedTensor | StackedTensor) or (
        tensor.dtype in BLOCK_SIZES and len(tensor.shape) > 0
    )


def _plain_shape(tensor: Tensor) -> tuple[int, ...]:
    """Experts in blocks are [outputs, inputs], and the other way round as plain numbers (GPT-OSS)."""
    return tensor.shape[:-2] + tensor.shape[:-3:-1] if isinstance(tensor, Mxfp4Tensor) else tensor.shape


def _jobs(tensor: Tensor, file: PlacedFile, place: int, dtype: str) -> Iterator[Callable[[], int]]:
    if not _is_converted(tensor):
        yield partial(_copy, tensor, file, place)
        return
    row = prod(tensor.shape[1:])
    step = max(1, PIECE_BYTES // (4 * row))
    if isinstance(tensor, QuantizedTensor) and tensor.by_columns:
        step = tensor.shape[0]
    for first in range(0, tensor.shape[0], step):
        yield partial(_convert, tensor, file, place, dtype, first, min(first + step, tensor.shape[0]))


def _copy(tensor: Tensor, file: PlacedFile, place: int) -> int:
    file.write(place, tensor.file.read(tensor.offset, tensor.num_bytes))
    return tensor.num_bytes


def _convert(tensor: Tensor, file: PlacedFile, place: int, dtype: str, first: int, end: int) -> int:
    rows = tensor.rows(first, end)
    if isinstance(tensor, Mxfp4Tensor):
        rows = np.ascontiguousarray(rows.swapaxes(1, 2))
    rows = rows.reshape(end - first, -1)
    data = quantized(f"{tensor.file.path}: tensor {tensor.name}", dtype, rows, first)
    file.write(place + first * rows.shape[1] * BLOCK_SIZES[dtype][1], data)
    return int(data.nbytes)


def _copy_small_files(checkpoint: Checkpoint, directory: Path, dtype: str) -> None:
    """Tokenizer, chat templates, licences and settings, with the new type in the place of the old one."""
    source = checkpoint.path
    for path in sorted((*source.iterdir(), *(source / _TEMPLATES).glob("*.jinja"))):
        is_small = path.suffix in _SMALL and not path.name.endswith((_INDEX, *SETTINGS_FILES))
        if not path.is_file() or not (is_small or path.name.startswith(_LICENCES)):
            continue
        target = directory / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    config = read_json_object(source / CONFIG_FILE)
    for part in config_parts(config).values():
        for key in SETTINGS:
            part.pop(key, None)
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = TYPES[dtype]
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
