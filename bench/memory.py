"""What a process takes for a model, by what for: beside its file's size and the KV cache.

The floor is the interpreter with Numba and the compiled kernels, the same for every model. On top of it are
the weights, which may be a little larger than in the file (Q4_K's six-bit scales are bytes in memory); the KV
cache; what a step computes with, which follows from --max-num-batched-tokens; and the tokenizer with all
other objects. Resident memory is that of /proc/self/status; peaks count from when loading begins.

Run: python bench/memory.py MODEL [--batch 16 --max-num-batched-tokens 512] [--json]
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from bench.peers import BLOCK_SIZE, CONTEXT
from pagellm.engine import EngineConfig, LLMEngine
from pagellm.engine.checkpoints import open_checkpoint, resolve_model
from pagellm.engine.commands.throughput import measure
from pagellm.engine.execution.compilation import compile_kernels

PROMPT = 512


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def arrays(value: object) -> Iterator[NDArray[np.generic]]:
    """All arrays of a tuple of arrays and tuples."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from arrays(part)


def report(model: str, batch: int, max_tokens: int) -> dict[str, float]:
    """The figures, in bytes; ratios are of what was taken to what file and KV cache have."""
    path = resolve_model(model)
    with open_checkpoint(path) as checkpoint:
        file_bytes = sum(file.num_bytes for file in checkpoint.files)
    compile_kernels()
    floor = status("VmRSS")
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=max(PROMPT // BLOCK_SIZE + 2, batch * (CONTEXT // BLOCK_SIZE + 2)),
        max_num_seqs=batch,
        max_num_batched_tokens=max_tokens,
        max_model_len=2 * PROMPT,
        enable_prefix_caching=False,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now's
    engine = LLMEngine(str(path), config)
    peak, loaded, runner = status("VmHWM") - floor, status("VmRSS") - floor, engine.runner
    weights = sum(array.nbytes for array in arrays(tuple(runner.weights)))
    kv_cache = sum(array.nbytes for array in arrays(tuple(runner.cache)))
    measure(engine, 1, PROMPT, 1, 1)
    measure(engine, batch, CONTEXT, 4, 1)
    taken = status("VmRSS") - floor
    objects = loaded - weights
    return {
        "file": file_bytes,
        "kv_cache": kv_cache,
        "floor": floor,
        "weights": weights,
        "tokenizer_and_objects": objects,
        "working": taken - loaded - kv_cache,
        "taken": taken,
        "ratio": taken / (file_bytes + kv_cache),
        "loading_peak": peak,
        "loading_peak_ratio": peak / file_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a process takes for a model, by what for.")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    figures = report(arguments.model, arguments.batch, arguments.max_num_batched_tokens)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        shown = f"{value:.3f}" if name.endswith("ratio") else f"{value / 1e6:,.1f} MB"
        print(f"{name.replace('_', ' '):24}{shown:>14}")


if __name__ == "__main__":
    main()
