"""A whole model in GGUF: one file, or the parts into which llama.cpp's tools split one.

Part 2 of 3 of a model `name` is `name-00002-of-00003.gguf`. Every part says its number, from 0 on, how many
there are, and how many tensors are in all of them (`split.no`, `split.count`, `split.tensors.count`). The
first has the metadata; what others repeat of it must be the same. Knows how parts belong together; does not
know how a file is read.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pagellm.engine.checkpoints.base import Checkpoint, Tensor
from pagellm.engine.checkpoints.gguf import read_gguf
from pagellm.engine.errors import CheckpointError, found, named

_SUFFIX = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf\Z")
_LISTED = 4


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file, with all other parts where it is one: headers are read, weights are not.

    Raises `CheckpointError` for a broken file, and for parts that are missing or do not belong together.
    """
    with ExitStack() as opened:
        given = opened.enter_context(read_gguf(path))
        count = given.config.get("split.count", 0)
        if type(count) is int and count in (0, 1) and _place_in(path)[1] <= 1:
            opened.pop_all()
            return given
        number, count = _check_numbers(given)
        paths = [path.with_name(_named(path, index, count)) for index in range(count)]
        for part in paths:
            if not part.exists():
                raise CheckpointError(
                    f"{part}: not found; {path.name} is part {number + 1} of {count}, expected all of them "
                    "in one directory"
                )
        parts = [given if part == path else opened.enter_context(read_gguf(part)) for part in paths]
        tensors = _joined(parts)
        opened.pop_all()
    return Checkpoint(
        paths[0], "gguf", parts[0].config, tensors, tuple(file for part in parts for file in part.files)
    )


def gguf_in(directory: Path) -> Path | None:
    """The GGUF file of a directory, or its first part; None where there is none.

    Raises `CheckpointError` if the directory has several models.
    """
    names = sorted(path.name for path in directory.iterdir() if path.suffix == ".gguf")
    models: dict[str, str] = {}
    for name in names:
        # Parts of one model differ in their numbers alone.
        models.setdefault(_SUFFIX.sub(lambda part: f"-of-{part['count']}", name), name)
    if len(models) > 1:
        listed = ", ".join(list(models.values())[:_LISTED])
        raise CheckpointError(
            f"{directory}: {len(models)} models in GGUF files ({listed}{', ...' * (len(models) > _LISTED)}), "
            "expected one: name the file itself, any part of one that has several"
        )
    return directory / names[0] if names else None


def _place_in(path: Path) -> tuple[int, int]:
    """The part's number, from 0 on, and how many there are, by the file's name; (0, 0) if it says nothing."""
    match = _SUFFIX.search(path.name)
    return (int(match["number"]) - 1, int(match["count"])) if match else (0, 0)


def _named(path: Path, index: int, count: int) -> str:
    return _SUFFIX.sub(f"-{index + 1:05d}-of-{count:05d}.gguf", path.name)


def _check_numbers(part: Checkpoint) -> tuple[int, int]:
    """What a part's file says of its number and of how many there are; its name must say the same."""
    number, count = (_integer(part, key) for key in ("split.no", "split.count"))
    if count > 1 and _place_in(part.path)[1] == 0:
        raise CheckpointError(
            f"{part.path}: part {number + 1} of {count}, expected a file name that ends in "
            f"-{number + 1:05d}-of-{count:05d}.gguf, as the other parts' must"
        )
    for key, value, expected in zip(
        ("split.no", "split.count"), (number, count), _place_in(part.path), strict=True
    ):
        if value != expected:
            raise CheckpointError(
                f"{part.path}: {key}: found {value}, expected {expected}, as the file's name says"
            )
    if number >= count:
        raise CheckpointError(
            f"{part.path}: split.no: found {number}, expected less than {count}, split.count"
        )
    return number, count


def _integer(part: Checkpoint, key: str) -> int:
    value = part.config.get(key)
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{part.path}: {key}: found {found(value)}, expected a number, as every part of a model has it"
        )
    return value


def _joined(parts: list[Checkpoint]) -> dict[str, Tensor]:
    """The tensors of all parts, once the parts are known to be of one model."""
    first = parts[0]
    total = _integer(first, "split.tensors.count")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        _check_numbers(part)
        if (value := _integer(part, "split.tensors.count")) != total:
            raise CheckpointError(
                f"{part.path}: split.tensors.count: found {value}, expected {total} as in {first.path.name}; "
                "it is a part of another model"
            )
        for key, value in part.config.items():
            expected = first.config.get(key)
            if key not in ("split.no", "general.alignment") and not _equal(value, expected):
                raise CheckpointError(
                    f"{part.path}: {named(key)}: found {found(value)}, expected {found(expected)} as in "
                    f"{first.path.name}; it is a part of another model"
                )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.path}: tensor {found(name)} is there, too, but already in "
                    f"{tensors[name].file.path.name}, expected it in one part"
                )
            tensors[name] = tensor
    if len(tensors) != total:
        raise CheckpointError(
            f"{first.path}: split.tensors.count: found {total}, expected {len(tensors)}, the tensors in all "
            f"{len(parts)} parts"
        )
    return tensors


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of metadata are the same."""
    return type(a) is type(b) and bool(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)
