"""Requests that wait: a turn for the answer before it, a join for all its branches, to the exact second."""

import json
from array import array
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.engine import EngineConfig, TraceError
from pagellm.sim import Simulator, Trace, TraceRequest, Workload, synthesise
from pagellm.sim.traces.sessions import Sessions
from tests.sim.test_simulator import CONFIG, Run, Seconds


def request(name: str, arrival: float = 0.0, prompt: int = 8, output: int = 3, **fields: Any) -> TraceRequest:
    return TraceRequest(id=name, arrival_time=arrival, prompt_len=prompt, output_len=output, **fields)


def served(run: Run) -> dict[str, tuple[float, float]]:
    """When each request was sent, and when it had its last token."""
    return {r["id"]: (r["arrival_s"], r["last_token_s"]) for r in run.results}


def test_a_turn_is_sent_when_the_answer_before_it_is_there_and_read(tmp_path: Path) -> None:
    trace = Trace.from_requests(
        [
            request("a", session="s"),  # prompt at 0, three tokens: ends at 3
            request("b", 1.0, session="s", delay_s=2.5),
            request("c", 1.5, session="s"),  # no delay: when b has ended
            request("d", 40.0, session="s"),  # its own time comes later
        ]
    )
    run = Run(trace, tmp_path)
    assert served(run) == {"a": (0, 3), "b": (5.5, 8.5), "c": (8.5, 11.5), "d": (40, 43)}
    assert [start for start, _ in run.events()] == [0, 1, 2, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5, 40, 41, 42]


def test_branches_run_side_by_side_and_are_joined(tmp_path: Path) -> None:
    trace = Trace.from_requests(
        [
            request("root"),
            request("left", after=["root"], delay_s=1),
            request("right", output=6, after=["root"], delay_s=0),
            request("join", after=["left", "right"], delay_s=0.5),
            request("apart", 1.0, after=[]),
        ]
    )
    run = Run(trace, tmp_path)
    times = served(run)
    assert times["root"] == (0, 3)
    assert (times["left"][0], times["right"][0]) == (4, 3)
    assert times["join"][0] == max(times["left"][1], times["right"][1]) + 0.5
    assert times["apart"][0] == 1


def test_a_prompt_goes_on_with_the_answer_which_is_in_the_cache(tmp_path: Path) -> None:
    """8 + 3 tokens, of which the last was never computed: 10 are, in blocks of 4, so 8 are found."""
    trace = Trace.from_requests(
        [
            request("a"),
            request("b", prompt=5, continues="a", delay_s=0),
            request("c", prompt=5, continues="b", delay_s=0),
        ]
    )
    run = Run(trace, tmp_path)
    assert [(r["prompt_tokens"], r["cached_tokens"]) for r in run.results] == [(8, 0), (16, 8), (24, 16)]


def test_branches_share_all_that_they_go_on_with(tmp_path: Path) -> None:
    """The second one has the answer's last token as well, which the first has computed."""
    trace = Trace.from_requests(
        [
            request("a", prompt=12, output=8),
            request("b", prompt=4, continues="a", delay_s=0),
            request("c", prompt=4, continues="a", delay_s=9),
        ]
    )
    run = Run(trace, tmp_path)
    assert [(r["prompt_tokens"], r["cached_tokens"]) for r in run.results] == [(12, 0), (24, 16), (24, 20)]


def test_whole_prompts_go_on_where_their_contents_say_so(tmp_path: Path) -> None:
    """As Mooncake and Bailian write a conversation: each prompt whole, by the ids of its pieces."""
    pieces = {"hash_block_size": 8, "session": "s"}
    trace = Trace.from_requests(
        [
            request("a", prompt=12, output=9, hash_ids=(1, 2), **pieces),
            request("b", prompt=30, hash_ids=(1, 5, 6, 7), **pieces),  # 12 + 9 and 9 new ones
            request("c", prompt=40, hash_ids=(3, 4, 5, 6, 7), **pieces),  # begins otherwise
            request("d", prompt=41, hash_ids=(3, 4, 5, 6, 7, 8), **pieces),  # has no room for the answer
        ]
    )
    run = Run(trace, tmp_path)
    assert [r["prompt_tokens"] for r in run.results] == [12, 30, 40, 41]
    # b: 20 tokens of a were computed; of c's 40 d has its own pieces alone.
    assert [r["cached_tokens"] for r in run.results] == [0, 20, 0, 40]


def test_synthetic_turns_never_come_before_the_answer(tmp_path: Path) -> None:
    workload = Workload(
        num_requests=60, turns="fixed:6", think_time_s="fixed:1", output_len="fixed:40", prompt_len="fixed:20"
    )
    run = Run(synthesise(workload), tmp_path, EngineConfig(block_size=4, num_blocks=5000))
    trace = list(synthesise(workload))
    ends = {r["id"]: r["last_token_s"] for r in run.results}
    sent = {r["id"]: r["arrival_s"] for r in run.results}
    last: dict[str, str] = {}
    for turn in trace:
        assert turn.session is not None
        if turn.session in last:
            assert sent[turn.id] == ends[last[turn.session]] + 1
        last[turn.session] = turn.id
    # Each later turn of n tokens before finds all whole blocks of the n - 1 that were computed.
    by_id = {r["id"]: r for r in run.results}
    for turn in trace:
        before = by_id[turn.id]["prompt_tokens"] - 20
        assert by_id[turn.id]["cached_tokens"] == max(0, before - 1) // 4 * 4


def test_clients_serve_a_conversation_each(tmp_path: Path) -> None:
    trace = Trace.from_requests(
        [
            request("a1", 5.0, session="a"),
            request("a2", 6.0, session="a", delay_s=1),
            request("b", 7.0),
            request("c1", 8.0, session="c"),
            request("c2", 90.0, session="c"),
        ]
    )
    run = Run(trace, tmp_path, clients=1)
    assert served(run) == {"a1": (0, 3), "a2": (4, 7), "b": (7, 10), "c1": (10, 13), "c2": (13, 16)}


def test_think_time_stays_what_it_is_when_more_requests_come(tmp_path: Path) -> None:
    requests = [request("a", 10.0, session="s"), request("b", 14.0, session="s", delay_s=4)]
    run = Run(Trace.from_requests(requests), tmp_path, rate_factor=0.5)
    assert served(run) == {"a": (20, 23), "b": (27, 30)}


def test_a_turn_after_one_that_was_not_served_goes_on_with_what_the_trace_has(tmp_path: Path) -> None:
    pieces = {"hash_block_size": 8, "session": "s"}
    requests = [
        request("a", prompt=8, output=50, hash_ids=(1,), **pieces),
        request("b", prompt=70, hash_ids=tuple(range(1, 10)), delay_s=1, **pieces),
    ]
    run = Run(Trace.from_requests(requests), tmp_path, timeout_s=5)
    assert run.outcomes() == [("a", "timed_out", 5), ("b", "finished", 9)]
    assert run.results[1]["prompt_tokens"] == 70


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([request("a", after=["x"])], "after: found 'x', expected the id of another request"),
        ([request("a", continues="x")], "continues: found 'x', expected the id of another request"),
        ([request("a"), request("a"), request("b", after=["a"])], "after: found 'a', which several have"),
        ([request("a", after=["b"]), request("b", after=["a"])], "wait for each other, expected no circle"),
        ([request("a", continues="a")], "wait for each other"),
    ],
)
def test_what_nobody_can_wait_for_is_refused(requests: list[TraceRequest], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        Simulator(CONFIG, Seconds()).replay(Trace.from_requests(requests))


def test_a_file_whose_format_has_no_sessions_is_not_searched_for_them(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    trace = Trace.load(path)
    path.unlink()
    assert not trace.has_sessions()


def test_sessions_survive_a_file(tmp_path: Path) -> None:
    requests = [
        request("a", class_="chat"),
        request("b", after=["a"], delay_s=2.0),
        request("c", continues="b"),
    ]
    trace = Trace.from_requests(requests)
    path = tmp_path / "t.jsonl"
    trace.save(path)
    assert list(Trace.load(path)) == list(trace)
    assert json.loads(path.read_text().splitlines()[0])["class"] == "chat"
    (tmp_path / "a").mkdir()
    assert served(Run(Trace.load(path), tmp_path)) == served(Run(trace, tmp_path / "a"))


class Naive:
    """The rules as `TraceRequest` has them, where a request takes a second a token."""

    def __init__(self, requests: list[TraceRequest]) -> None:
        self.sent: dict[str, float] = {}
        lengths = {item.id: item.output_len for item in requests}
        for item in requests:  # each waits for earlier ones alone
            end = max((self.sent[name] + lengths[name] for name in item.after or ()), default=0.0)
            delay = item.delay_s if item.after else None
            self.sent[item.id] = max(item.arrival_time, end) if delay is None else end + delay


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tree_is_sent_as_its_rules_say(data: st.DataObject) -> None:
    """With a batch that never fills every request takes a second a token, so that each end is known."""
    size = data.draw(st.integers(1, 12))
    requests = []
    for number in range(size):
        after = data.draw(st.lists(st.integers(0, number - 1), unique=True, max_size=3)) if number else []
        requests.append(
            request(
                str(number),
                float(data.draw(st.integers(0, 20))),
                output=data.draw(st.integers(1, 5)),
                after=[str(other) for other in after],
                delay_s=data.draw(st.none() | st.integers(0, 9).map(float)) if after else None,
            )
        )
    naive = Naive(requests)
    sent: dict[str, float] = {}
    replay = _sent_times(Trace.from_requests(requests), sent)
    assert sent == naive.sent
    assert replay == size


def _sent_times(trace: Trace, sent: dict[str, float]) -> int:
    """Drives `Sessions` alone: each request ends its output_len after it is sent."""
    sessions = Sessions(trace)
    events: list[tuple[float, int, int, TraceRequest]] = []
    for item in sessions.openers():
        heappush(events, (item.arrival_time, 0, item.index, item))
    number = 0
    while events:
        now, kind, index, item = heappop(events)
        if kind == 0:
            sent[item.id] = now
            number += 1
            heappush(events, (now + item.output_len, 1, index, item))
        else:
            for time_s, follower in sessions.ended(item, array("i", [0]), now):
                heappush(events, (time_s, 0, follower.index, follower))
    return number
