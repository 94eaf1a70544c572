"""`pagellm quantize`: a model is checked, measured, written and compared with what it came from."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import Checkpoint, open_checkpoint, resolve_model
from pagellm.engine.checkpoints.gguf import MAGIC
from pagellm.engine.config import usable_cores
from pagellm.engine.errors import ConfigError, PagellmError, found
from pagellm.engine.execution.memory import read_memory
from pagellm.engine.execution.weights import formats_of
from pagellm.engine.files import open_plain, read_plain_text
from pagellm.engine.llm import LLM
from pagellm.engine.models import ModelSpec, read_spec
from pagellm.engine.quantization.divergence import Divergence, divergence, engine_settings, windows
from pagellm.engine.quantization.importance import MeanSquares, by_tensor, mean_squares, read_importance
from pagellm.engine.quantization.mixes import ALIASES, MIXES
from pagellm.engine.quantization.pieces import check_free, whole_directory, whole_file
from pagellm.engine.quantization.safetensors_form import TYPES, write_safetensors
from pagellm.engine.quantization.writing import Importance, Written, requantized, write_gguf
from pagellm.kernels.architecture import lay_out

SUFFIX = ".gguf"
DEFAULT_MIX = "Q4_K_M"
DEFAULT_TYPE = "BF16"
# Of the memory that is available, what the source's engine may take beside the quantized model's.
_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    type: a mix, or of a directory an element type; None: the usual one. imatrix: a text, or an importance
    matrix of llama.cpp's. text: what the model is compared on; None: the package's own. text_tokens: how many
    of it, 0 for no comparison.
    """

    type: str | None = None
    pure: bool = False
    imatrix: Path | None = None
    text: Path | None = None
    text_tokens: int = 2048
    allow_requantize: bool = False
    force: bool = False


@dataclass(frozen=True)
class Report:
    """What became of it. divergence: None where nothing was compared; then `not_compared` says why."""

    source: str
    output: str
    type: str
    source_bytes: int
    written: Written
    seconds: float
    divergence: Divergence | None
    reference: str | None
    not_compared: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"bits_per_weight": self.written.bits_per_weight}


def quantize_model(model: str, out: Path, settings: Settings, show: bool = False) -> Report:
    """Writes a model to a GGUF file, or to a directory of safetensors, and compares the two.

    Raises `CheckpointError` for a model that cannot be written so, and `ConfigError` for a place where it
    cannot be written, or for settings that contradict each other.
    """
    mix = _type(out, settings)
    check_free(out, settings.force)
    text = _text(settings)
    given, calibration = _importance(settings.imatrix)
    path = resolve_model(model, show)
    start = perf_counter()
    with open_checkpoint(path) as checkpoint:
        spec = read_spec(checkpoint)
        _check(checkpoint, spec, out, mix, settings)
        source_bytes = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())

        def importance(written: ModelSpec) -> Importance:  # once it is known that the model can be written
            if calibration is None:
                return given
            return by_tensor(_measure(path, spec, calibration, show), written)

        if is_gguf(out):
            with whole_file(out, settings.force) as (file, temporary):
                written = write_gguf(
                    checkpoint, spec, file, temporary, mix,
                    pure=settings.pure,
                    requantize=settings.allow_requantize,
                    importance=importance,
                    provenance=_provenance(settings.imatrix),
                    num_threads=usable_cores(),
                    show=show,
                )  # fmt: skip
        else:
            with whole_directory(out) as directory:
                written = write_safetensors(checkpoint, spec, directory, mix, usable_cores(), show)
        seconds = perf_counter() - start
        reference = _reference(checkpoint, spec, written)
        context = spec.max_positions
    cost: Divergence | None = None
    reason: str | None = "nothing was to be compared"
    if text is not None:
        try:
            cost, reason = _compare(path, out, reference, context, text, settings.text_tokens, show), None
        except PagellmError as error:  # the file stands
            reason = str(error)
    return Report(
        model, str(out), mix, source_bytes, written, seconds, cost, reference if cost else None, reason
    )


def is_gguf(out: Path) -> bool:
    """Whether it is to be a GGUF file: what has another name is a directory of safetensors."""
    return out.suffix == SUFFIX


def _type(out: Path, settings: Settings) -> str:
    """What most matrices are to be. Raises `ConfigError` for what a file, or a directory, cannot have."""
    known = [*MIXES, *ALIASES] if is_gguf(out) else [*TYPES]
    mix = settings.type or (DEFAULT_MIX if is_gguf(out) else DEFAULT_TYPE)
    if mix not in known:
        where = "" if is_gguf(out) else f" of a directory of safetensors, or an OUT that ends with {SUFFIX}"
        raise ConfigError(f"type: found {found(mix)}, expected one of {', '.join(known)}{where}")
    for name, given in (("imatrix", settings.imatrix), ("pure", settings.pure)):
        if given and not is_gguf(out):
            raise ConfigError(
                f"{name}: found {found(str(given))}, expected none beside a directory of safetensors"
            )
    return ALIASES.get(mix, mix)


def _check(checkpoint: Checkpoint, spec: ModelSpec, out: Path, mix: str, settings: Settings) -> None:
    """Refuses what cannot be quantized, or would be overwritten by it."""
    if out.exists() and any(os.path.samefile(out, file.path) for file in checkpoint.files):
        raise ConfigError(f"{out}: found a file of the model itself, expected another name")
    types = requantized(checkpoint, spec, settings.pure)
    if types and mix not in TYPES and not settings.allow_requantize:
        raise ConfigError(
            f"{checkpoint.path}: found matrices of type {', '.join(types)}, expected eight bits or "
            "more: of a model that was quantized to few bits already the errors add up; quantize the "
            "original, or --allow-requantize"
        )


def _text(settings: Settings) -> str | None:
    """The text to compare on. Raises `ConfigError` if it cannot be read."""
    if settings.text_tokens < 0:
        raise ConfigError(f"text_tokens: found {settings.text_tokens}, expected a number from 0 on")
    if not settings.text_tokens:
        return None
    if settings.text is None:
        return (files(__package__) / "text.txt").read_text(encoding="utf-8")
    return _read_text(settings.text)


def _read_text(path: Path) -> str:
    try:
        return read_plain_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text: {error}") from error


def _importance(path: Path | None) -> tuple[Mapping[str, NDArray[np.float32]], str | None]:
    """By tensor, if it is an importance matrix; else the text to measure one on, if there is any."""
    if path is None:
        return {}, None
    try:
        with open_plain(path) as file:
            is_matrix = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return (read_importance(path), None) if is_matrix else ({}, _read_text(path))


def _measure(path: Path, spec: ModelSpec, text: str, show: bool) -> MeanSquares:
    with LLM(path, config=engine_settings("none", spec.max_positions), show_progress=False) as llm:
        return mean_squares(llm, windows(llm, text, None), show)


def _provenance(imatrix: Path | None) -> dict[str, str | int]:
    """What the file says of its making, as llama.cpp has it."""
    return {} if imatrix is None else {"quantize.imatrix.file": imatrix.name}


def _reference(checkpoint: Checkpoint, spec: ModelSpec, written: Written) -> str:
    """In what the source is computed: in float32, or in bfloat16 where that has no room."""
    size = 4 * lay_out(spec.arch, formats_of(checkpoint, spec, "none")).size
    return "none" if size + written.num_bytes < _SHARE * read_memory().available else "bf16"


def _compare(
    source: Path, out: Path, reference: str, context: int, text: str, max_tokens: int, show: bool
) -> Divergence:
    with LLM(source, config=engine_settings(reference, context), show_progress=False) as expected:
        texts = windows(expected, text, max_tokens)
        with LLM(out, config=engine_settings("auto", context), show_progress=False) as quantized:
            return divergence(expected, quantized, texts, show)
