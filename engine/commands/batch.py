"""The command `batch`: files of requests, answered by the server's own endpoints without a network."""

import argparse
import json
import time
from functools import partial
from typing import Any

from pagellm.engine.commands.flags import add_flags
from pagellm.engine.config import EngineConfig
from pagellm.engine.progress import progress


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `batch`."""
    from pagellm.engine.commands.cli import CHAT_FLAGS, GENERATION_FLAG, TOOL_FLAG, add_model_options

    batch = commands.add_parser("batch", help="answer a file of requests", description=_batch.__doc__)
    batch.add_argument("input", metavar="INPUT", help="a request a line, as OpenAI's batch files have them")
    batch.add_argument(
        "output", metavar="OUTPUT", help="gets an answer a line, in the order in which they end"
    )
    add_model_options(batch)
    add_flags(batch.add_argument_group("sampling"), EngineConfig, GENERATION_FLAG)
    add_flags(batch.add_argument_group("chat"), EngineConfig, CHAT_FLAGS | TOOL_FLAG)
    batch.add_argument(
        "--served-model-name", nargs="+", metavar="NAME",
        help="what requests may call the model; answers use the first (default: as --model)",
    )  # fmt: skip
    batch.set_defaults(command=_batch)


def _batch(options: argparse.Namespace) -> None:
    """Answer the requests of INPUT, one a line, into OUTPUT.

    A run that was ended, however, is gone on with by the same command: answers that stand are kept.
    """
    from pagellm.engine.commands.cli import engine_config, load_llm, needing_server

    config = engine_config(options)
    with needing_server("batch"):
        from pagellm.engine.server.batch import run_batch

    start = time.perf_counter()
    counts = run_batch(
        partial(load_llm, options.model, config), options.served_model_name or [options.model],
        options.input, options.output, partial(progress, "Answering"),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps({**counts._asdict(), "seconds": seconds}))
        return
    kept = f", {counts.kept} stood already" if counts.kept else ""
    said = f"{counts.total} requests: {counts.completed} answered, {counts.failed} refused{kept}"
    print(f"{said}, {seconds:.1f} s")
