"""Compiles the kernels once a machine: finds them in the user's cache, or builds them with progress shown.

All models share one compiled step, because its signature depends on no model; so a step of a tiny made-up
model, run through the ordinary runner, compiles everything.
"""

import hashlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import event

from pagellm import kernels
from pagellm.engine.cache import cache_dir
from pagellm.engine.config import EngineConfig, usable_cores
from pagellm.engine.errors import ConfigError
from pagellm.engine.execution.kernel_cache import KernelStore, say_not_kept
from pagellm.engine.execution.model_runner import ModelRunner
from pagellm.engine.progress import progress
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.kernels.activation import SILU
from pagellm.kernels.architecture import Architecture, Weights, lay_out, layer_rows
from pagellm.kernels.encoding import encode
from pagellm.kernels.jit import cache_compiled, two_processes
from pagellm.kernels.packing import FLOAT32, aligned_zeros, pack_blocks
from pagellm.kernels.second_process import rare_collections
from pagellm.kernels.simd.llvm import CHECKED

# What a full compilation reports here, with a second process; a wrong number only makes the bar end early or
# late.
_NUM_COMPILATIONS = 150

_ready = False
_directory: Path | None = None


def compile_kernels(show: bool = True) -> Path | None:
    """Makes all kernels ready to run in this process; the second call does nothing.

    Takes some tens of seconds the first time on a machine, with progress on standard error if `show`, and a
    fraction of a second from then on. Returns the directory that they are kept in. Where they cannot be kept
    it says so, compiles for this process alone and returns None.
    """
    global _ready, _directory
    if _ready:
        return _directory
    store = _open_store()
    if store is not None:
        cache_compiled(store.cache_of)
    with _Compilation(show), rare_collections():
        _run_tiny_model()
    _directory = store.directory if store is not None and store.is_complete else None
    _ready = True
    return _directory


def _open_store() -> KernelStore | None:
    """Where kernels are kept, also if nothing can be added: all may be there. None if there is no place."""
    directory = Path("kernels", _sources_key())
    try:
        directory = cache_dir() / directory
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ConfigError) as error:
        say_not_kept(directory, error)
        return None
    return KernelStore(directory)


def _sources_key() -> str:
    """Changes with the sources, `PAGELLM_CHECK` and the compilers: what is kept never goes stale."""
    compilers = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__)
    digest = hashlib.sha256(f"{compilers} {CHECKED}".encode())
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run_tiny_model() -> None:
    layers = layer_rows(
        1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        attention_scale=0.25,
        rope_table=0,
        intermediate_size=16,
        activation=SILU,
        gated=1,
    )
    arch = Architecture(
        hidden_size=16,
        vocab_size=16,
        num_positions=0,
        tied=True,
        layer_norm=False,
        norm_epsilon=1e-5,
        layers=layers,
    )
    places = lay_out(arch, [{}, {}])
    values, table = aligned_zeros(places.size), np.ones((1, 1, 8), np.float32)
    rope = {"cos": table, "sin": table, "rope_halves": np.full(1, 8, np.int64), "query_scale": table[0]}
    weights = Weights(values, places.layers, places.rest, places.panels, **rope)
    config = EngineConfig(num_blocks=1, max_num_batched_tokens=1, num_threads=1).complete()
    runner = ModelRunner(arch, weights, FLOAT32, config)
    scheduler = Scheduler.with_blocks(config)
    scheduler.add(Sequence(0, [0], SamplingParams()))
    runner.run(scheduler.schedule())
    runner.close()
    pack_blocks(FLOAT32, *encode(FLOAT32, np.zeros((1, 16), np.float32)), 0, 0, 16, values.view(np.uint32), 0)


class _Compilation(event.Listener):
    """A progress bar and a second process, from the first compilation on; neither if everything is cached."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._stack = ExitStack()
        self._advance: Any = None

    def __enter__(self) -> None:
        self._stack.enter_context(event.install_listener("numba:compile", self))

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def on_start(self, _event: event.Event) -> None:
        if self._advance is None:
            if usable_cores() > 1:
                self._stack.enter_context(two_processes())
            label = "Compiling kernels, once for this machine"
            self._advance = self._stack.enter_context(progress(label, _NUM_COMPILATIONS, show=self._show))

    def on_end(self, _event: event.Event) -> None:
        self._advance(1)
