"""The engines that are compared, behind one interface, each as quick as its settings make it.

Knows how to make an engine, what a cell of the comparison asks of it, and how to keep it in a process of its
own; knows nothing of rounds, ratios and tables. An engine's package is imported when the engine is made.
"""

import ctypes
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.gguf_models import EMBEDDING
from pagellm.engine.checkpoints import open_checkpoint

CONTEXT = 128
DECODE_STEPS = 32
PREFILLS = 3  # timed in a turn, after one that isn't
MAX_BATCH = 16
BLOCK_SIZE = 16
# Of pagellm's KV cache: as many tokens as the largest cell has, and room to grow by a block.
KV_BLOCKS = MAX_BATCH * (-(-(CONTEXT + DECODE_STEPS) // BLOCK_SIZE) + 1)
LOGITS_WINDOW = 512


@dataclass(frozen=True)
class Cell:
    """Prefill where `prompt` is computed for its last logits; else decode steps after CONTEXT tokens."""

    batch: int
    prompt: int = 0


class Engine(Protocol):
    """One engine with one model, using a fixed number of threads.

    base_bytes: what its process took before it read the model, libraries and kernels included.
    """

    base_bytes: int

    def measure(self, cell: Cell) -> float:
        """Tokens a second, the median within one turn."""
        ...


class Pagellm:
    """This project, through the engine's own measurement."""

    def __init__(self, path: Path, threads: int, quantization: str) -> None:
        from pagellm.engine import EngineConfig, LLMEngine
        from pagellm.engine.execution.compilation import compile_kernels

        compile_kernels(False)
        self.base_bytes = resident_bytes()
        config = EngineConfig(
            quantization=quantization,
            num_threads=threads,
            block_size=BLOCK_SIZE,
            num_blocks=KV_BLOCKS,
            max_num_seqs=MAX_BATCH,
            max_model_len=1024,
            enable_prefix_caching=False,
        )
        self.engine = LLMEngine(str(path), config)

    def measure(self, cell: Cell) -> float:
        from pagellm.engine.commands.throughput import measure

        if cell.prompt:
            return measure(self.engine, 1, cell.prompt, 1, PREFILLS).prefill_tokens_per_s
        return measure(self.engine, cell.batch, CONTEXT, DECODE_STEPS, 1).decode_tokens_per_s


class LlamaCpp:
    """llama.cpp through the C interface that llama-cpp-python wraps, with flash attention.

    The KV cache is llama.cpp's default, float16, a stream for each sequence; `exact` makes it float32.
    """

    def __init__(self, path: Path, threads: int, exact: bool = False) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.base_bytes = resident_bytes()
        self.threads = threads
        self.exact = exact
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"cannot read {path.name}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context = cache(self._new_context)
        self.batch = llama_cpp.llama_batch_init(CONTEXT * MAX_BATCH, 0, 1)

    def measure(self, cell: Cell) -> float:
        if cell.prompt:
            times = [self._prefill(1, cell.prompt) for _ in range(1 + PREFILLS)]
            return cell.prompt / median(times[1:])
        self._prefill(cell.batch, CONTEXT)
        steps = [
            self._decode(cell.batch, [(sequence, CONTEXT + step, True) for sequence in range(cell.batch)])
            for step in range(DECODE_STEPS)
        ]
        return cell.batch / median(steps)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of at most LOGITS_WINDOW tokens, [len(token_ids), vocab_size]."""
        self._clear(1)
        self._decode(1, [(0, position, True) for position in range(len(token_ids))], token_ids)
        pointer = self.api.llama_get_logits(self.context(1))
        return np.ctypeslib.as_array(pointer, (len(token_ids), self.vocab_size)).copy()

    def close(self) -> None:
        """Gives its memory back."""
        self.api.llama_batch_free(self.batch)
        if self.context.cache_info().currsize:
            self.api.llama_free(self.context(1))
        self.api.llama_model_free(self.model)

    def _new_context(self, batch: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = 1024 if batch == 1 else 256 * batch  # each sequence has its share, which is quicker
        params.n_batch = CONTEXT * MAX_BATCH
        params.n_ubatch = LOGITS_WINDOW
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self.exact:
            params.type_k = params.type_v = self.api.GGML_TYPE_F32
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("cannot make a context")
        return context

    def _clear(self, batch: int) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context(batch)), False)

    def _prefill(self, batch: int, prompt: int) -> float:
        self._clear(batch)
        tokens = [(sequence, i, i == prompt - 1) for sequence in range(batch) for i in range(prompt)]
        return self._decode(batch, tokens)

    def _decode(
        self, batch: int, tokens: list[tuple[int, int, bool]], token_ids: Sequence[int] | None = None
    ) -> float:
        """The seconds of one call, given (sequence, position, are logits wanted) of each token.

        token_ids: random ones unless given.
        """
        self.batch.n_tokens = len(tokens)
        for i, (sequence, position, wanted) in enumerate(tokens):
            self.batch.token[i] = token_ids[i] if token_ids else random.randrange(self.vocab_size)
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = wanted
        context = self.context(batch)
        start = time.perf_counter()
        status = self.api.llama_decode(context, self.batch)
        self.api.llama_synchronize(context)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds


class OpenVino:
    """OpenVINO GenAI's continuous batching pipeline, which reads GGUF files itself."""

    def __init__(self, path: Path, threads: int, precision: str | None) -> None:
        import openvino_genai

        with open_checkpoint(path) as checkpoint:
            self.vocab_size = checkpoint.tensors[EMBEDDING].shape[0]
        self.base_bytes = resident_bytes()
        self.api = openvino_genai
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.max_num_batched_tokens = CONTEXT * MAX_BATCH
        scheduling.max_num_seqs = MAX_BATCH
        scheduling.cache_size = 1
        scheduling.enable_prefix_caching = False
        properties: dict[str, object] = {"INFERENCE_NUM_THREADS": threads}
        if precision:
            properties["INFERENCE_PRECISION_HINT"] = precision
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduling, "CPU", properties)

    def measure(self, cell: Cell) -> float:
        if cell.prompt:
            times = [self._generate(1, cell.prompt, 0)[0] for _ in range(1 + PREFILLS)]
            return cell.prompt / median(times[1:])
        return cell.batch / median(self._generate(cell.batch, CONTEXT, DECODE_STEPS)[1:])

    def _generate(self, batch: int, prompt: int, decode: int) -> list[float]:
        """The seconds of each step: one that prefills all prompts, and `decode` more."""
        from openvino import Tensor

        config = self.api.GenerationConfig(max_new_tokens=1 + decode, ignore_eos=True)
        tokens = np.random.default_rng().integers(0, self.vocab_size, (batch, 1, prompt), np.int64)
        # Dropping a handle would end its request.
        handles = [self.pipeline.add_request(i, Tensor(row), config) for i, row in enumerate(tokens)]
        steps = []
        while self.pipeline.has_non_finished_requests():
            start = time.perf_counter()
            self.pipeline.step()
            steps.append(time.perf_counter() - start)
        if len(steps) != 1 + decode:
            raise RuntimeError(f"{len(steps)} steps for {len(handles)} prompts and {decode} tokens of each")
        return steps


def resident_bytes() -> int:
    """The memory that this process takes: pages of mapped files that were read count, too. 0 if unknown."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


class Turns:
    """An engine in a process of its own, which sleeps until it is asked."""

    def __init__(self, make: Callable[..., Engine], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.wait()

    def measure(self, cell: Cell) -> float:
        self.pipe.send(cell)
        return self.wait()

    def memory_bytes(self) -> float:
        """What its process takes now beyond what it took before it read the model."""
        self.pipe.send(None)
        return self.wait()

    def wait(self) -> float:
        """The engine's answer; raises `RuntimeError` with its reason, or if the process has died."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, make: Callable[..., Engine], arguments: tuple[Any, ...]) -> None:
    os.dup2(2, 1)  # whatever a native library prints is not a result
    try:
        engine = make(*arguments)
        pipe.send(0.0)
        while True:
            cell = pipe.recv()
            pipe.send(float(resident_bytes() - engine.base_bytes) if cell is None else engine.measure(cell))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        if not isinstance(error, ImportError):
            traceback.print_exc()
        pipe.send(" ".join(f"{type(error).__name__}: {error}".split()))
