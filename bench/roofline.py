"""Draws where each kernel stands against the machine's measured limits.

A kernel can be no quicker than memory brings its bytes (the rising line) and than the cores multiply (the
flat lines, one a format; four bits are multiplied as eight). A multiply-add counts as two operations; the
bytes are those that have to be read or written once: weights, keys and values, inputs and outputs. Weights
and KV come from memory and not from a cache, as in the engine, where a layer's turn comes after that of all
the others.

Products are the four matrices of one layer of SmolLM2-135M for a number of tokens.

Run: python bench/roofline.py -o roofline.svg. The numbers go to a .json beside the picture.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.bench_kernels import (
    BATCH,
    CACHE_FORMATS,
    CHUNK,
    CONTEXT,
    FORMATS,
    LAYERS,
    PEAKS,
    Attention,
    Product,
    seconds_in_turns,
)
from bench.machine import bandwidth_gb_s, peak_gops
from pagellm.engine.config import usable_cores
from pagellm.kernels.packing import panels_size
from pagellm.kernels.threads import ThreadTeam

TOKENS = (1, 4, 16, 64, 512)
MATRICES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # (N, K) of qkv, output, up with gate, down
COLD_BYTES = 128 << 20  # of weights that are read in turn, several times what the last cache holds


@dataclass(frozen=True)
class Machine:
    """The measured limits of all usable cores."""

    cores: int
    bandwidth_gb_s: float
    peak_gops: dict[str, float]

    def limit(self, point: "Point") -> float:
        """Gop/s at most where `point` is."""
        return min(self.peak_gops[point.format], self.bandwidth_gb_s * point.intensity)


@dataclass(frozen=True)
class Point:
    """What one kernel does, and how long it takes."""

    kernel: str
    format: str
    tokens: int
    operations: int
    num_bytes: int
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.num_bytes

    @property
    def gops(self) -> float:
        """Its speed."""
        return self.operations / 1e9 / self.seconds


def measure(rounds: int) -> tuple[Machine, list[Point]]:
    """All kernels, and the machine's limits: the best of several measurements between them.

    What others do on the machine lowers its bandwidth for seconds; the best is what there is at most.
    """
    points, bandwidths = [], []
    peaks = dict.fromkeys(PEAKS, 0.0)
    team = ThreadTeam(usable_cores())
    for name in PEAKS:
        for tokens in TOKENS:
            bandwidths.append(bandwidth_gb_s())
            points.append(_products(team, name, tokens, rounds))
            print(f"{points[-1].kernel}, {name}, {tokens} tokens", file=sys.stderr, flush=True)
        for peak in PEAKS:
            peaks[peak] = max(peaks[peak], peak_gops(peak))
    for name in CACHE_FORMATS:
        bandwidths.append(bandwidth_gb_s())
        points.append(_attention(team, "decode attention", name, [(CONTEXT - 1, 1)] * BATCH, rounds))
        points.append(_attention(team, "prefill attention", name, [(0, CHUNK)], rounds))
    team.close()
    return Machine(usable_cores(), max(bandwidths), peaks), points


def _products(team: ThreadTeam, format: str, tokens: int, rounds: int) -> Point:
    """The four matrices of a layer, one after the other."""
    operations, num_bytes, seconds = 0, 0, 0.0
    for N, K in MATRICES:
        # Many tokens read as much for each copy: fewer copies do.
        cold_copies = COLD_BYTES // (4 * panels_size(FORMATS[format], N, K))
        product = Product(FORMATS[format], tokens, N, K, max(2, cold_copies // max(1, tokens // 16)))
        seconds += seconds_in_turns({"": partial(product.run, team)}, rounds)[""] / product.copies
        operations += product.operations
        num_bytes += product.num_bytes
    return Point("matmul", format, tokens, operations, num_bytes, seconds)


def _attention(team: ThreadTeam, kernel: str, format: str, runs: list[tuple[int, int]], rounds: int) -> Point:
    case = Attention(CACHE_FORMATS[format], runs)
    seconds = seconds_in_turns({"": partial(case.run, team)}, rounds)[""] / LAYERS
    tokens = sum(count for _, count in runs)
    return Point(kernel, format, tokens, case.operations, case.num_bytes, seconds)


# The picture: a plot of WIDTH x HEIGHT with a margin for the labels.
LEFT, TOP, WIDTH, HEIGHT = 70, 64, 780, 480
X_RANGE, Y_RANGE = (0.3, 1000.0), (15.0, 4000.0)
COLOURS = {"float32": "#0072b2", "bf16": "#d55e00", "int8": "#009e73", "int4": "#aa3377"}
INK, FAINT = "#222222", "#dddddd"


def draw(machine: Machine, points: list[Point]) -> str:
    """The picture as SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 660" width="880" height="660" '
        'font-family="system-ui, sans-serif" font-size="12">',
        '<rect width="880" height="660" fill="white"/>',
        _text(LEFT, 28, "pagellm's kernels against the machine's limits", size=17),
        _text(LEFT, 47, f"{machine.cores} cores; SmolLM2-135M's shapes; labels are numbers of tokens"),
        *_axes(),
        *_roofs(machine),
    ]
    for name in PEAKS:
        parts += _curve(machine, name, [p for p in points if p.kernel == "matmul" and p.format == name])
    for point in points:
        if point.kernel != "matmul":
            parts.append(_marker(machine, point))
    parts += [*_legend(), "</svg>"]
    return "\n".join(parts) + "\n"


def _x(intensity: float) -> float:
    return LEFT + WIDTH * math.log(intensity / X_RANGE[0]) / math.log(X_RANGE[1] / X_RANGE[0])


def _y(gops: float) -> float:
    return TOP + HEIGHT * (1 - math.log(gops / Y_RANGE[0]) / math.log(Y_RANGE[1] / Y_RANGE[0]))


def _text(
    x: float, y: float, text: str, anchor: str = "start", fill: str = INK, size: int = 12, rest: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}"{rest}>'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, rest: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
        f'stroke-width="{width}"{rest}/>'
    )


def _axes() -> Iterator[str]:
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    for value in (0.3, 1, 3, 10, 30, 100, 300, 1000):
        yield _line(_x(value), TOP, _x(value), bottom, FAINT)
        yield _text(_x(value), bottom + 18, f"{value:g}", "middle")
    for value in (30, 100, 300, 1000, 3000):
        yield _line(LEFT, _y(value), right, _y(value), FAINT)
        yield _text(LEFT - 8, _y(value) + 4, f"{value:,}", "end")
    yield _text((LEFT + right) / 2, bottom + 38, "operations a byte", "middle")
    turned = f' transform="rotate(-90 20 {(TOP + bottom) / 2})"'
    yield _text(20, (TOP + bottom) / 2, "Gop/s", "middle", rest=turned)


def _roofs(machine: Machine) -> Iterator[str]:
    right = LEFT + WIDTH
    bandwidth, highest = machine.bandwidth_gb_s, max(machine.peak_gops.values())
    start = max(X_RANGE[0], Y_RANGE[0] / bandwidth)
    x1, y1, x2, y2 = _x(start), _y(bandwidth * start), _x(highest / bandwidth), _y(highest)
    yield _line(x1, y1, x2, y2, INK, 1.5)
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    x, y = _x(1.2 * start), _y(bandwidth * 1.2 * start) - 8
    turned = f' transform="rotate({angle:.1f} {x:.1f} {y:.1f})"'
    yield _text(x, y, f"memory, {bandwidth:.0f} GB/s", rest=turned)
    for name, label in (("float32", "float32"), ("bf16", "bf16"), ("int8", "int8 and int4")):
        peak, colour = machine.peak_gops[name], COLOURS[name]
        yield _line(_x(peak / bandwidth), _y(peak), right, _y(peak), colour, 1.5)
        yield _text(right - 4, _y(peak) - 6, f"{label}, {peak:,.0f} Gop/s", "end", colour)


def _curve(machine: Machine, name: str, points: list[Point]) -> Iterator[str]:
    colour = COLOURS[name]
    places = [(_x(point.intensity), _y(point.gops)) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.4"/>'
    for point, (x, y) in zip(points, places, strict=True):
        title = _described(machine, point)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{title}</title></circle>'
        yield _text(x + 7, y + 13, str(point.tokens), fill=colour, size=11)


def _marker(machine: Machine, point: Point) -> str:
    x, y = _x(point.intensity), _y(point.gops)
    shape = f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"
    if point.kernel == "decode attention":
        shape = f"M{x:.1f} {y - 7:.1f}l6.5 12h-13z"
    style = f'fill="white" stroke="{COLOURS[point.format]}" stroke-width="2"'
    return f'<path d="{shape}" {style}><title>{_described(machine, point)}</title></path>'


def _described(machine: Machine, point: Point) -> str:
    share = point.gops / machine.limit(point)
    what = f"{point.kernel}, {point.format}, {point.tokens} tokens"
    return f"{what}: {point.gops:.0f} Gop/s, {share:.0%} of the limit"


def _legend() -> Iterator[str]:
    x, y = LEFT + 66.0, TOP + HEIGHT + 66
    yield _text(LEFT, y, "products:")
    for name, colour in COLOURS.items():
        yield f'<circle cx="{x + 5:.1f}" cy="{y - 4}" r="4.5" fill="{colour}"/>'
        yield _text(x + 15, y, name)
        x += 84
    yield f'<path d="M{x + 6:.1f} {y - 11}l6.5 12h-13z" fill="white" stroke="{INK}" stroke-width="1.5"/>'
    yield _text(x + 18, y, f"decode attention, {BATCH} x {CONTEXT:,}")
    x += 214
    yield f'<path d="M{x + 7:.1f} {y - 11}l7 7l-7 7l-7 -7z" fill="white" stroke="{INK}" stroke-width="1.5"/>'
    yield _text(x + 19, y, f"prefill attention, {CHUNK}")


def _derived(machine: Machine, point: Point) -> dict[str, float]:
    limit = machine.limit(point)
    return {
        "intensity": point.intensity,
        "gops": point.gops,
        "limit_gops": limit,
        "share": point.gops / limit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A roofline of pagellm's kernels.")
    parser.add_argument("-o", "--output", type=Path, default=Path("roofline.svg"), metavar="PATH")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--redraw", action="store_true", help="only draw, from the numbers beside the picture"
    )
    arguments = parser.parse_args()
    numbers = arguments.output.with_suffix(".json")
    if arguments.redraw:
        found = json.loads(numbers.read_text())
        machine = Machine(**found["machine"])
        points = [
            Point(**{name: row[name] for name in Point.__dataclass_fields__}) for row in found["points"]
        ]
    else:
        machine, points = measure(arguments.rounds)
        rows = [asdict(point) | _derived(machine, point) for point in points]
        numbers.write_text(json.dumps({"machine": asdict(machine), "points": rows}, indent=2) + "\n")
    for point in points:
        print(_described(machine, point))
    arguments.output.write_text(draw(machine, points))


if __name__ == "__main__":
    main()
