"""The tables of the README that are made from the code: which models and which types of weights are read.

    python -m tests.readme_tables      # writes them

`test_readme.py` holds the README to them.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pagellm.engine.checkpoints import BLOCK_SIZES
from pagellm.engine.execution.weights import FORMAT_NAMES, is_kept
from pagellm.engine.models import GGUF_READERS, HUGGINGFACE_READERS
from pagellm.engine.models.multimodal import TEXT_TYPES
from pagellm.kernels.encoding import LEVEL_FORMATS
from pagellm.kernels.packing import FLOAT32, panels_size

README = Path(__file__).parents[1] / "README.md"
_SIDE = 4096  # of the matrix whose size is divided by its weights


def models_table() -> str:
    """A line for each file of `engine/models`, named by the beginning of its docstring."""
    rows = [
        f"| {title} | {_codes(hub)} | {_codes(gguf)} |"
        for title, (hub, gguf) in sorted(_names_by_title().items(), key=lambda item: _order(item[0]))
    ]
    head = [
        "| models | `model_type` of config.json | `general.architecture` of GGUF |",
        "| --- | --- | --- |",
    ]
    return "\n".join(head + rows)


def _names_by_title() -> dict[str, tuple[list[str], list[str]]]:
    names: dict[str, tuple[list[str], list[str]]] = {}
    for index, readers in enumerate((HUGGINGFACE_READERS, GGUF_READERS)):
        for name, reader in readers.items():
            names.setdefault(_title(reader), ([], []))[index].append(name)
    for whole, text in TEXT_TYPES.items():
        names[_title(HUGGINGFACE_READERS[text])][0].append(f"{whole} (its text model)")
    return names


def _order(title: str) -> str:
    return title.removeprefix("The ").lower()


def _title(reader: Callable[..., object]) -> str:
    return (sys.modules[reader.__module__].__doc__ or "").partition(":")[0]


def _codes(names: list[str]) -> str:
    return ", ".join(re.sub(r"[\w.-]+", r"`\g<0>`", name, count=1) for name in sorted(names))


def types_table() -> str:
    """A line for each type of weights, in the order of `BLOCK_SIZES`, with what it is in memory.

    And one for each that quantizers write in directories, where "in the file" leaves out the scales.
    """
    head = [
        "| type | bytes a weight in the file | in memory | bytes a weight |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join(head + list(_type_rows()) + list(_level_rows()))


# Types of `LEVEL_FORMATS`: what has them, and bytes of a level.
_LEVELS = {
    "INT4": ("GPTQ and compressed-tensors W4A16, symmetric, float16 scales", 0.5),
    "INT4_ZERO": ("AWQ, and GPTQ and W4A16 with zero points or other scales", 0.5),
    "INT8": ("compressed-tensors W8A8", 1.0),
    "INT8_127": ("LLM.int8()", 1.0),
    "E4M3": ("FP8 (E4M3)", 1.0),
    "NF4": ("bitsandbytes NF4", 0.5),
    "FP4": ("bitsandbytes FP4", 0.5),
}


def _level_rows() -> Iterator[str]:
    for dtype, formats in LEVEL_FORMATS.items():
        title, in_file = _LEVELS[dtype]
        sizes = [f"{4 * panels_size(format, _SIDE, _SIDE) / _SIDE**2:.4g}" for format in formats]
        yield f"| {title} | {in_file:.4g} and scales | as it is | {' or '.join(sizes)} |"


def _type_rows() -> Iterator[str]:
    by_row: dict[tuple[str, str, str], list[str]] = {}
    for dtype, (elements, num_bytes) in BLOCK_SIZES.items():
        kept = [format for format in FORMAT_NAMES if elements > 1 and is_kept(dtype, format)]
        format = kept[0] if kept else FLOAT32
        size = 4 * panels_size(format, _SIDE, _SIDE) / _SIDE**2
        as_it_is = "as it is" if kept or dtype == "F32" else FORMAT_NAMES[format]
        by_row.setdefault((f"{num_bytes / elements:.4g}", as_it_is, f"{size:.4g}"), []).append(dtype)
    for (in_file, name, in_memory), dtypes in by_row.items():
        yield f"| {', '.join(dtypes)} | {in_file} | {name} | {in_memory} |"


TABLES: Mapping[str, Callable[[], str]] = {"models": models_table, "types": types_table}


def with_tables(text: str) -> str:
    """The README with every table between its marks made again."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}, by tests/readme_tables.py -->\n", "\n<!-- end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md: the marks of the table {name} are missing")
        text = before + begin + table() + found + after
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
