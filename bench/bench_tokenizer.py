"""What the tokenizer does in a second; for the scheduler see bench_scheduler.py.

Run: python -m pytest bench/bench_tokenizer.py --benchmark-columns=median,ops -s
Beside it stands the `tokenizers` library, where it is installed.
"""

import json
import time
from pathlib import Path

import pytest

from pagellm.engine.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
GPT2 = ROOT / "tests" / "fixtures" / "gpt2"
TEXTS = {
    "english": ROOT.joinpath("README.md").read_text() * 20,
    "chinese": "\u4e2d\u6587\u5b57\u7b26\u6d4b\u8bd5\u3002" * 30_000,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GPT2)


@pytest.mark.parametrize("language", TEXTS)
def test_encode(benchmark, tokenizer, language):
    benchmark(tokenizer.encode, TEXTS[language])
    report(benchmark, language, "encode", lambda library: library.encode(TEXTS[language]))


@pytest.mark.parametrize("language", TEXTS)
def test_decode(benchmark, tokenizer, language):
    ids = tokenizer.encode(TEXTS[language])
    assert tokenizer.decode(ids) == TEXTS[language]
    benchmark(tokenizer.decode, ids)
    report(benchmark, language, "decode", lambda library: library.decode(ids))


def report(benchmark, language, task, run):
    megabytes = len(TEXTS[language].encode()) / 1e6
    benchmark.extra_info["MB_per_s"] = megabytes / benchmark.stats.stats.median
    line = f"\n{language}: {task} {benchmark.extra_info['MB_per_s']:.1f} MB/s"
    library = reference()
    if library is not None:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run(library)
            times.append(time.perf_counter() - start)
        line += f", tokenizers {megabytes / sorted(times)[2]:.1f} MB/s"
    print(line)


def reference():
    """The library's tokenizer for the same files; None where it is not installed."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        return None
    lines = GPT2.joinpath("merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    library = Tokenizer(models.BPE(json.loads(GPT2.joinpath("vocab.json").read_bytes()), merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library
