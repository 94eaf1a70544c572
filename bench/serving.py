"""The HTTP servers side by side: pagellm's and llama.cpp's, one model file, one load generator, one run.

    python -m bench.serving                     # up to eight minutes, once aiperf and llama-server are there
    python -m bench.serving --levels 16 --json

The load generator is AIPerf (NVIDIA's; it needs no torch, runs without a network and streams). It and
`llama-server` are fetched and built once, into pagellm's cache directory: the latter from the source
distribution of llama-cpp-python, which has it. Both servers are up; one at a time is asked, at each level
first the one and then the other, for texts that neither has seen, and again as long as `minutes` last.
Printed are medians over the rounds, and beside the comparison two figures of the server's own: its throughput
against the bare engine's (`pagellm bench`) at 16 streams, and the CPU time of its event loop for each token.
A run of the load generator that fails, or whose answers are not whole, is repeated once, and then missing.

Each request has a connection of its own: llama-server closes one after a stream, which it offered to keep,
and the next request on it is lost. Threads of OpenMP do not spin at barriers: the load generator runs on the
same cores, and llama-server's threads would mostly wait for one another's turns there. Of what was tried this
is where llama-server is quickest at every level: with OpenMP's default, 1,000 spins, or its own threads
(`GGML_OPENMP=OFF`) it is slower beside a load generator, though quicker alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.gguf_models import model_file
from pagellm.engine.cache import cache_dir

AIPERF = "aiperf==0.13.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
STREAMS = 16  # of the two figures of the server's own, and slots of llama-server
REQUESTS = {1: 4, 4: 12, 16: 48, 64: 96}
OUTPUT_TOKENS = 64
PROMPT_WORDS = 64  # a token each, or a little more
TRIES = 2
LIMIT_S = 120  # of one run of the load generator
# Its tokenizer is loaded by AIPerf, and then not used: the servers count the tokens.
TOKENIZER = Path(__file__).parents[1] / "tests/fixtures/models/llama_tiny"
WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
]  # fmt: skip


@dataclass
class Figures:
    """One level of one server. Times in milliseconds; ITL is between two chunks, of one token each."""

    tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    output_tokens: float
    loop_us_per_token: float


@dataclass
class Server:
    """A server that is up. pid: of the process whose main thread is its event loop."""

    name: str
    url: str
    pid: int


def aiperf() -> Path:
    """The load generator, installed once into an environment of its own."""
    home = cache_dir() / "bench" / "aiperf"
    command = home / "bin" / "aiperf"
    if not command.exists():
        print(f"installing {AIPERF} into {home} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", AIPERF], check=True)
    return command


def llama_server() -> Path:
    """llama.cpp's server, built once from the source distribution of llama-cpp-python."""
    target = cache_dir() / "bench" / "llama-server"
    if target.exists():
        return target
    print(f"building llama-server from {LLAMA_CPP} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        source: list[str] = [
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            LLAMA_CPP,
            "-d",
            directory,
        ]
        # It fetches the archive and then fails to make metadata without build tools, which changes nothing.
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *source], check=False)
        [archive] = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(directory, filter="data")
        [place] = Path(directory).glob("*/vendor/llama.cpp")
        build = Path(directory) / "build"
        off = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "BUILD_UI", "USE_PREBUILT_UI", "OPENSSL")
        settings: list[str] = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
        settings += [f"-DLLAMA_{name}=OFF" for name in off]
        subprocess.run(
            ["cmake", "-S", str(place), "-B", str(build), *settings], check=True, stdout=sys.stderr
        )
        jobs = str(os.cpu_count() or 1)
        built: list[str] = ["cmake", "--build", str(build), "--target", "llama-server", "-j", jobs]
        subprocess.run(built, check=True, stdout=sys.stderr)
        shutil.copy(build / "bin" / "llama-server", target)
    return target


@contextmanager
def serving(name: str, command: Sequence[Any], port: int) -> Iterator[Server]:
    """A server, once its model is loaded."""
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{name} ended: {log.read().decode(errors='replace')[-2000:]}")
                try:
                    with urllib.request.urlopen(f"{url}/health"):
                        break
                except OSError:
                    time.sleep(0.1)
            yield Server(name, url, process.pid)
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def loop_seconds(pid: int) -> float:
    """CPU time of a process's main thread so far."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def measure(command: Path, server: Server, streams: int, rng: random.Random) -> list[Figures]:
    """Asks a server with so many streams at once; nothing if it was not answered whole, `TRIES` times."""
    for _ in range(TRIES):
        figures, told = ask(command, server, streams, rng)
        if figures is not None:
            return [figures]
        print(f"{server.name}, {streams} streams: {told}", file=sys.stderr, flush=True)
    return []


def run_for(command: Sequence[Any], seconds: float) -> tuple[int | None, str]:
    """The status that a command ends with, None if it takes longer, and what it says. Its children end."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return status, log.read().decode(errors="replace")


def warm_up(server: Server) -> None:
    """Lets a server answer something, so that nothing is done for the first time when it is measured."""
    body = {"model": "model", "prompt": " ".join(WORDS), "max_tokens": 8}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/v1/completions", data, headers)
    ) as answer:
        answer.read()


def ask(command: Path, server: Server, streams: int, rng: random.Random) -> tuple[Figures | None, str]:
    """One run of the load generator, and what went wrong where it has no figures."""
    with tempfile.TemporaryDirectory() as directory:
        texts = Path(directory) / "texts.jsonl"
        number = REQUESTS.get(streams, 2 * streams + 4)
        texts.write_text(
            "".join(
                json.dumps({"text": " ".join(rng.choices(WORDS, k=PROMPT_WORDS))}) + "\n"
                for _ in range(number)
            )
        )
        before_s = loop_seconds(server.pid)
        status, said = run_for(
            [
                command, "profile", "-m", "model", "--url", server.url, "--endpoint-type", "completions",
                "--streaming", "--tokenizer", TOKENIZER, "--use-server-token-count", "--ui", "none",
                "--no-gpu-telemetry", "--no-server-metrics", "--input-file", texts,
                "--custom-dataset-type", "single_turn", "--concurrency", str(streams),
                "--request-count", str(number), "--artifact-dir", directory,
                "--extra-inputs", f"max_tokens:{OUTPUT_TOKENS}", "ignore_eos:true", "temperature:0",
                "--connection-reuse-strategy", "never",
                "--workers-max", "2", "--record-processor-service-count", "1",
            ],
            LIMIT_S,
        )  # fmt: skip
        loop_s = loop_seconds(server.pid) - before_s
        found = Path(directory) / "profile_export_aiperf.json"
        if status is None:
            return None, f"aiperf took more than {LIMIT_S} s"
        if status or not found.exists():
            return None, f"aiperf failed: {said[-1000:]}"
        told = json.loads(found.read_text())
    tokens = told["total_output_tokens"]["avg"]
    if tokens != number * OUTPUT_TOKENS:
        expected = number * OUTPUT_TOKENS
        return None, f"found {tokens:.0f} output tokens, expected {expected}: {told.get('error_summary')}"
    ttft, itl = told["time_to_first_token"], told["inter_chunk_latency"]
    figures = Figures(
        told["output_token_throughput"]["avg"], ttft["p50"], ttft["p99"], itl["p50"], itl["p99"], tokens,
        loop_s / tokens * 1e6,
    )  # fmt: skip
    return figures, ""


def bare_engine(model: Path, threads: int) -> float:
    """Output tokens a second of the engine alone for the requests of the level of `STREAMS`."""
    run = subprocess.run(
        [
            sys.executable, "-m", "pagellm", "bench", "--model", model, "--num-threads", str(threads),
            "--batch", str(STREAMS), "--prefill", str(PROMPT_WORDS + 1), "--decode", str(OUTPUT_TOKENS),
            "--json",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    [found] = json.loads(run.stdout)["results"]
    prefill_s = STREAMS * (PROMPT_WORDS + 1) / found["prefill_tokens_per_s"]
    return float(
        STREAMS * OUTPUT_TOKENS / (prefill_s + STREAMS * OUTPUT_TOKENS / found["decode_tokens_per_s"])
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", default="1,4,16,64", help="streams at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="at most (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="after which nothing more is measured (default: %(default)g)",
    )
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the default model's)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--aiperf", type=Path, help="the load generator, where it is installed")
    parser.add_argument("--llama-server", type=Path, help="the other server, where it is built")
    parser.add_argument("--alone", action="store_true", help="pagellm only")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers are ended, too
    levels = [int(level) for level in options.levels.split(",")]
    model = options.model or model_file("Q4_1")
    generator = options.aiperf or aiperf()
    ports = free_port(), free_port()
    commands: list[tuple[str, list[Any]]] = [
        (
            "pagellm",
            [sys.executable, "-m", "pagellm", "serve", "--model", model, "--served-model-name", "model",
             "--port", str(ports[0]), "--num-threads", str(options.threads)],
        )
    ]  # fmt: skip
    if not options.alone:
        context = STREAMS * 4 * (PROMPT_WORDS + OUTPUT_TOKENS)
        commands.append(
            (
                "llama-server",
                [options.llama_server or llama_server(), "-m", model, "--port", str(ports[1]), "-np",
                 str(STREAMS), "-cb", "-c", str(context), "-t", str(options.threads), "-a", "model"],
            )
        )  # fmt: skip
    end_s = time.monotonic() + 60 * options.minutes
    engine_tokens_per_s = bare_engine(model, options.threads)
    rng = random.Random(0)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving(name, command, port))
            for (name, command), port in zip(commands, ports, strict=False)
        ]
        for server in servers:
            warm_up(server)
        runs = {level: {server.name: [] for server in servers} for level in levels}
        for number in range(1, options.rounds + 1):
            round_s = time.monotonic()
            for level in levels:
                for server in servers:
                    if time.monotonic() < end_s:
                        runs[level][server.name] += measure(generator, server, level, rng)
            took_s = time.monotonic() - round_s
            print(f"round {number}: {took_s:.0f} s", file=sys.stderr, flush=True)
            if time.monotonic() + took_s > end_s:
                break
    if not options.json:
        for level in levels:
            show(level, runs[level])
    report(runs, engine_tokens_per_s, options.json)


def middle(figures: Sequence[Figures], name: str) -> float:
    """The median of one figure over the rounds."""
    return float(median(getattr(one, name) for one in figures))


def show(level: int, run: dict[str, list[Figures]]) -> None:
    """Prints one level: a line for each server, then the ratios."""
    names = ("tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    print(f"\n{level} streams" + "".join(f"{name:>14}" for name in names))
    for server, figures in run.items():
        cells = [f"{middle(figures, name):>14.1f}" if figures else f"{'-':>14}" for name in names]
        print(f"  {server:<12}" + "".join(cells), flush=True)
    if len(run) == 2 and all(run.values()):
        ours, theirs = run.values()
        print(f"  {'ratio':<12}" + "".join(f"{middle(ours, n) / middle(theirs, n):>14.2f}" for n in names))


def report(runs: dict[int, dict[str, list[Figures]]], engine_tokens_per_s: float, as_json: bool) -> None:
    """Prints what is the server's own, or everything as JSON."""
    own: dict[str, float] = {"engine_tokens_per_s": engine_tokens_per_s}
    ours = runs.get(STREAMS, {}).get("pagellm")
    if ours:
        own["share_of_engine"] = middle(ours, "tokens_per_s") / engine_tokens_per_s
        own["loop_us_per_token"] = middle(ours, "loop_us_per_token")
    if as_json:
        levels = {
            level: {name: [vars(one) for one in figures] for name, figures in run.items()}
            for level, run in runs.items()
        }
        print(json.dumps({"levels": levels, "own": own}))
    elif len(own) > 1:
        print(
            f"\nat {STREAMS} streams: {own['share_of_engine']:.1%} of the bare engine's "
            f"{engine_tokens_per_s:.1f} tokens/s; the event loop takes {own['loop_us_per_token']:.0f} us "
            "a token"
        )


if __name__ == "__main__":
    main()
