"""What each format costs in quality: perplexity and Kullback-Leibler divergence on a fixed text.

The text is `engine/quantization/text.txt`: the first chapters of Jane Austen's Pride and Prejudice (1813,
public domain). It is read in windows of `WINDOW` tokens, each from an empty context; every token's
distribution counts in the divergence, every token but a window's first in the perplexity.

The default model was published in four bits (Q4_1, its embedding Q8_0), and the other files are made from
that: F32 holds the very values of the published file, BF16, Q8_0 and Q4_0 round them again. So there are two
references, both computed in float32 throughout:

    total       the F32 file, by the same engine: what the format costs altogether
    arithmetic  the values in this very file, by pagellm: what the rounding of activations and of the KV cache
                costs, apart from the rounding of the weights (unknown where the weights are rounded on load)

llama.cpp runs as it does by default, with flash attention and a float16 KV cache (float32 in its reference).
A format that is made on load has no file, so nothing of llama.cpp's beside it.

Run: python bench/quality.py [--json]. Without llama-cpp-python its columns stay empty.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from bench.gguf_models import PUBLISHED, model_file
from bench.peers import LOGITS_WINDOW as WINDOW
from bench.peers import LlamaCpp
from pagellm.engine import LLM
from pagellm.engine.config import usable_cores
from pagellm.engine.tokenizer import Tokenizer

TEXT = Path(__file__).parents[1] / "engine" / "quantization" / "text.txt"
SLICE = 64  # rows of logits that are turned to probabilities at a time

Logits = NDArray[np.float32]  # [tokens, vocabulary]


@dataclass(frozen=True)
class Format:
    """A file's type and what pagellm makes of it; llama.cpp computes with it as it is."""

    file_type: str
    quantization: str = "auto"


FORMATS = {
    "float32": Format("F32", "none"),
    "bf16": Format("BF16", "bf16"),
    "int8, Q8_0": Format("Q8_0"),
    "int4, Q4_1": Format(PUBLISHED),
    "int4, Q4_0": Format("Q4_0"),
    "int8, made on load": Format("F32", "int8"),
    "int4, made on load": Format("F32", "int4"),
}
FLOAT32 = "float32"
REFERENCE = FORMATS[FLOAT32].file_type
SAME_VALUES = PUBLISHED  # what that was made from, without rounding


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence from a reference, in nats a token."""

    mean: float
    percentile_99: float


@dataclass(frozen=True)
class Quality:
    """One engine's figures in one format."""

    perplexity: float
    total: Divergence | None  # None for the reference itself
    arithmetic: Divergence | None  # None where no file holds the rounded weights


@dataclass(frozen=True)
class Row:
    """What one format came to; llama_cpp: None where it has no such file or isn't installed."""

    format: str
    pagellm: Quality
    llama_cpp: Quality | None

    @property
    def ratio(self) -> float | None:
        """Our mean total divergence to llama.cpp's."""
        ours, theirs = self.pagellm.total, self.llama_cpp and self.llama_cpp.total
        return ours.mean / theirs.mean if ours and theirs else None


def windows(tokenizer: Tokenizer) -> list[list[int]]:
    """The text's tokens, `WINDOW` at a time."""
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    return [token_ids[first : first + WINDOW] for first in range(0, len(token_ids), WINDOW)]


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """The logarithm of softmax, row by row."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def perplexity(texts: list[list[int]], logits: list[Logits]) -> float:
    """e to the power of the mean surprise at each token that follows another in its window."""
    surprises = []
    for token_ids, rows in zip(texts, logits, strict=True):
        for first in range(0, len(token_ids) - 1, SLICE):
            targets = token_ids[first + 1 : first + 1 + SLICE]
            scores = log_probabilities(rows[first : first + len(targets)])
            surprises.append(-scores[np.arange(len(targets)), targets])
    return float(np.exp(np.concatenate(surprises).mean()))


def divergence(reference: list[Logits], logits: list[Logits]) -> Divergence:
    """How far the distributions of `logits` are from those of the reference, over all tokens."""
    divergences = []
    for expected, found in zip(reference, logits, strict=True):
        for first in range(0, len(expected), SLICE):
            p, q = (log_probabilities(rows[first : first + SLICE]) for rows in (expected, found))
            divergences.append((np.exp(p) * (p - q)).sum(axis=1))
    each = np.concatenate(divergences)
    return Divergence(float(each.mean()), float(np.percentile(each, 99)))


class Runs:
    """The logits of the whole text by either engine; each engine's reference is kept once computed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.texts: list[list[int]] = []
        self._kept: dict[str, list[Logits]] = {}

    def pagellm(self, file_type: str, quantization: str) -> list[Logits]:
        """By this project."""

        def run() -> list[Logits]:
            llm = LLM(
                str(model_file(file_type)),
                quantization=quantization,
                max_model_len=WINDOW + 1,
                enable_prefix_caching=False,
                num_threads=self.threads,
                show_progress=False,
            )
            self.texts = self.texts or windows(llm.tokenizer)
            logits = [llm.logits(token_ids) for token_ids in self.texts]
            llm.close()
            return logits

        is_reference = quantization == "none" and file_type in (REFERENCE, SAME_VALUES)
        return self._keep("pagellm", run) if is_reference else run()

    def llama_cpp(self, file_type: str) -> list[Logits]:
        """By llama.cpp."""
        is_reference = file_type == REFERENCE

        def run() -> list[Logits]:
            llama = LlamaCpp(model_file(file_type), self.threads, exact=is_reference)
            logits = [llama.logits(token_ids) for token_ids in self.texts]
            llama.close()
            return logits

        return self._keep("llama.cpp", run) if is_reference else run()

    def _keep(self, key: str, run: Callable[[], list[Logits]]) -> list[Logits]:
        if key not in self._kept:
            self._kept[key] = run()
        return self._kept[key]


def quality(
    texts: list[list[int]], logits: list[Logits], total: list[Logits], values: list[Logits] | None
) -> Quality:
    """The figures of a run, held against its engine's reference and its file's own values."""
    return Quality(
        perplexity(texts, logits),
        None if logits is total else divergence(total, logits),
        None if values is None else divergence(values, logits),
    )


def measure(names: list[str], threads: int) -> Iterator[Row]:
    """A row for each format, in order."""
    runs = Runs(threads)
    our_reference = runs.pagellm(REFERENCE, "none")
    for name in names:
        format = FORMATS[name]
        made_on_load = format.file_type == REFERENCE and name != FLOAT32
        print(f"{name}: pagellm", file=sys.stderr, flush=True)
        values = None if made_on_load else runs.pagellm(format.file_type, "none")
        logits = runs.pagellm(format.file_type, format.quantization)
        ours = quality(runs.texts, logits, our_reference, values)
        theirs = None
        if find_spec("llama_cpp") and not made_on_load:
            print(f"{name}: llama.cpp", file=sys.stderr, flush=True)
            logits = runs.llama_cpp(format.file_type)
            theirs = quality(runs.texts, logits, runs.llama_cpp(REFERENCE), values)
        yield Row(name, ours, theirs)


def print_table(rows: list[Row]) -> None:
    print("KL divergence in thousandths of a nat: mean / 99th percentile; ratio: of the total means")
    columns = f"{'perplexity':>11}{'total':>16}{'arithmetic':>16}"
    print(f"{'':20}{'pagellm':>43}{'llama.cpp':>43}\n{'':20}{columns}{columns}{'ratio':>7}")
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        print(f"{row.format:20}{_cells(row.pagellm)}{_cells(row.llama_cpp)}{ratio:>7}")


def _cells(quality: Quality | None) -> str:
    if quality is None:
        return f"{'-':>11}{'-':>16}{'-':>16}"
    return f"{quality.perplexity:11.3f}{_cell(quality.total)}{_cell(quality.arithmetic)}"


def _cell(divergence: Divergence | None) -> str:
    if divergence is None:
        return f"{'-':>16}"
    return f"{1e3 * divergence.mean:9.3f}/{1e3 * divergence.percentile_99:6.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity and KL divergence of each format.")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    rows = list(measure(arguments.formats, arguments.threads))
    if not find_spec("llama_cpp"):
        print("skipped llama.cpp: llama-cpp-python is not installed", file=sys.stderr)
    if arguments.json:
        results: list[dict[str, Any]] = [asdict(row) | {"ratio": row.ratio} for row in rows]
        print(json.dumps({"text": TEXT.name, "window": WINDOW, "rows": results}, indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
