"""A long context in the default model's shape: what it takes, and whether chunks change a bit of its answers.

The model is the default one with its context stretched by YaRN, in a file made for the run. A text of
`--tokens` tokens has three needles in it, at 10, 50 and 90 % of its depth; each is asked for in a request of
its own, and the requests share all but the question. They are served twice: with the prompt computed in
chunks of `--chunk` tokens, and in one. The logits of each answer's tokens must be the same, bit for bit.

Printed: how long each prefill takes, what the engine said beforehand that it would take of memory, and what
the process took. Attention over a context grows with its square: estimate from a shorter one first. With
`--window` it does not, and the cache is as large as the window and a chunk.

Run: python bench/long_context.py [--tokens 131072] [--quantization int8] [--window N] [--chunks-only]
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from pagellm import LLM, SamplingParams
from pagellm.engine.checkpoints import resolve_model
from pagellm.engine.config import DEFAULT_MODEL
from pagellm.engine.execution.model_runner import RunnerOutput
from pagellm.engine.scheduling.batch import ScheduledBatch

TEXT = Path(__file__).parents[1] / "engine" / "quantization" / "text.txt"
DEPTHS = (0.1, 0.5, 0.9)
NEEDLES = (("Lisbon", "74913"), ("Oslo", "20586"), ("Cairo", "61342"))
ANSWER_TOKENS = 6


@dataclass(frozen=True)
class Run:
    """One way of serving the requests, a list of three of each.

    logits: [tokens of an answer, vocab_size].
    """

    prefill_s: float
    cached_tokens: list[int]
    answers: list[str]
    needed_bytes: dict[str, int]
    taken_bytes: int
    logits: list[NDArray[np.float32]]


def stretched_model(directory: Path, num_tokens: int, window: int | None) -> Path:
    """The default model's file with YaRN for so many tokens; if asked for, with a window in all layers."""
    reader = gguf.GGUFReader(resolve_model(DEFAULT_MODEL))
    architecture = str(reader.fields["general.architecture"].contents())
    path = directory / "stretched.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *rest = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=rest[-1] if rest else None)
    original = int(reader.fields[f"{architecture}.context_length"].contents())
    if num_tokens > original:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(num_tokens / original)
        writer.add_rope_scaling_orig_ctx_len(original)
    if window is not None:
        writer.add_sliding_window(window)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prompts_of(llm: LLM, num_tokens: int) -> list[list[int]]:
    """A prompt for each needle; together with its answer each has at most `num_tokens` tokens."""
    encode = llm.tokenizer.encode
    questions = [encode(f"\n\nThe secret number of {city} is") for city, _ in NEEDLES]
    needles = [encode(f"\n\nThe secret number of {city} is {number}.\n\n") for city, number in NEEDLES]
    length = num_tokens - ANSWER_TOKENS - max(map(len, questions)) - sum(map(len, needles))
    text = encode(TEXT.read_text("utf-8"))
    hay = (text * (length // len(text) + 1))[:length]
    places = [0, *(int(depth * length) for depth in DEPTHS), length]
    haystack: list[int] = []
    for number in range(len(NEEDLES) + 1):
        haystack += hay[places[number] : places[number + 1]]
        haystack += needles[number] if number < len(NEEDLES) else []
    return [haystack + question for question in questions]


def keep_logits(llm: LLM) -> list[NDArray[np.float32]]:
    """A list that gets the logits of every token that is sampled from now on, one sequence at a time."""
    runner, kept = llm.engine.runner, list[NDArray[np.float32]]()
    run, vocab_size = runner.run, llm.engine.spec.vocab_size

    def run_and_keep(batch: ScheduledBatch, *arguments: Any) -> RunnerOutput:
        output = run(batch, *arguments)
        if batch.sampled:
            kept.append(runner.workspace.logits[:vocab_size].copy())
        return output

    runner.run = run_and_keep  # type: ignore[method-assign]
    return kept


def serve(model: Path, num_tokens: int, chunk: int, quantization: str, window: int | None) -> Run:
    """Serves the three requests, one after the other."""
    before = peak_bytes()
    llm = LLM(
        str(model),
        quantization=quantization,
        max_model_len=num_tokens,
        num_blocks=-(-num_tokens // 16) + 64 if window is None else None,
        max_num_batched_tokens=chunk,
        max_num_seqs=1,
        show_progress=False,
    )
    needed = dict(llm.engine.memory_needed)
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
    say(f"chunks of {chunk}: will take {sum(needed.values()) / 1e9:.2f} GB: {parts}")
    logits = keep_logits(llm)
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    outputs = []
    for prompt in prompts_of(llm, num_tokens):
        outputs += llm.generate([prompt], params)
    metrics = outputs[0].metrics
    assert metrics.first_token_s is not None
    run = Run(
        prefill_s=metrics.first_token_s,
        cached_tokens=[output.metrics.num_cached_tokens for output in outputs],
        answers=[output.text for output in outputs],
        needed_bytes=needed,
        taken_bytes=peak_bytes() - before,
        logits=[np.stack(logits[i : i + ANSWER_TOKENS]) for i in range(0, len(logits), ANSWER_TOKENS)],
    )
    llm.close()
    say(
        f"chunks of {chunk}: prefill {run.prefill_s:.1f} s, {num_tokens / run.prefill_s:,.0f} tok/s; took "
        f"{run.taken_bytes / 1e9:.2f} GB; answers {run.answers}"
    )
    return run


def peak_bytes() -> int:
    """The most memory that this process has held; getrusage would count that of its parent, too."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    [line] = [line for line in status if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def say(text: str) -> None:
    """To standard error, so that standard output is the result alone."""
    print(text, file=sys.stderr, flush=True)


def in_own_process(*arguments: Any) -> Run:
    """What `serve` gives: the memory that a process took at most is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(serve, *arguments).result()


def main() -> int:
    """The exit status is 1 if a chunk changed a bit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072, metavar="N", help="of prompt and answer")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens of a chunk")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--window", type=int, metavar="N", help="a sliding window in all layers")
    parser.add_argument("--chunks-only", action="store_true", help="without the prompt in one chunk")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chunks = [options.chunk] if options.chunks_only else [options.chunk, options.tokens]
    with tempfile.TemporaryDirectory() as name:
        model = stretched_model(Path(name), options.tokens, options.window)
        runs = {
            chunk: in_own_process(model, options.tokens, chunk, options.quantization, options.window)
            for chunk in chunks
        }
    first, *others = runs.values()
    same = [
        all(np.array_equal(own, other.logits[number]) for other in others)
        for number, own in enumerate(first.logits)
    ]
    result = {
        "tokens": options.tokens,
        "quantization": options.quantization,
        "window": options.window,
        "needles": [
            {"depth": depth, "answer": answer, "expected": expected, "same_bits": one if others else None}
            for depth, answer, (_, expected), one in zip(DEPTHS, first.answers, NEEDLES, same, strict=True)
        ],
        "runs": [
            {"chunk": chunk} | {k: v for k, v in vars(run).items() if k != "logits"}
            for chunk, run in runs.items()
        ],
    }
    print(json.dumps(result) if options.json else to_text(result))
    return 0 if all(same) else 1


def to_text(result: dict[str, Any]) -> str:
    """A line for each needle and each run."""
    lines = [f"{result['tokens']:,} tokens, {result['quantization']}"]
    for needle in result["needles"]:
        same = {True: "the same bits", False: "OTHER BITS", None: "not compared"}[needle["same_bits"]]
        lines.append(f"needle at {needle['depth']:.0%}: {needle['expected']} -> {needle['answer']!r}: {same}")
    for run in result["runs"]:
        needed = sum(run["needed_bytes"].values())
        lines.append(
            f"chunks of {run['chunk']:,}: prefill {run['prefill_s']:.1f} s, "
            f"{result['tokens'] / run['prefill_s']:,.0f} tok/s; memory {needed / 1e9:.2f} GB said, "
            f"{run['taken_bytes'] / 1e9:.2f} GB taken, the kernels' code and the tokenizer included"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
