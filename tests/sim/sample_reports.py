"""Made-up reports, plausible to the eye and determined by a seed.

`python -m tests.sim.sample_reports OUT.html [NUMBER]` writes a page of some; 0 is one of a single request.
"""

import math
import sys
from random import Random
from typing import Any

from pagellm.engine.config import EngineConfig
from pagellm.sim.report.report import to_html
from pagellm.sim.report.schema import DISTRIBUTIONS, NUM_QUANTILES

MEDIANS = {"ttft_s": 0.45, "tpot_s": 0.032, "itl_s": 0.027, "e2e_s": 6.0, "queue_s": 0.05}


def sample_report(
    seed: int = 0, num_buckets: int = 400, speed: float = 1.0, kind: str = "simulated", **config: Any
) -> dict[str, Any]:
    """An hour under a load that swells and ebbs, on a server that is as much faster as `speed` says."""
    random = Random(seed)
    duration_s = 3600.0
    timeline = _timeline(random, num_buckets, duration_s / num_buckets, speed)
    latencies = {}
    for name in DISTRIBUTIONS:
        center = math.log(MEDIANS[name] / speed)
        latencies[name] = sorted(random.lognormvariate(center, 0.7) for _ in range(NUM_QUANTILES))
    latencies["queue_s"] = [0.0] * 60 + latencies["queue_s"][60:]
    num_requests = sum(timeline["arrivals"])
    return {
        "version": 1,
        "kind": kind,
        "trace": "mooncake_conversation.jsonl",
        "skipped": [],
        "model": "smollm2-135m-instruct, int8",
        "config": {name: getattr(EngineConfig(), name) for name in EngineConfig.__dataclass_fields__}
        | {"num_blocks": 512}
        | config,
        "load": {
            "mode": "open",
            "rate_factor": 1.0,
            "clients": None,
            "replicas": 1,
            "router": None,
            "timeout_s": 60.0,
        },
        "summary": _summary(timeline, latencies, num_requests, duration_s),
        "timeline": timeline,
        "latencies": latencies,
    }


def _timeline(random: Random, num_buckets: int, bucket_s: float, speed: float) -> dict[str, Any]:
    names = (
        *("time_s", "running", "waiting", "swapped", "batch_tokens", "used_blocks", "peak_blocks"),
        *("unwritten_share", "cached_share", "hit_rate", "preemptions", "arrivals", "finished"),
        *("prefill_tokens", "decode_tokens"),
    )
    timeline: dict[str, Any] = {name: [] for name in names}
    waiting = swapped = used = 0.0
    for index in range(num_buckets):
        tide = 1.1 + 0.8 * math.sin(index / num_buckets * 9) + 0.3 * math.sin(index / 7)
        arrivals = max(0, round(random.gauss(2.2 * tide, 1.2) * bucket_s / 9))
        running = min(32.0, max(0.0, 14 * tide / speed + random.gauss(0, 1.5)))
        waiting = max(0.0, 0.85 * waiting + (running - 27) * 0.8 + random.gauss(0, 0.4))
        used = 0.7 * used + 0.3 * min(512, running * 16.5)
        preempted = int(random.random() < 0.3) + int(waiting / 6) if used > 440 else 0
        swapped = max(0.0, 0.8 * swapped + preempted - 0.4)
        values = {
            "time_s": index * bucket_s,
            "running": running,
            "waiting": waiting,
            "swapped": swapped,
            "batch_tokens": running + 9 * arrivals,
            "used_blocks": used,
            "peak_blocks": min(512, used * (1 + random.random() * 0.15)),
            "unwritten_share": 0.04 + 0.03 * random.random(),
            "cached_share": min(1, 3 * (index + 1) / num_buckets),
            "hit_rate": min(1, 0.3 + 0.3 * index / num_buckets + random.gauss(0, 0.06)) if arrivals else None,
            "preemptions": preempted,
            "arrivals": arrivals,
            "finished": max(0, arrivals + random.choice((-1, 0, 1))),
            "prefill_tokens": round(arrivals * 420 * random.uniform(0.7, 1.3)),
            "decode_tokens": round(running * 11 * speed * bucket_s),
        }
        for name, value in values.items():
            timeline[name].append(value)
    return timeline | {"bucket_s": bucket_s}


def _summary(
    timeline: dict[str, Any], latencies: dict[str, list[float]], num_requests: int, duration_s: float
) -> dict[str, Any]:
    prompt_tokens, output_tokens = sum(timeline["prefill_tokens"]), sum(timeline["decode_tokens"])
    block_bytes = 16 * 23040
    mean_blocks = sum(timeline["used_blocks"]) / len(timeline["used_blocks"])
    peak_blocks = round(max(timeline["peak_blocks"]))
    return {
        "num_requests": num_requests,
        "num_finished": num_requests - 9,
        "num_timed_out": 7,
        "num_rejected": 2,
        "num_skipped": 0,
        "num_dropped": 0,
        "duration_s": duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "num_steps": 98_304,
        "requests_per_s": num_requests / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / duration_s,
        **{name: distribution(values, num_requests) for name, values in latencies.items()},
        "goodput": {
            "slo": {"ttft_s": 1.0, "tpot_s": 0.1, "e2e_s": None},
            "share": 0.873,
            "requests_per_s": 0.873 * num_requests / duration_s,
        },
        "cache": {
            "query_tokens": prompt_tokens,
            "hit_tokens": prompt_tokens * 9 // 20,
            "hit_rate": 0.45,
            "evicted_tokens": 120_000,
            "host_hit_tokens": 400,
            "offloaded_tokens": 900,
        },
        "preemptions": {
            "recompute": sum(timeline["preemptions"]) * 2 // 3,
            "swap": sum(timeline["preemptions"]) // 3,
            "requests": 41,
            "most_of_one_request": 3,
        },
        "kv": {
            "num_blocks": 512,
            "block_bytes": block_bytes,
            "peak_blocks": peak_blocks,
            "mean_blocks": mean_blocks,
            "peak_bytes": peak_blocks * block_bytes,
            "mean_bytes": mean_blocks * block_bytes,
            "mean_unwritten_share": 0.055,
        },
        "wall_s": 2.1,
    }


def distribution(quantiles: list[float], count: int) -> dict[str, Any]:
    """The distribution whose quantiles at 0, 0.5, ... 100 percent these are; empty if there are none."""
    at = {"min": 0, "p50": 100, "p90": 180, "p95": 190, "p99": 198, "max": 200}
    if not quantiles:
        return {"count": 0, "mean": None, **dict.fromkeys(at)}
    mean = sum(quantiles) / len(quantiles)
    return {"count": count, "mean": mean} | {name: quantiles[index] for name, index in at.items()}


def one_request() -> dict[str, Any]:
    """One request of one token: nothing to divide by, nothing between tokens, no blocks of known size."""
    report = sample_report(num_buckets=1)
    summary, timeline, latencies = report["summary"], report["timeline"], report["latencies"]
    for name in ("tpot_s", "itl_s"):
        latencies[name], summary[name] = [], distribution([], 0)
    for name in ("ttft_s", "e2e_s", "queue_s"):
        latencies[name] = [0.0 if name == "queue_s" else 0.125] * NUM_QUANTILES
        summary[name] = distribution(latencies[name], 1)
    summary |= {"num_requests": 1, "num_finished": 1, "num_timed_out": 0, "num_rejected": 0, "goodput": None}
    summary |= {"duration_s": 0.0, "num_steps": 1, "prompt_tokens": 8, "output_tokens": 1, "wall_s": 0.0}
    summary |= dict.fromkeys(("requests_per_s", "output_tokens_per_s", "total_tokens_per_s"))
    summary["cache"] |= {"query_tokens": 0, "hit_tokens": 0, "hit_rate": None}
    summary["kv"] |= dict.fromkeys(("block_bytes", "peak_bytes", "mean_bytes"))
    timeline |= {"bucket_s": 0.0, "hit_rate": [None], "arrivals": [1], "finished": [1], "preemptions": [0]}
    return report


if __name__ == "__main__":
    NUMBER = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    OTHERS = [{"policy": "slo", "num_blocks": 640}, {"policy": "fair"}, {"policy": "shortest_job"}]
    SAMPLES = [sample_report(0)] + [
        sample_report(1 + i, speed=1.12 - 0.1 * i, kind="real", **config)
        for i, config in enumerate(OTHERS[: NUMBER - 1])
    ]
    to_html([one_request()] if NUMBER == 0 else SAMPLES, sys.argv[1])
