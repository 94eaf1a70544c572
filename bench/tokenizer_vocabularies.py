"""Real vocabularies: the ids that llama.cpp expects of them, and how fast they encode.

Run: python bench/tokenizer_vocabularies.py FILE.gguf ...
The source distribution of llama-cpp-python has such files in `vendor/llama.cpp/models`: `ggml-vocab-*.gguf`,
some with texts (`.inp`) and their ids (`.out`). Any other GGUF file with a tokenizer is timed only. Times are
those of the processor: encoding one megabyte a second time, and one megabyte without a space the first time.
"""

import random
import sys
import time
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from pagellm.engine.errors import PagellmError
from pagellm.engine.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[1]
SIZE = 1_000_000
BETWEEN = "\n__ggml_vocab_test__\n"


def texts() -> dict[str, str]:
    """About a megabyte each of English, code and Chinese."""
    english = (ROOT / "engine" / "quantization" / "text.txt").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "engine").rglob("*.py")))
    common = (
        "\u7684\u4e00\u662f\u4e0d\u4e86\u5728\u4eba\u6709\u6211\u4ed6\u8fd9\u4e2d\u5927\u6765\u4e0a\u56fd"
    )
    common += (
        "\u5730\u5230\u65f6\u8981\u4ee5\u4f60\u4eec\u751f\u4f1a\u81ea\u7740\u53bb\u4e4b\u8fc7\u5bb6\u5b66"
    )
    rng = random.Random(0)
    sentences = ["".join(rng.choices(common, k=rng.randrange(4, 20))) + "\u3002" for _ in range(4_000)]
    chinese = "".join(rng.choices(sentences, k=30_000))
    return {
        "English": (english * (SIZE // len(english) + 1))[:SIZE],
        "code": (code * (SIZE // len(code) + 1))[:SIZE],
        "Chinese": chinese[: SIZE // 3],
    }


def without_spaces() -> dict[str, str]:
    """A megabyte each in which a word has no end."""
    rng = random.Random(0)
    points = (rng.randrange(0x80, 0x30000) for _ in range(SIZE // 3))
    return {
        "one letter": "a" * SIZE,
        "letters": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=SIZE)),
        "spaces": " " * SIZE,
        "digits": "".join(rng.choices("0123456789", k=SIZE)),
        "Chinese characters": "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(SIZE // 3)),
        "any characters": "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000),
    }


def metadata(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields
    return {
        key: field.contents() for key, field in fields.items() if key.startswith(("tokenizer.", "general."))
    }


def seconds(tokenizer: Tokenizer, text: str) -> float:
    start = time.process_time()
    tokenizer.encode(text)
    return time.process_time() - start


def compare(path: Path, tokenizer: Tokenizer) -> str:
    """How many of the expected tokenizations are made."""
    inputs, outputs = path.with_name(path.name + ".inp"), path.with_name(path.name + ".out")
    if not inputs.exists():
        return "no expected ids"
    listed = inputs.read_bytes().decode().split(BETWEEN)
    expected = [list(map(int, line.split())) for line in outputs.read_text().split("\n")]
    equal = [
        tokenizer.encode(text, add_special_tokens=False) == ids
        for text, ids in zip(listed, expected, strict=False)
    ]
    return f"{sum(equal)} of {len(equal)} as expected"


def main(paths: list[Path]) -> None:
    for path in paths:
        fields = metadata(path)
        start = time.process_time()
        try:
            tokenizer = load_tokenizer(fields)
        except PagellmError as error:
            print(f"{path.name}: refused: {str(error)[:120]}")
            continue
        loaded = time.process_time() - start
        print(f"{path.name}: loaded in {loaded:.2f} s, {compare(path, tokenizer)}")
        rates = []
        for name, text in texts().items():
            tokenizer.encode(text)
            rates.append(f"{name} {len(text.encode()) / 1e6 / seconds(tokenizer, text):.1f}")
        print(f"  MB/s: {', '.join(rates)}")
        times = [
            f"{name} {seconds(load_tokenizer(fields), text):.2f}" for name, text in without_spaces().items()
        ]
        print(f"  s for 1 MB: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    main(list(map(Path, sys.argv[1:])))
