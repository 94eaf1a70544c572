"""The page at `/` in a real browser, at the width of a desk's screen and of a phone's; and what feeds it."""

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from tests.engine.server.conftest import eventually, serving, wait_until_ready
from tests.engine.server.test_clients import ask, request
from tests.engine.server.test_lifetime import open_stream
from tests.sim.browser import Driven, browse_address

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
LONG = {"prompt": "the quick brown fox jumps over it", "max_tokens": 60, "ignore_eos": True, "stream": True}


@contextmanager
def two_requests_under_way(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two that share a prefix have decoded a little and stand still; the engine's thread obeys."""
    engine, step = server.llm.engine, server.llm.engine.step
    may_step = Semaphore(0)
    monkeypatch.setattr(engine, "step", lambda: step() if may_step.acquire(timeout=0.05) else [])
    connections = [open_stream(server.url, LONG) for _ in range(2)]
    try:
        assert eventually(lambda: server.thread.num_live == 2)
        may_step.release(12)
        assert eventually(lambda: may_step._value == 0)
        yield
    finally:
        for connection in connections:
            connection.close()
        assert eventually(lambda: not engine.has_unfinished)
        monkeypatch.undo()


def snapshots(server: Any) -> Iterator[Any]:
    with urllib.request.urlopen(f"{server.url}/live", timeout=30) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def test_the_feed_says_what_the_engine_is(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = server.llm.engine.block_manager
    assert request(server, "/reset_prefix_cache", b"", "POST")[0] == 200
    with two_requests_under_way(server, monkeypatch):
        feed = snapshots(server)
        first, second = next(feed), next(feed)
        feed.close()  # type: ignore[attr-defined]
        blocks = first["blocks"]
        states = [
            state for at in range(0, len(blocks["states"]), 2)
            for state in [blocks["states"][at]] * blocks["states"][at + 1]
        ]  # fmt: skip
        assert len(states) == blocks["num"] == 48
        assert sum(state % 4 > 0 for state in states) == blocks["used"] == 48 - manager.num_free_blocks
        assert sum(state >= 4 for state in states) == blocks["cached"] == manager.num_cached_blocks
        tables = []
        for shown in first["running"]:
            runs = zip(shown["blocks"][::2], shown["blocks"][1::2], strict=True)
            tables.append([block for start, count in runs for block in range(start, start + count)])
            assert shown["computed"] + 1 == shown["prompt"] + shown["output"]
        assert tables == [sequence.block_table for sequence in server.llm.engine.scheduler.running]
        shared = set(tables[0]) & set(tables[1])
        assert {block for block, state in enumerate(states) if state % 4 == 2} == shared
        assert (first["num_running"], first["num_waiting"]) == (2, 0)
        assert first["rates"]["generated"] is None
        assert second["rates"]["generated"] == 0  # it stands still
        assert first["ttft"]
        assert first["itl"]
    assert eventually(lambda: server.feed._task is None)  # nobody watches any more


@pytest.mark.parametrize("size", ["1280,1400", "390,1900"])
def test_the_page_shows_it(server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str) -> None:
    with two_requests_under_way(server, monkeypatch):
        options = f"--window-size={size}", "--virtual-time-budget=3000"
        for _ in range(10):  # a browser whose time is virtual may not wait for the first event
            page, console = browse_address(f"{server.url}/", tmp_path, *options)
            if page.all("dt"):
                break
    assert console == []
    assert page.one("h1").text == "tiny"
    assert page.one("p", id="state").text == "live"
    figures = dict(zip(*([e.text for e in page.all(tag)] for tag in ("dt", "dd")), strict=True))
    assert figures["running"] == "2"
    assert figures["last step"] == "2 tokens of 2"
    assert "P95" in figures["TTFT"]
    rows = page.one("table").rows()[1:]
    assert [row[1] for row in rows] == ["decode", "decode"]
    assert "48 of 8 tokens" in page.one("span", id="blocks").text
    height = page.one("canvas").attributes["style"]
    assert height.startswith("height: ")
    width = int(page.one("canvas").attributes["width"])
    assert width <= max(int(size.split(",")[0]), 500)  # the least that a browser without a window has


def test_a_second_tier_is_shown_and_what_was_found_there(thinker: Path, tmp_path: Path) -> None:
    settings = {"num_blocks": 8, "block_size": 8, "num_swap_blocks": 12, "enable_hierarchical_cache": True}
    with serving(lambda: LLM(thinker, show_progress=False, **settings), "tiny") as server:
        wait_until_ready(server)
        for first in (1, 2, 1):
            ask(server, "/v1/completions", {"prompt": [first] * 50, "max_tokens": 1})
        manager = server.llm.engine.block_manager
        feed = snapshots(server)
        shown = next(feed)
        feed.close()  # type: ignore[attr-defined]
        assert shown["cache"] == {"queries": 150, "hits": 48, "host_hits": manager.stats.host_hits}
        assert 0 < manager.stats.host_hits <= 48
        assert shown["tier"] == {
            "num": 12, "swapped": 0, "cached": manager.num_offloaded_blocks, "offloads": True
        }  # fmt: skip
        with Driven(f"{server.url}/", tmp_path, 390, 844) as page:
            page.until("$('figures').children.length")
            cells = page.evaluate("[...$('figures').children].map(one => one.textContent)")
            assert f"of it, second tier{manager.stats.host_hits / 1.5:.1f} % of prompts" in cells
            told = f"; second tier: 12, 0 of swapped requests, {manager.num_offloaded_blocks} cached"
            assert page.evaluate("$('blocks').textContent").endswith(told)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert page.console == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_chat_box_talks_with_the_model(
    server: Any, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    monkeypatch.setattr(server.llm.engine, "generation_defaults", {"temperature": 0.0, "max_tokens": 24})
    greedy = SamplingParams(temperature=0, max_tokens=24)
    conversation: list[dict[str, str]] = []
    with Driven(f"{server.url}/", tmp_path, width, height) as page:
        assert page.until("document.title === 'tiny' && $('state').textContent === 'live'")
        for number, said in enumerate(["hello there", "and\n<b>you</b>?"], 1):
            page.evaluate(f"$('say').value = {json.dumps(said)}; $('chat').requestSubmit()")
            page.until(f"messages.length === {2 * number}")
            conversation.append({"role": "user", "content": said})
            [expected] = llm.chat(conversation, greedy)
            shown = page.evaluate("[...$('talk').children].map(one => [one.className, one.textContent])")
            mine = [["user", said], ["thought", expected.reasoning], ["assistant", expected.text]]
            assert shown[-len([one for one in mine if one[1]]) :] == [one for one in mine if one[1]]
            conversation.append({"role": "assistant", "content": expected.text})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("$('anew').click()")
        assert page.evaluate("[messages.length, $('talk').children.length]") == [0, 0]
        # What cannot be answered is told, and is no part of what the model hears next.
        page.evaluate("$('say').value = 'word '.repeat(500); $('chat').requestSubmit()")
        page.until("$('stop').hidden && $('talk').lastChild?.className === 'error'")
        assert page.evaluate("messages.length") == 0
        # An answer is stopped in its midst, which frees what it held.
        monkeypatch.setattr(
            server.llm.engine, "generation_defaults", {"temperature": 0.0, "ignore_eos": True}
        )
        step = server.llm.engine.step
        monkeypatch.setattr(server.llm.engine, "step", lambda: time.sleep(0.02) or step())
        page.evaluate("$('say').value = 'hello'; $('chat').requestSubmit()")
        page.until("!$('stop').hidden && $('talk').children.length > 1")
        page.evaluate("$('stop').click()")
        page.until("$('stop').hidden")
        assert eventually(lambda: not server.llm.engine.has_unfinished)
        assert page.console == []
    assert eventually(lambda: server.feed._num_watchers == 0)


def test_nothing_of_the_page_comes_from_elsewhere(server: Any) -> None:
    status, headers, text = request(server, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "://" not in text
    assert request(server, "/live", method="HEAD")[0] == 200
