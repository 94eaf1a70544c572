"""pagellm beside its peers, side by side in one run: the same weights at the same number of bits.

Every engine lives in a process of its own; they take turns, round after round, one at a time, and medians
over the rounds are compared. The machine's limits are measured in the same run. Absolute figures depend on
who else uses the machine, the ratios hardly do.

Peers, set up as is quickest for them: llama.cpp with flash attention, KV in float16 and a stream for each
sequence; OpenVINO GenAI with continuous batching and its own choice of KV precision. OpenVINO reads neither
F32 nor BF16 from GGUF: there it is given F16 and told what to compute in. In four bits the peers show the
published Q4_1 and also Q4_0, which llama.cpp has quicker kernels for.

Run: python bench/compare_peers.py [--json]. The peers: pip install '.[bench-peers]'; what isn't there is
skipped and named.
"""

import argparse
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gguf_models import PUBLISHED, matrix_sizes, model_file
from bench.machine import bandwidth_gb_s, peak_gops
from bench.peers import MAX_BATCH, Cell, LlamaCpp, OpenVino, Pagellm, Turns
from pagellm.engine.config import usable_cores

OURS = "pagellm"
PACKAGES = ("pagellm", "llama-cpp-python", "openvino-genai")
CELLS = {"prefill": Cell(1, prompt=512), "decode-1": Cell(1), "decode-16": Cell(MAX_BATCH)}


@dataclass(frozen=True)
class Format:
    """pagellm's quantization, and the types of GGUF file that it and the peers are given."""

    quantization: str
    ours: str
    llama_cpp: tuple[str, ...]
    openvino: tuple[str, ...]
    openvino_precision: str | None = None  # None: the default for quantized weights


FORMATS = {
    "float32": Format("none", "F32", ("F32",), ("F16",), "f32"),
    "bf16": Format("bf16", "BF16", ("BF16",), ("F16",), "bf16"),
    "int8": Format("int8", "Q8_0", ("Q8_0",), ("Q8_0",)),
    "int4": Format("int4", PUBLISHED, (PUBLISHED, "Q4_0"), (PUBLISHED, "Q4_0")),
}


@dataclass(frozen=True)
class Row:
    """What one cell of one format came to: tokens a second, medians over the rounds and each of them.

    `limit` is what the machine allows, from the bandwidth and the peak that were measured in the same run.
    """

    format: str
    cell: str
    tokens_per_s: dict[str, float]
    rounds: dict[str, list[float]]
    bandwidth_gb_s: float
    peak_gops: float
    limit: float

    @property
    def best_peer(self) -> str | None:
        peers = [label for label in self.tokens_per_s if label != OURS]
        return max(peers, key=self.tokens_per_s.__getitem__, default=None)

    @property
    def ratio(self) -> float | None:
        """Ours to the best peer's."""
        if self.best_peer is None or OURS not in self.tokens_per_s:
            return None
        return self.tokens_per_s[OURS] / self.tokens_per_s[self.best_peer]

    @property
    def share_of_limit(self) -> float | None:
        return self.tokens_per_s[OURS] / self.limit if OURS in self.tokens_per_s else None

    def as_json(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("best_peer", "ratio", "share_of_limit")}
        return asdict(self) | derived


def compare(name: str, cells: list[str], rounds: int, threads: int, skipped: dict[str, str]) -> list[Row]:
    """Takes the turns of one format; adds to `skipped` which engine could not be measured, and why."""
    speeds = {cell: defaultdict[str, list[float]](list) for cell in cells}
    bandwidths: dict[str, list[float]] = {cell: [] for cell in cells}
    peak = peak_gops(name)
    engines: dict[str, Turns] = {}
    try:
        for label, make, *arguments in _engines(FORMATS[name], threads):
            _say(f"{name}: loading {label}")
            try:
                engines[label] = Turns(make, *arguments)
            except RuntimeError as error:
                skipped[f"{name}, {label}"] = str(error)
        for number, cell in itertools.product(range(rounds), cells):
            bandwidths[cell].append(bandwidth_gb_s())  # it drifts with what else the machine does
            for label in list(engines):
                try:
                    speed = engines[label].measure(CELLS[cell])
                except RuntimeError as error:
                    skipped[f"{name}, {label}"] = str(error)
                    engines.pop(label).close()
                    continue
                speeds[cell][label].append(speed)
                _say(f"{name}: round {number + 1} of {rounds}, {cell}, {label}: {speed:.1f}")
    finally:
        for engine in engines.values():
            engine.close()
    rows = []
    for cell in cells:
        kept = {label: speeds[cell][label] for label in engines}
        medians = {label: median(values) for label, values in kept.items()}
        bandwidth = median(bandwidths[cell])
        limit = _limit(name, CELLS[cell], bandwidth, peak)
        rows.append(Row(name, cell, medians, kept, bandwidth, peak, limit))
    return rows


def _limit(name: str, cell: Cell, bandwidth: float, peak: float) -> float:
    """Tokens a second if weights were read once a step, or products ran at the peak: whichever is slower.

    Attention is not counted.
    """
    num_bytes, layers, output = matrix_sizes(model_file(FORMATS[name].ours))
    reading = num_bytes / (bandwidth * 1e9)
    tokens = cell.prompt or cell.batch
    multiply_adds = tokens * layers + cell.batch * output
    return tokens / max(reading, 2 * multiply_adds / (peak * 1e9))


def _engines(format: Format, threads: int) -> list[tuple[Any, ...]]:
    """What to call each engine, its class, and what that is made with."""
    return [
        (OURS, Pagellm, model_file(format.ours), threads, format.quantization),
        *((f"llama.cpp {type}", LlamaCpp, model_file(type), threads) for type in format.llama_cpp),
        *(
            (f"OpenVINO {type}", OpenVino, model_file(type), threads, format.openvino_precision)
            for type in format.openvino
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="pagellm beside its peers, tokens a second.")
    parser.add_argument("--formats", type=_names(FORMATS), default=list(FORMATS), help=",".join(FORMATS))
    parser.add_argument("--cells", type=_names(CELLS), default=list(CELLS), help=",".join(CELLS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="cores to use; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or (arguments.threads or 1) < 1:
        parser.error("--rounds and --threads: expected 1 or more")
    if arguments.threads and hasattr(os, "sched_setaffinity"):
        # So that the limits are of these cores, too, and no engine finds others.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    threads = arguments.threads or usable_cores()
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for name in arguments.formats:
        rows += compare(name, arguments.cells, arguments.rounds, threads, skipped)
    versions = {package: _version(package) for package in PACKAGES}
    if arguments.json:
        result = {"threads": threads, "versions": versions, "skipped": skipped}
        print(json.dumps(result | {"rows": [row.as_json() for row in rows]}, indent=2))
    else:
        print(", ".join(f"{package} {version}" for package, version in versions.items()))
        print(f"{threads} threads. Tokens a second; ratio: ours to the best peer; share: ours of the limit")
        _print_tables(rows)
        for label, reason in skipped.items():
            print(f"skipped {label}: {reason}")
    sys.exit(any(label.endswith(OURS) for label in skipped))


def _print_tables(rows: list[Row]) -> None:
    for name, group in itertools.groupby(rows, key=lambda row: row.format):
        in_format = list(group)
        first = in_format[0]
        labels = list(first.tokens_per_s)
        print(f"\n{name}; peak {_number(first.peak_gops)} Gop/s")
        derived = f"{'ratio':>8}{'GB/s':>8}{'limit':>8}{'share':>8}"
        print(f"{'':10}", *(f"{label:>14}" for label in labels), derived)
        for row in in_format:
            speeds = (f"{_number(row.tokens_per_s[label]):>14}" for label in labels)
            derived = f"{_number(row.ratio, 2):>8}{_number(row.bandwidth_gb_s):>8}{_number(row.limit):>8}"
            print(f"{row.cell:10}", *speeds, f"{derived}{_number(row.share_of_limit, 2):>8}")


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _names(known: dict[str, Any]) -> Callable[[str], list[str]]:
    """Parses names with commas between them."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}, expected some of {','.join(known)}")
        return text.split(",")

    return names


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
