"""The command `quantize`: a model as a smaller file; `engine.quantization` knows how."""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagellm.engine.quantization.model import Report


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `quantize`; after parsing, `options.command(options)` runs it."""
    parser = commands.add_parser(
        "quantize", help="write a model as a smaller file", description=_quantize.__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="a known name, a path or a hub id")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT", help="a new .gguf file, or a new directory"
    )
    parser.add_argument(
        "--type", metavar="TYPE",
        help="F32, F16, BF16, Q8_0, Q4_0, or Q4_K_M, also called Q4_K (default: Q4_K_M; of a directory BF16)",
    )  # fmt: skip
    parser.add_argument(
        "--pure", action="store_true", help="every matrix in that type, none in one of more bits"
    )
    parser.add_argument(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="round with more care where inputs are large: on this text, or by llama.cpp's importance matrix",
    )
    parser.add_argument(
        "--kl-text", type=Path, metavar="TEXT",
        help="measure what it costs on this text (default: a page of Jane Austen's)",
    )  # fmt: skip
    parser.add_argument(
        "--kl-tokens",
        dest="text_tokens",
        type=int,
        default=2048,
        metavar="N",
        help="on so many tokens of it; 0: not at all",
    )
    parser.add_argument(
        "--allow-requantize", action="store_true", help="also of a model that has few bits already"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(command=_quantize)


def _quantize(options: argparse.Namespace) -> None:
    """Write a model as a smaller GGUF file, for this engine and llama.cpp, and say what that costs.

    Where OUT does not end with .gguf it becomes a directory of safetensors in F32, F16 or BF16.

    The cost is the Kullback-Leibler divergence of what the file predicts from what the model predicts.
    """
    from pagellm.engine.quantization.model import Settings, quantize_model

    settings = Settings(
        type=options.type,
        pure=options.pure,
        imatrix=options.imatrix,
        text=options.kl_text,
        text_tokens=options.text_tokens,
        allow_requantize=options.allow_requantize,
        force=options.force,
    )
    # So that what is not whole is removed, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = quantize_model(options.model, options.output, settings, show=True)
    if options.json:
        print(json.dumps(report.as_json(), allow_nan=False))
        return
    for line in _lines(report):
        print(line)


def _lines(report: "Report") -> list[str]:
    written = report.written
    types = ", ".join(f"{count} {name}" for name, count in written.tensors.items())
    lines = [
        f"{report.output}: {report.type}, {written.num_bytes / 1e6:,.1f} MB of "
        f"{report.source_bytes / 1e6:,.1f}, {written.bits_per_weight:.2f} bits a weight, "
        f"in {report.seconds:.1f} s",
        f"tensors: {types}",
        *written.notes,
        *_without_importance(report),
    ]
    cost = report.divergence
    if cost is None:
        return [*lines, f"KL divergence: not measured: {report.not_compared}"]
    reference = "float32" if report.reference == "none" else "bfloat16"
    error = "" if cost.standard_error is None else f" +- {1e3 * cost.standard_error:.3f}"
    lines += [
        f"KL divergence from the source in {reference}: {1e3 * cost.mean:.3f}{error} thousandths of a nat, "
        f"over {cost.num_tokens:,} tokens",
        f"same top token: {cost.same_top_token:.2%}",
    ]
    if cost.perplexity is not None:
        lines.append(f"perplexity: {cost.perplexity:.3f}, of the source {cost.source_perplexity:.3f}")
    return lines


def _without_importance(report: "Report") -> list[str]:
    names = report.written.without_importance
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"no importance is known of {names[0]}{more}: all their inputs count alike"] if names else []
