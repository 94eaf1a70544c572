"""Traces stream, keep the order of arrival, survive being written, and refuse what is bad with its place."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import TraceError
from pagellm.sim import Trace, TraceRequest
from pagellm.sim.traces.trace import SKIP_BAD

GOOD: dict[str, Any] = {"arrival_time": 1.5, "output_len": 2, "prompt_len": 20}
TIMES = st.floats(0, 1e9)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@st.composite
def requests(draw: st.DrawFn) -> TraceRequest:
    """Any request."""
    prompt_len = draw(st.integers(1, 2000))
    pieces = -(-prompt_len // 512)
    hash_ids = st.lists(st.integers(0, 2**64 - 1), min_size=pieces, max_size=pieces)
    text = st.text(st.characters(codec="utf-8"), min_size=1)
    prompt = draw(
        st.one_of(
            st.just({"prompt_len": prompt_len}),
            st.fixed_dictionaries({"prompt_len": st.just(prompt_len), "hash_ids": hash_ids}),
            st.fixed_dictionaries({"prompt": text}),
            st.fixed_dictionaries({"prompt_token_ids": st.lists(st.integers(0, 2**31 - 1), min_size=1)}),
        )
    )
    return TraceRequest(
        arrival_time=draw(TIMES),
        output_len=draw(st.integers(1, 10**6)),
        id=draw(text),
        priority=draw(st.integers(-5, 5)),
        session=draw(st.none() | text),
        tenant=draw(st.none() | text),
        deadline_s=draw(st.none() | TIMES),
        **prompt,
    )


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
@given(st.lists(requests(), min_size=1, max_size=5))
def test_what_is_saved_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, name: str, given: list[TraceRequest]
) -> None:
    path = tmp_path_factory.mktemp("saved") / name
    trace = Trace.from_requests(given)
    assert trace.save(path) == len(given)
    assert list(Trace.load(path)) == list(trace)
    assert [r.index for r in Trace.load(path)] == list(range(len(given)))
    document = path.with_name("trace.json")
    document.write_text(json.dumps({"requests": [r.to_dict() for r in given]}))
    assert list(Trace.load(document)) == list(trace)


@given(st.lists(TIMES, min_size=1))
def test_a_document_is_sorted_by_arrival_and_keeps_the_order_of_equals(
    tmp_path_factory: pytest.TempPathFactory, times: list[float]
) -> None:
    path = tmp_path_factory.mktemp("document") / "trace.json"
    given = [GOOD | {"arrival_time": time, "output_len": 1 + i} for i, time in enumerate(times)]
    path.write_text(json.dumps({"requests": given}, indent=1))
    expected = sorted((time, 1 + i) for i, time in enumerate(times))
    assert [(r.arrival_time, r.output_len) for r in Trace.load(path)] == expected


def test_times_of_the_own_format_stay_and_names_are_positions(tmp_path: Path) -> None:
    path = write(tmp_path / "t", GOOD, "", GOOD | {"arrival_time": 3, "id": 17, "session": 4, "unknown": 1})
    first, second = Trace.load(path)
    assert (first.arrival_time, first.id, first.session) == (1.5, "0", None)
    assert (second.arrival_time, second.id, second.session, second.index) == (3.0, "17", "4", 1)


def test_a_stream_is_read_line_by_line_and_ends_with_its_error(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", GOOD, GOOD | {"arrival_time": 2}, "{")
    stream = iter(Trace.load(path))
    assert [next(stream).arrival_time, next(stream).arrival_time] == [1.5, 2.0]
    with pytest.raises(TraceError, match=r"trace.jsonl:3: column \d: found '\{', expected JSON"):
        next(stream)


def test_a_time_that_runs_backwards_is_an_error_or_sorted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", GOOD | {"arrival_time": 5}, GOOD | {"arrival_time": 4.5}, GOOD)
    with pytest.raises(
        TraceError, match=r"t.jsonl:2: arrival_time: found 4.5, expected .* never decrease; 0.5 s .*--sort"
    ):
        list(Trace.load(path))
    in_order = list(Trace.load(path, sort=True))
    assert [r.arrival_time for r in in_order] == [1.5, 4.5, 5.0]
    assert [(r.index, r.id) for r in in_order] == [(0, "0"), (1, "1"), (2, "2")]


BAD_LINES: list[tuple[object, str]] = [
    ("not json", "column"),
    ('{"arrival_time": 1', "column"),
    ("[1, 2]", "request"),
    ("17", "request"),
    ("[" * 100_000, "line"),
    ('{"a": ' + "1" * 5000 + "}", "line"),
    ('{"arrival_time": NaN, "output_len": 1, "prompt_len": 1}', "arrival_time"),
    ('{"arrival_time": 1e999, "output_len": 1, "prompt_len": 1}', "arrival_time"),
    ({"output_len": 1, "prompt_len": 1}, "arrival_time"),
    ({"arrival_time": 2, "prompt_len": 1}, "output_len"),
    ({"arrival_time": 2, "output_len": 1}, "prompt_len"),
    (GOOD | {"output_len": -1}, "output_len"),
    (GOOD | {"prompt_len": 0}, "prompt_len"),
    (GOOD | {"prompt_len": True}, "prompt_len"),
    (GOOD | {"arrival_time": -1}, "arrival_time"),
    (GOOD | {"arrival_time": 1.25}, "arrival_time"),
    (GOOD | {"hash_ids": [1, 2], "hash_block_size": 512}, "hash_ids"),
    (GOOD | {"id": 1.5}, "id"),
    (GOOD | {"prompt": "\ud800", "prompt_len": None}, "prompt"),
]


@pytest.mark.parametrize(("line", "field"), BAD_LINES)
def test_a_bad_line_is_one_error_or_one_counted_skip(tmp_path: Path, line: object, field: str) -> None:
    path = write(tmp_path / "trace.jsonl", GOOD, line, GOOD | {"arrival_time": 2})
    with pytest.raises(TraceError) as caught:
        list(Trace.load(path))
    assert str(caught.value).startswith(f"{path}:2: {field}")
    assert re.search(": found .*, expected ", str(caught.value))
    assert len(str(caught.value).splitlines()) == 1

    trace = Trace.load(path, skip_bad=True)
    for _ in range(2):  # each iteration counts anew
        assert [(r.arrival_time, r.index) for r in trace] == [(1.5, 0), (2.0, 1)]
        assert trace.num_skipped == 1
        [(number, message)] = trace.skipped
        assert (number, f"{path}:2: {message}; {SKIP_BAD}") == (2, str(caught.value))


def test_bytes_that_are_no_utf8_are_an_error_of_their_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(TraceError, match=r"trace.jsonl:2: byte 9: found b'\\xff\"}\\n', expected UTF-8"):
        list(Trace.load(path))
    trace = Trace.load(path, skip_bad=True)
    assert (len(list(trace)), trace.num_skipped) == (1, 1)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(list(Trace.load(path))) == 1


def test_skips_are_listed_up_to_a_bound_and_counted_in_full(tmp_path: Path) -> None:
    trace = Trace.load(write(tmp_path / "t", GOOD, *["x"] * 1000), skip_bad=True)
    assert len(list(trace.limited(5).scaled(2))) == 1
    assert trace.num_skipped == 1000
    assert [line for line, _ in trace.skipped] == list(range(2, 102))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_damaged_gzip_file_is_an_error_after_what_was_whole(tmp_path: Path, skip_bad: bool) -> None:
    path = tmp_path / "trace.jsonl.gz"
    lines = [json.dumps(GOOD | {"session": f"{i**9:x}"}) + "\n" for i in range(20_000)]
    content = gzip.compress("".join(lines).encode())
    for damaged in (content[: len(content) // 2], content[:-20] + b"x" * 12 + content[-8:]):
        path.write_bytes(damaged)
        stream = iter(Trace.load(path, skip_bad=skip_bad))
        assert next(stream).arrival_time == 1.5
        with pytest.raises(TraceError, match=r"trace.jsonl.gz:\d+: found damaged gzip data"):
            list(stream)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"requests": [\n{"arrival_time": 1,}]}', r":2: column \d+: found malformed JSON"),
        ('{"requests": [', r":1: column \d+: found malformed JSON"),
        ('{"requests": []}', r": found no requests"),
        ('{"requests": 5}', r':1: column \d+: .*expected "\["'),
        ('{\n"request": []}', r':2: .*expected "requests" before it'),
        ('{"requests": [%s], "requests": [%s]}', r":1: .*only once"),
        ('{"requests": [%s]} x', r":1: .*expected the end of the document"),
        ('{"requests": [%s', r":1: .*malformed JSON"),
        ('{"a": {"requests": 1}, "requests": [%s,\n 7]}', r":2: requests\[1\]: request: found 7"),
        (
            '{"requests": [%s,\n\n {"arrival_time": 1, "output_len": -1}]}',
            r":3: requests\[1\]: output_len: found -1",
        ),
        ('{"requests": [' + "[" * 100_000, r":1: found JSON beyond limits"),
    ],
)
def test_a_bad_document_is_one_error_when_it_is_loaded(tmp_path: Path, document: str, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(document.replace("%s", json.dumps(GOOD)))
    with pytest.raises(TraceError, match=rf"^{path}{message}") as caught:
        Trace.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_document_may_hold_more_and_skip_what_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(
        json.dumps({"version": 1, "requests": [GOOD, {}, 5, GOOD], "more": {"requests": 2}}, indent=1)
    )
    with pytest.raises(TraceError, match=r"requests\[1\]: arrival_time: found nothing"):
        Trace.load(path)
    trace = Trace.load(path, skip_bad=True)
    assert len(list(trace)) == 2
    assert [line for line, _ in trace.skipped] == [9, 10]


@pytest.mark.parametrize("content", ["", "\n \n", "x,y\n1,2\n", '{"a": 1}\n{"b": 2}\n', "17\n", "\0\0\0\n"])
def test_a_file_without_a_known_format_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(TraceError, match=rf"^{path}:.*expected "):
        Trace.load(path)


def test_what_is_no_file_or_no_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="missing: cannot be read: No such file"):
        Trace.load(tmp_path / "missing", format="mooncake")
    with pytest.raises(TraceError, match="cannot be read: Is a directory"):
        Trace.load(tmp_path)
    with pytest.raises(TraceError, match="format: found 'parquet', expected one of json, jsonl, mooncake"):
        Trace.load(tmp_path, format="parquet")


def test_a_file_in_which_all_is_bad_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t", GOOD | {"output_len": -2}, GOOD | {"output_len": -1})
    with pytest.raises(
        TraceError, match=r"found no requests \(2 bad, 0 dropped, .*; line 1: output_len: found -2"
    ):
        list(Trace.load(path, skip_bad=True))


def some(n: int) -> Trace:
    return Trace.from_requests(TraceRequest(arrival_time=i, output_len=1 + i, prompt_len=1) for i in range(n))


def test_a_trace_is_scaled_limited_and_retimed() -> None:
    trace = some(5)
    assert [r.arrival_time for r in trace.scaled(4).limited(3)] == [0, 0.25, 0.5]
    assert [(r.arrival_time, r.output_len) for r in trace.retimed(lambda: [7.0, 7.5])] == [(7, 1), (7.5, 2)]
    assert [r.output_len for r in trace.through(lambda rs: (r for r in rs if r.output_len % 2))] == [1, 3, 5]
    assert len(list(trace.limited(9))) == len(list(trace)) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda trace: trace.scaled(0),
        lambda trace: trace.scaled(-1.0),
        lambda trace: trace.scaled(float("nan")),
        lambda trace: list(trace.scaled(1e-320)),
        lambda trace: trace.limited(0),
        lambda trace: trace.limited(True),
        lambda trace: Trace.from_requests([]),
    ],
)
def test_a_change_out_of_range_is_an_error(change: Callable[[Trace], object]) -> None:
    with pytest.raises(TraceError, match=r"found .* expected"):
        change(some(2))


def test_a_trace_in_memory_is_sorted_and_names_its_requests() -> None:
    late, early = (replace(next(iter(some(1))), arrival_time=t, id="") for t in (2.0, 1.0))
    assert [(r.arrival_time, r.id, r.index) for r in Trace.from_requests([late, early])] == [
        (1.0, "0", 0),
        (2.0, "1", 1),
    ]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    def failing(requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
        yield next(requests)
        raise TraceError("line 2")

    path = write(tmp_path / "trace.jsonl", "before")
    with pytest.raises(TraceError, match="line 2"):
        some(3).through(failing).save(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("trace.jsonl", "before\n")]
    with pytest.raises(TraceError, match="cannot be written"):
        some(3).save(tmp_path / "nowhere" / "trace.jsonl")


def test_equal_traces_are_equal_files(tmp_path: Path) -> None:
    for name in ("one.gz", "other.gz"):
        some(100).save(tmp_path / name)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "other.gz").read_bytes()


def test_a_trace_may_be_saved_over_the_file_that_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    some(3).save(path)
    Trace.load(path).scaled(2).save(path)
    assert [r.arrival_time for r in Trace.load(path)] == [0, 0.5, 1]


def test_a_link_stays_one_when_a_trace_is_written_through_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target.jsonl")
    (tmp_path / "one").write_text('{"arrival_time": 0, "prompt_len": 3, "output_len": 1}\n')
    for _ in range(2):
        assert Trace.load(tmp_path / "one").save(tmp_path / "link") == 1
        assert (tmp_path / "link").is_symlink()
        assert len(list(Trace.load(tmp_path / "target.jsonl"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "one", "target.jsonl"]


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="needs a device without end")
def test_what_has_no_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TraceError, match=r"^/dev/zero: found a device, expected a file or a pipe"):
        Trace.load("/dev/zero")
    monkeypatch.setattr("pagellm.sim.fields.MAX_LINE_BYTES", 100)
    (tmp_path / "t.jsonl").write_text('{"arrival_time": 0, "prompt_len": 3, "output_len": 1}\n' + "x" * 101)
    with pytest.raises(TraceError, match=r"t.jsonl:2: found a line of more than 100 bytes, expected less"):
        list(Trace.load(tmp_path / "t.jsonl"))
