"""Steps that are taken at once are the steps one by one: logs, results and report are the same to the bit.

Random traces are replayed twice, on caches that are often too small: with step times that are known for many
steps to come, and with the same times asked for one by one.
"""

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import PagellmError
from pagellm.engine.scheduling.policies import POLICIES
from pagellm.engine.scheduling.step_loop import StepLoop
from pagellm.sim import CostModel, Simulator, Trace, TraceRequest
from pagellm.sim.costs.decoder import load_model
from pagellm.sim.costs.devices import load_hardware
from pagellm.sim.costs.profile import ProfileCostModel
from pagellm.sim.costs.roofline import RooflineCostModel
from pagellm.sim.fleet.fleet import Autoscale, Fleet, Group, Link, RandomFailures
from pagellm.sim.router import ROUTERS
from tests.conftest import at_most
from tests.properties import extensions
from tests.sim.test_cost_profile import PROFILE

GALLERY = Path(__file__).parents[2] / "examples" / "policies"
# Of each setting the gallery's policies.
CLASSES = {
    "policy": [
        "mlfq:MLFQ",
        "andes:Andes",
        "vtc:VTC",
        "longest_prefix:LongestPrefix",
        "chats_and_jobs:ChatsAndJobs",
    ],
    "victim": ["least_lost:LeastLost"],
    "admission": ["admit_in_time:AdmitInTime"],
    "eviction": ["lru:LRU", "lfu:LFU", "two_queues:TwoQueues", "belady:Belady"],
    "budget": ["sarathi:Sarathi"],
}


class StepByStep(RooflineCostModel):
    """The same times, each asked for alone."""

    stride_times = CostModel.stride_times


# What of it is measured is often left behind.
QUICK = PROFILE | {
    "mixed": None,
    "prefill": {
        "chunk_tokens": [1, 64],
        "context_tokens": [0, 500],
        "seconds": [[0.001, 0.002], [0.01, 0.03]],
    },
    "decode": {
        "num_sequences": [1, 3, 20],
        "context_tokens": [0, 50, 300],
        "seconds": [[0.001, 0.0012, 0.002], [0.002, 0.0017, 0.003], [0.004, 0.005, 0.009]],
    },
    "overhead": {"step_s": 0.001, "sequence_s": 0.0001},
    "transfer": {"copy_block_s": 0.00025, "swap_block_s": 0.0005},
}


class ProfileStepByStep(ProfileCostModel):
    """The same times, each asked for alone."""

    stride_times = CostModel.stride_times


def choices(setting: str) -> list[str | None]:
    """What is built in, the gallery's and those that answer at random; the first mostly."""
    names = [extensions.named(name) for name in extensions.NAMES[setting]]
    gallery = [f"{GALLERY}/{name.replace(':', '.py:')}" for name in CLASSES[setting]]
    built_in = list(POLICIES) if setting == "policy" else []
    return [*names[:1] * (len(names) + len(gallery)), *names, *gallery, *built_in]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.sampled_from([1, 2, 4, 16]))
    preemption = draw(st.sampled_from(["recompute", "recompute", "swap", "auto"]))
    caches, offloads = draw(st.sampled_from([(True, False), (True, True), (False, False)]))
    return {
        "block_size": size,
        "num_blocks": draw(st.sampled_from([12, 40, 60, 400])) * 16 // size,
        "max_num_seqs": draw(st.sampled_from([1, 3, 8, 40])),
        "max_num_batched_tokens": draw(st.sampled_from([8, 64, 512])),
        "max_prefill_chunk": draw(st.sampled_from([None, 7])),
        "enable_prefix_caching": caches,
        "enable_hierarchical_cache": offloads,
        "window": draw(st.sampled_from([None, None, None, 2, 33])),
        "preemption": preemption,
        "num_swap_blocks": draw(st.integers(1, 60)) if preemption == "swap" or offloads else None,
        "max_preemptions": draw(st.sampled_from([1, 8])),
        "watermark": draw(st.sampled_from([0.0, 0.01, 0.1])),
        **{setting: draw(st.sampled_from(choices(setting))) for setting in CLASSES},
    }


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Short and long answers, prompts that begin alike or are equal, sessions, and times that are equal."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    mean_gap_s = draw(st.sampled_from([0.0, 0.002, 0.02, 0.5]))
    output_lens = draw(st.sampled_from([(1, 5), (1, 200), (100, 120), (1, 600)]))
    num_contents, sessions = draw(st.sampled_from([1, 3, 100])), draw(st.sampled_from([0, 0, 2]))
    time, requests = 0.0, []
    for _ in range(draw(st.integers(1, 40))):
        time += chance.choice([0.0, chance.expovariate(1 / mean_gap_s)]) if mean_gap_s else 0.0
        num_pieces = chance.randint(1, 8)
        requests.append(
            TraceRequest(
                arrival_time=time,
                prompt_len=8 * num_pieces - chance.randint(0, 7),
                hash_ids=[chance.randrange(num_contents) for _ in range(num_pieces)],
                hash_block_size=8,
                output_len=chance.randint(*output_lens),
                priority=chance.randint(0, 2),
                tenant=chance.choice(["", "a", "b"]) or None,
                deadline_s=chance.choice([None, 1.0]),
                session=str(chance.randrange(sessions)) if sessions and chance.random() < 0.7 else None,
                delay_s=chance.choice([None, 0.3]) if sessions else None,
            )
        )
    return Trace.from_requests(requests)


@st.composite
def loads(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "clients": draw(st.sampled_from([None, None, 1, 5])),
        "replicas": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "router": draw(st.sampled_from([*ROUTERS])),
        "timeout_s": draw(st.sampled_from([None, None, 0.3, 2.0])),
        "slo": draw(st.sampled_from([None, {"tpot_s": 0.007, "ttft_s": 0.5}])),
        "skip_bad": True,
        "steps_ahead": draw(st.sampled_from([0, 1])),
    }


Kind = type[RooflineCostModel] | type[ProfileCostModel]


def costs_of(kind: Kind, model: str, window: int | None, steps_ahead: int = 0) -> CostModel:
    """Step times that differ with every token of a context."""
    if issubclass(kind, ProfileCostModel):
        return kind(QUICK)
    decoder = load_model(model)
    layers = tuple(replace(layer, window=window or 0) for layer in decoder.layers)
    if window is None:  # of two kinds, of which one sees less
        layers = (replace(layers[0], window=50), *layers)
    constants = {"memory_utilization": 0.99, "steps_ahead": steps_ahead}
    return kind(load_hardware("mi300x"), replace(decoder, layers=layers), **constants)


def replayed(
    kind: Kind,
    model: str,
    config: dict[str, Any],
    load: dict[str, Any],
    trace: Trace,
    fleet: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that is left of a replay; of one that ends with an error, that and what was written before."""
    extensions.Whims.fault, extensions.Whims.after = ("", None), 0  # another test may have left one
    with TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in ("step_log", "results", "perfetto")}
        settings = EngineConfig(**config, max_model_len=1000, step_log=str(paths["step_log"]))
        options = dict(load)
        costs = costs_of(kind, model, config["window"], options.pop("steps_ahead", 0))
        options |= {"results": paths["results"], "perfetto": paths["perfetto"]}
        left: dict[str, Any] = {}
        try:
            if fleet is None:
                simulator = Simulator(settings, costs, **options)
            else:
                simulator = Simulator.of_fleet(fleet_of(costs, settings, **fleet), **options)
            report = simulator.replay(trace)
            report.summary["wall_s"] = 0.0
            report["config"]["step_log"] = None
            left["report"] = report.to_json()
        except PagellmError as error:
            left["error"] = str(error)
        return left | {name: path.read_text() for name, path in paths.items() if path.exists()}


def fleet_of(
    costs: CostModel, config: EngineConfig, counts: tuple[int, int], scale: str | None, mtbf_s: float
) -> Fleet:
    """Replicas that prefill, if there are any, and others; they may be scaled, and fail."""
    num_prefill, count = counts
    link = Link("a link", 1e9, 0.001)
    scaled = None if scale is None else Autoscale(max=count + 1, target=0.5, rule=scale, interval_s=0.3)
    role = "decode" if num_prefill else "both"
    alike: dict[str, Any] = {"costs": costs, "config": config, "link": link}
    groups = [Group(name="d", count=count, role=role, start_s=0.2, autoscale=scaled, **alike)]
    if num_prefill:
        groups.append(Group(name="p", count=num_prefill, role="prefill", **alike))
    failures = RandomFailures(mtbf_s, 0.1) if mtbf_s else None
    return Fleet(tuple(groups), random_failures=failures)


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "counts": draw(st.sampled_from([(0, 1), (0, 2), (1, 1), (2, 1)])),
        "scale": draw(st.sampled_from([None, "concurrency", "waiting", "kv_usage"])),
        "mtbf_s": draw(st.sampled_from([0.0, 0.5, 5.0])),
    }


@at_most(200)
@given(configs(), loads(), traces(), st.sampled_from(["llama-3.1-8b", "qwen3-30b-a3b"]))
def test_strides_are_steps(config: dict[str, Any], load: dict[str, Any], trace: Trace, model: str) -> None:
    assert replayed(RooflineCostModel, model, config, load, trace) == replayed(
        StepByStep, model, config, load, trace
    )


@pytest.mark.filterwarnings("ignore:.*asked for")
@at_most(50)
@given(configs(), loads(), traces())
def test_strides_of_a_profile_are_its_steps(
    config: dict[str, Any], load: dict[str, Any], trace: Trace
) -> None:
    one, other = (replayed(kind, "", config, load, trace) for kind in (ProfileCostModel, ProfileStepByStep))
    assert one == other


def test_a_stride_tells_of_the_second_tier_what_its_steps_tell() -> None:
    """Equal answers: what is computed again of them is no longer in the second tier."""
    crowds = ([0], range(1, 7), range(7, 13), [0])
    trace = Trace.from_requests(
        TraceRequest(
            arrival_time=20.0 * i, prompt_len=64, hash_ids=[one] * 8, hash_block_size=8, output_len=300
        )
        for i, crowd in enumerate(crowds)
        for one in crowd
    )
    config = {
        "block_size": 16,
        "num_blocks": 160,
        "num_swap_blocks": 400,
        "window": None,
        "enable_hierarchical_cache": True,
    }
    strides, steps = (
        replayed(kind, "llama-3.1-8b", config, {}, trace) for kind in (RooflineCostModel, StepByStep)
    )
    assert strides == steps
    records = [json.loads(line) for line in strides["step_log"].splitlines()]
    assert any(
        b["blocks"]["swap_cached"] < a["blocks"]["swap_cached"] and not b["transfers"]
        for a, b in pairwise(records)
    )
    assert json.loads(strides["report"])["summary"]["cache"]["host_hit_tokens"] > 0


@at_most(100)
@given(configs(), loads(), traces(), fleets())
def test_strides_of_fleets_are_steps(
    config: dict[str, Any], load: dict[str, Any], trace: Trace, fleet: dict[str, Any]
) -> None:
    del load["replicas"]
    one, other = (
        replayed(kind, "llama-3.1-8b", config, load, trace, fleet) for kind in (RooflineCostModel, StepByStep)
    )
    assert one == other


def test_most_steps_of_long_answers_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []
    begin = StepLoop.begin
    monkeypatch.setattr(
        StepLoop, "begin", lambda loop, now, *costs: begun.append(now) or begin(loop, now, *costs)
    )
    trace = Trace.from_requests(
        TraceRequest(arrival_time=10.0 * i, prompt_len=30, output_len=200) for i in range(20)
    )
    summary = (
        Simulator(EngineConfig(num_blocks=100), costs_of(RooflineCostModel, "llama-3.1-8b", None))
        .replay(trace)
        .summary
    )
    assert summary["num_steps"] == 20 * 200
    assert len(begun) == 20 * 2  # a prompt's, and one that begins the stride
