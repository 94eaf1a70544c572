"""The one way to a tokenizer: from a model's directory, or from the metadata of a GGUF file."""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError
from pagellm.engine.progress import say
from pagellm.engine.tokenizer.directory import read_directory
from pagellm.engine.tokenizer.gguf_metadata import read_gguf_metadata
from pagellm.engine.tokenizer.tokenizer import Tokenizer


def load_tokenizer(
    source: str | PathLike[str] | Mapping[str, Any], *, model_vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint.

    source: a model's directory (`tokenizer.json`, or `vocab.json` and `merges.txt`), or a GGUF file's
    metadata.
    model_vocab_size: how many ids the model can produce, where that is known better than from the source. An
    id below it that no token has decodes to nothing; an id from it on is an error.

    A tokenizer that has ids which the model lacks is loaded with a line that says so on standard error: a
    prompt with one of them is refused. Where there is no tokenizer, or none of a format that is read, the
    result has `vocab_size` 0, takes no text and says why (`absence`).

    Raises `CheckpointError` if the tokenizer cannot be found, read or supported.
    """
    if isinstance(source, Mapping):
        spec = read_gguf_metadata(source)
    else:
        directory = Path(source)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: found no directory, expected one that holds a tokenizer")
        spec = read_directory(directory)
    where = "" if isinstance(source, Mapping) else f"{Path(source)}: "
    if model_vocab_size is not None:
        spec = replace(spec, model_vocab_size=model_vocab_size)
    try:
        tokenizer = Tokenizer(spec)
    except CheckpointError as error:
        raise CheckpointError(f"{where}{error}") from error
    if spec.model_vocab_size is not None and tokenizer.vocab_size > spec.model_vocab_size:
        say(
            f"{where}the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model only up to"
            f" {spec.model_vocab_size - 1}: prompts with the others are refused"
        )
    return tokenizer
