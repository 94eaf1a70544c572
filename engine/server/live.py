"""What the page at `/` shows: the engine as it is now, for whoever watches.

A snapshot is taken between two steps, twice a second while somebody watches and never otherwise, and is
written once, however many watch. A watcher that reads slowly misses snapshots and holds up nobody.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from pagellm.engine.scheduling.sequence import Sequence as EngineSequence
from pagellm.engine.server.engine_thread import EngineThread
from pagellm.engine.server.http import event
from pagellm.engine.server.metrics import ServerMetrics

PAGE = Path(__file__).with_name("page.html")
_INTERVAL_S = 0.5
_MOST_SHOWN = 200  # requests of each queue


class LiveFeed:
    """Snapshots of one engine, as events for any number of watchers."""

    def __init__(self, thread: EngineThread, metrics: ServerMetrics) -> None:
        self._thread = thread
        self._metrics = metrics
        self._num_watchers = 0
        self._is_closed = False
        self._latest = b""
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._before: tuple[float, int, int] | None = None  # when, tokens generated, tokens computed

    async def watch(self) -> AsyncIterator[bytes]:
        """Events until the feed is closed."""
        self._num_watchers += 1
        if self._task is None:
            self._before = None
            self._task = asyncio.create_task(self._take_snapshots())
        try:
            while not self._is_closed:
                news = self._news
                await news.wait()
                yield self._latest
        finally:
            self._num_watchers -= 1
            if self._num_watchers == 0 and self._task is not None:
                self._task.cancel()
                self._task = None

    def close(self) -> None:
        """Lets everybody's stream end."""
        self._is_closed = True
        self._tell(b"")

    def _tell(self, latest: bytes) -> None:
        self._latest = latest
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _take_snapshots(self) -> None:
        try:
            while not self._is_closed:
                self._tell(event(await self._thread.between_steps(self._snapshot)))
                await asyncio.sleep(_INTERVAL_S)
        except Exception:  # the engine has gone
            self.close()
            raise

    def _snapshot(self) -> dict[str, Any]:
        """The engine now; on its thread."""
        engine = self._thread.engine
        scheduler, manager, metrics = engine.scheduler, engine.block_manager, self._metrics
        now, totals = time.monotonic(), (metrics.num_generated, metrics.num_computed)
        before, self._before = self._before, (now, *totals)
        usage, stats = manager.usage(), manager.stats
        running, waiting = scheduler.running, list(scheduler.waiting)
        return {
            "blocks": {
                "num": manager.num_blocks, "size": manager.block_size, "free": usage.free,
                "used": usage.used, "shared": usage.shared, "cached": manager.num_cached_blocks,
                "states": _runs_of_states(manager.states()),
            },
            "cache": {"queries": stats.queries, "hits": stats.hits, "host_hits": stats.host_hits},
            "tier": manager.num_swap_blocks and {
                "num": manager.num_swap_blocks, "swapped": usage.swap_used, "cached": usage.swap_cached,
                "offloads": manager.offloads,
            },
            "running": [_shown(sequence) for sequence in islice(running, _MOST_SHOWN)],
            "num_running": len(running),
            "waiting": [_shown(sequence) for sequence in waiting[:_MOST_SHOWN]],
            "num_waiting": len(waiting),
            "num_swapped": manager.num_swapped,
            "step": {"sequences": metrics.last_step[0], "tokens": metrics.last_step[1]},
            "rates": {
                "generated": before and (totals[0] - before[1]) / (now - before[0]),
                "computed": before and (totals[1] - before[2]) / (now - before[0]),
            },
            "ttft": _percentiles(metrics.recent_ttft_s),
            "itl": _percentiles(metrics.recent_itl_s),
        }  # fmt: skip


def _shown(sequence: EngineSequence) -> dict[str, Any]:
    return {
        "id": sequence.request_id,
        "prompt": sequence.num_prompt_tokens,
        "computed": sequence.num_computed_tokens,
        "output": sequence.num_output_tokens,
        "cached": sequence.num_cached_tokens,
        "blocks": _runs(block for block in sequence.block_table if block >= 0),
    }


def _runs_of_states(states: bytes) -> list[int]:
    """State, how many blocks have it, the next state, and so on."""
    return [number for state, group in groupby(states) for number in (state, sum(1 for _ in group))]


def _runs(blocks: Iterable[int]) -> list[int]:
    """First block, how many follow each other, the next first block, and so on."""
    runs: list[int] = []
    for block in blocks:
        if runs and block == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += (block, 1)
    return runs


def _percentiles(values: Sequence[float]) -> list[float] | None:
    """The median and the 95th percentile."""
    if not values:
        return None
    ordered = sorted(values)
    return [ordered[len(ordered) // 2], ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)]]
