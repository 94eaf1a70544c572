"""What the tokenizer does in a second; for the scheduler see bench_scheduler.py.

Run: python -m pytest bench/bench_tokenizer.py --benchmark-columns=median,ops
"""

from pathlib import Path

from pagellm.engine.tokenizer import load_tokenizer

GPT2 = Path(__file__).parents[1] / "tests" / "fixtures" / "gpt2"


def test_the_tokenizer_on_english(benchmark):
    tokenizer = load_tokenizer(GPT2)
    text = Path(__file__).parents[1].joinpath("README.md").read_text() * 40
    assert tokenizer.decode(tokenizer.encode(text)) == text
    benchmark(tokenizer.encode, text)
    benchmark.extra_info["MB_per_s"] = len(text) / 1e6 / benchmark.stats.stats.median
    print(f"\n{benchmark.extra_info['MB_per_s']:.1f} MB/s")
