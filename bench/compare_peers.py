"""pagellm beside its peers, side by side in one run: the same weights at the same number of bits.

Every engine lives in a process of its own; they take turns, round after round, one at a time, and medians
over the rounds are compared. The machine's limits are measured in the same run. Absolute figures depend on
who else uses the machine, the ratios hardly do.

What is compared: the default model in four formats; with --shape a model of a real shape with random weights,
in the mixes of types that llama.cpp's quantizer makes; or with --model any GGUF file. Of the last two every
engine reads the same file as it is.

Peers, set up as is quickest for them: llama.cpp with flash attention, KV in float16 and a stream for each
sequence; OpenVINO GenAI with continuous batching and its own choice of KV precision. Of the default model,
OpenVINO reads neither F32 nor BF16 from GGUF: there it is given F16 and told what to compute in. In four
bits the peers show the published Q4_1 and also Q4_0, which llama.cpp has quicker kernels for. An engine that
does not read a file is skipped and the reason named: OpenVINO 2026.4 has few architectures of GGUF (Llama,
Qwen 2 and 3), and no Q5_0, which Q4_K_M has where rows are no multiple of 256, as in the smallest models.

Beside the speeds: at decode 1 the share of the memory's bandwidth at which an engine reads the file's
weights, and at the end the memory that each process took for the model, beside the file's size and the KV
cache of ours.

Run: python bench/compare_peers.py [--shape llama-3.2-1b --mixes Q4_K_M,Q8_0 | --model PATH] [--json].
The peers: pip install '.[bench-peers]'; what isn't there is skipped and named.
"""

import argparse
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gguf_models import PUBLISHED, matrix_sizes, model_file
from bench.machine import bandwidth_gb_s, peak_gops
from bench.peers import BLOCK_SIZE, KV_BLOCKS, MAX_BATCH, Cell, LlamaCpp, OpenVino, Pagellm, Turns
from bench.random_models import random_model
from bench.shapes import MIXES, SHAPES
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.commands.inspection import inspect_model
from pagellm.engine.config import usable_cores
from pagellm.engine.errors import CheckpointError

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
class Contest:
    """What is compared under one name: the file of each engine, and the products whose peak is the limit."""

    name: str
    ours: Path
    llama_cpp: dict[str, Path]  # by what each is called in the table
    openvino: dict[str, Path]
    products: str  # of `machine.peak_gops`
    quantization: str = "auto"
    openvino_precision: str | None = None


def contest_of_format(name: str) -> Contest:
    """The default model in a format."""
    format = FORMATS[name]
    return Contest(
        name,
        model_file(format.ours),
        {f"llama.cpp {type}": model_file(type) for type in format.llama_cpp},
        {f"OpenVINO {type}": model_file(type) for type in format.openvino},
        name,
        format.quantization,
        format.openvino_precision,
    )


def contest_of_file(name: str, path: Path) -> Contest:
    """One file, which every engine reads."""
    sizes: dict[str, int] = defaultdict(int)
    with open_checkpoint(path) as checkpoint:
        if checkpoint.format != "gguf":
            raise CheckpointError(f"{path}: found a directory of safetensors, expected a GGUF file")
        first = checkpoint.path
        for tensor in checkpoint.tensors.values():
            sizes[tensor.dtype] += tensor.num_bytes
    most = max(sizes, key=sizes.__getitem__)
    products = {"F32": "float32", "F16": "float32", "BF16": "float32"}.get(most, "int8")
    return Contest(name, first, {"llama.cpp": first}, {"OpenVINO": first}, products)


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
    weight_bytes: int  # that a step of ours reads, as the file has them
    bandwidth_shares: dict[str, float]  # of a decode of one sequence, if its engine read so many bytes a step

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


@dataclass(frozen=True)
class Memory:
    """What an engine's process took for the model, in bytes, and what that is held against.

    file_bytes: of its own file. kv_bytes: of the KV cache; known for ours alone.
    """

    format: str
    engine: str
    resident_bytes: int
    file_bytes: int
    kv_bytes: int | None

    @property
    def ratio(self) -> float:
        """What it took to what file and KV cache have."""
        return self.resident_bytes / (self.file_bytes + (self.kv_bytes or 0))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def compare(
    contest: Contest, cells: list[str], rounds: int, threads: int, skipped: dict[str, str]
) -> tuple[list[Row], list[Memory]]:
    """Takes the turns of one contest; adds to `skipped` which engine could not be measured, and why."""
    speeds = {cell: defaultdict[str, list[float]](list) for cell in cells}
    bandwidths: dict[str, list[float]] = {cell: [] for cell in cells}
    peak = peak_gops(contest.products)
    engines: dict[str, Turns] = {}
    memories: list[Memory] = []
    files = {OURS: contest.ours, **contest.llama_cpp, **contest.openvino}
    try:
        for label, make, *arguments in _engines(contest, threads):
            _say(f"{contest.name}: loading {label}")
            try:
                engines[label] = Turns(make, *arguments)
            except RuntimeError as error:
                skipped[f"{contest.name}, {label}"] = str(error)
        for number, cell in itertools.product(range(rounds), cells):
            bandwidths[cell].append(bandwidth_gb_s())  # it drifts with what else the machine does
            for label in list(engines):
                try:
                    speed = engines[label].measure(CELLS[cell])
                except RuntimeError as error:
                    skipped[f"{contest.name}, {label}"] = str(error)
                    engines.pop(label).close()
                    continue
                speeds[cell][label].append(speed)
                _say(f"{contest.name}: round {number + 1} of {rounds}, {cell}, {label}: {speed:.1f}")
        for label, engine in engines.items():
            kv_bytes = _kv_bytes(contest) if label == OURS else None
            resident, file_bytes = int(engine.memory_bytes()), files[label].stat().st_size
            memories.append(Memory(contest.name, label, resident, file_bytes, kv_bytes))
    finally:
        for engine in engines.values():
            engine.close()
    rows = []
    for cell in cells:
        kept = {label: speeds[cell][label] for label in engines}
        medians = {label: median(values) for label, values in kept.items()}
        bandwidth = median(bandwidths[cell])
        num_bytes, limit = _limit(contest, CELLS[cell], bandwidth, peak)
        shares = {}
        if CELLS[cell] == CELLS["decode-1"]:
            for label, speed in medians.items():
                shares[label] = speed * matrix_sizes(files[label])[0] / (bandwidth * 1e9)
        rows.append(Row(contest.name, cell, medians, kept, bandwidth, peak, limit, num_bytes, shares))
    return rows, memories


def _limit(contest: Contest, cell: Cell, bandwidth: float, peak: float) -> tuple[int, float]:
    """Bytes of weights, and tokens a second if they were read once a step, or products ran at the peak.

    Whichever is slower. Attention is not counted.
    """
    tokens = cell.prompt or cell.batch
    num_bytes, layers, output = matrix_sizes(contest.ours, tokens)
    reading = num_bytes / (bandwidth * 1e9)
    multiply_adds = tokens * layers + cell.batch * output
    return num_bytes, tokens / max(reading, 2 * multiply_adds / (peak * 1e9))


def _kv_bytes(contest: Contest) -> int:
    """Of our KV cache, as large as `Pagellm` makes it."""
    report = inspect_model(contest.ours, contest.quantization)
    return int(report["kv_cache"]["bytes_a_token"]) * KV_BLOCKS * BLOCK_SIZE


def _engines(contest: Contest, threads: int) -> list[tuple[Any, ...]]:
    """What to call each engine, its class, and what that is made with."""
    return [
        (OURS, Pagellm, contest.ours, threads, contest.quantization),
        *((label, LlamaCpp, path, threads) for label, path in contest.llama_cpp.items()),
        *(
            (label, OpenVino, path, threads, contest.openvino_precision)
            for label, path in contest.openvino.items()
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="pagellm beside its peers, tokens a second.")
    parser.add_argument(
        "--formats",
        type=_names(FORMATS),
        default=list(FORMATS),
        help=f"of the default model: {','.join(FORMATS)}",
    )
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="a GGUF file in the place of the default model"
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this model's shape in its place")
    parser.add_argument(
        "--mixes",
        type=_names(MIXES),
        default=["Q4_K_M"],
        help=f"of --shape: {','.join(MIXES)} (default: Q4_K_M)",
    )
    parser.add_argument(
        "--max-gb",
        type=float,
        help="of --shape: as many layers as so many GB have room for, or one (every engine holds a copy)",
    )
    parser.add_argument("--cells", type=_names(CELLS), default=list(CELLS), help=",".join(CELLS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="cores to use; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or (arguments.threads or 1) < 1:
        parser.error("--rounds and --threads: expected 1 or more")
    if arguments.model and arguments.shape:
        parser.error("--model and --shape: found both, expected one of them")
    if arguments.max_gb is not None and not (arguments.shape and arguments.max_gb > 0):
        parser.error("--max-gb: expected a number above 0, beside --shape")
    if arguments.threads and hasattr(os, "sched_setaffinity"):
        # So that the limits are of these cores, too, and no engine finds others.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    threads = arguments.threads or usable_cores()
    rows: list[Row] = []
    memories: list[Memory] = []
    skipped: dict[str, str] = {}
    try:
        contests = list(_contests(arguments))
    except CheckpointError as error:
        parser.error(str(error))
    for contest in contests:
        of_contest = compare(contest, arguments.cells, arguments.rounds, threads, skipped)
        rows += of_contest[0]
        memories += of_contest[1]
    versions = {package: _version(package) for package in PACKAGES}
    if arguments.json:
        result = {"threads": threads, "versions": versions, "skipped": skipped}
        result |= {"rows": [row.as_json() for row in rows], "memory": [one.as_json() for one in memories]}
        print(json.dumps(result, indent=2))
    else:
        print(", ".join(f"{package} {version}" for package, version in versions.items()))
        print(f"{threads} threads. Tokens a second; ratio: ours to the best peer; share: ours of the limit")
        _print_tables(rows)
        _print_memory(memories)
        for label, reason in skipped.items():
            print(f"skipped {label}: {reason}")
    sys.exit(any(label.endswith(OURS) for label in skipped))


def _contests(arguments: argparse.Namespace) -> Iterator[Contest]:
    if arguments.model:
        yield contest_of_file(arguments.model.name, arguments.model)
    elif arguments.shape:
        for mix in arguments.mixes:
            _say(f"{arguments.shape} in {mix}: writing random weights, once")
            path = random_model(arguments.shape, mix, arguments.max_gb)
            yield contest_of_file(f"{path.name.removesuffix(f'.{mix}.gguf')} {mix}", path)
    else:
        for name in arguments.formats:
            yield contest_of_format(name)


def _print_memory(memories: list[Memory]) -> None:
    print("\nMemory in MB for the model, beside the file's size and the KV cache of ours")
    for one in memories:
        kv = "" if one.kv_bytes is None else f" + {one.kv_bytes / 1e6:.0f}"
        print(
            f"{one.format}, {one.engine}: {one.resident_bytes / 1e6:.0f} of {one.file_bytes / 1e6:.0f}{kv}, "
            f"{one.ratio:.3f}"
        )


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
            if row.bandwidth_shares:
                shares = (f"{_number(row.bandwidth_shares[label], 2):>14}" for label in labels)
                print(f"{'bandwidth':10}", *shares)


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
