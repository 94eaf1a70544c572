"""Each format becomes requests exactly, is told from its content, and has its bad fields named."""

import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import TraceError
from pagellm.sim import Trace
from pagellm.sim.traces import formats

MOONCAKE = {"timestamp": 27_000, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}
BAILIAN = {
    "chat_id": 159, "parent_chat_id": 55, "timestamp": 61.5, "input_length": 33, "output_length": 132,
    "type": "text", "turn": 2, "hash_ids": [1089, 1090, 6326],
}  # fmt: skip
SHAREGPT = {
    "id": "QWJhYvA_0",
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello there!"},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "So long."},
    ],
}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def trace(tmp_path: Path, *lines: Any, **options: Any) -> Trace:
    path = tmp_path / "trace"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return Trace.load(path, **options)


def shape(requests: Trace) -> list[tuple[float, int | None, int]]:
    return [(r.arrival_time, r.prompt_len, r.output_len) for r in requests]


def test_mooncake(tmp_path: Path) -> None:
    first, second = trace(tmp_path, MOONCAKE, MOONCAKE | {"timestamp": 30_500})
    assert (first.arrival_time, first.prompt_len, first.output_len) == (0.0, 600, 52)
    assert (first.hash_ids, first.hash_block_size, first.id, first.session) == ((46, 47), 512, "0", None)
    assert second.arrival_time == 3.5


def test_bailian_turns_belong_to_the_conversation_that_they_go_back_to(tmp_path: Path) -> None:
    chats = [(1, -1), (2, -1), (3, 1), (4, 3), (5, 2), (6, 100)]
    lines = [BAILIAN | {"chat_id": chat, "parent_chat_id": parent} for chat, parent in chats]
    requests = list(trace(tmp_path, *lines))
    assert [r.session for r in requests] == ["1", "2", "1", "1", "2", "100"]
    assert [r.id for r in requests] == ["1", "2", "3", "4", "5", "6"]
    assert (requests[0].arrival_time, requests[0].prompt_len, requests[0].output_len) == (0, 33, 132)
    assert (requests[0].hash_ids, requests[0].hash_block_size) == ((1089, 1090, 6326), 16)


def test_bailian_forgets_the_oldest_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_MAX_CHATS", 2)
    chats = [(1, -1), (2, 1), (3, 2), (4, 3), (5, 2)]
    lines = [BAILIAN | {"chat_id": chat, "parent_chat_id": parent} for chat, parent in chats]
    assert [r.session for r in trace(tmp_path, *lines)] == ["1", "1", "1", "1", "2"]


def test_azure_times_are_exact_to_the_last_digit(tmp_path: Path) -> None:
    lines = ["2023-11-16 18:15:46.6805900,374,44\n", "2023-11-16 18:15:46.6805901,396,109\n", "\n"]
    assert shape(trace(tmp_path, AZURE, *lines)) == [(0.0, 374, 44), (1e-7, 396, 109)]


def test_azure_times_of_2024_have_an_offset_and_may_lack_a_fraction(tmp_path: Path) -> None:
    lines = ["2024-05-09 23:59:59.500000+00:00,1,2\n", "2024-05-10 00:00:00+00:00,3,4\n"]
    lines += ["2024-05-10T01:00:01.25+01:00,5,6\n", "2024-05-10 00:00:02Z,7,8\n"]
    assert shape(trace(tmp_path, AZURE, *lines)) == [(0, 1, 2), (0.5, 3, 4), (1.75, 5, 6), (2.5, 7, 8)]


def test_burstgpt_drops_and_counts_what_failed(tmp_path: Path) -> None:
    lines = [
        "4,ChatGPT,0,0,0,API log\n",
        "5,ChatGPT,472,18,490,Conversation log\n",
        "45.5,GPT-4,1087,230,1317,API log\n",
    ]
    requests = trace(tmp_path, BURSTGPT, *lines)
    assert shape(requests) == [(0, 472, 18), (40.5, 1087, 230)]
    assert (requests.num_dropped, requests.num_skipped) == (1, 0)


JSONL = {"arrival_time": 0, "prompt_len": 4, "output_len": 5}


@pytest.mark.parametrize(
    "lines",
    [
        [json.dumps(MOONCAKE | {"output_length": n, "timestamp": 8000}) + "\n" for n in (5, 0)],
        [json.dumps(MOONCAKE | {"output_length": n, "timestamp": 0.5}) + "\n" for n in (5, 0)],
        [json.dumps(BAILIAN | {"output_length": n}) + "\n" for n in (5, 0)],
        [AZURE, "2023-11-16 18:15:46,4,5\n", "2023-11-16 18:15:46,4,0\n"],
        [BURSTGPT, "1,m,4,5,9,l\n", "2,m,4,0,4,l\n"],
        [json.dumps(JSONL) + "\n", json.dumps(JSONL | {"output_len": 0}) + "\n"],
        [json.dumps({"requests": [JSONL, JSONL | {"output_len": 0}]})],
    ],
)
def test_what_generates_nothing_is_dropped_and_counted_in_every_format(
    tmp_path: Path, lines: list[str]
) -> None:
    requests = trace(tmp_path, *lines)
    assert [r.output_len for r in requests] == [5]
    assert (requests.num_dropped, requests.num_skipped) == (1, 0)


def test_mooncake_times_with_fractions_are_seconds(tmp_path: Path) -> None:
    lines = [MOONCAKE | {"timestamp": time} for time in (3, 4, 5.25, 65.5)]
    requests = trace(tmp_path, *lines)
    assert [r.arrival_time for r in requests] == [0, 1, 2.25, 62.5]
    assert requests.format == "mooncake-s"
    assert [r.arrival_time for r in trace(tmp_path, *lines, format="mooncake")] == [0, 1, 2.25, 62.5]


def test_mooncake_times_that_are_whole_are_milliseconds(tmp_path: Path) -> None:
    lines = [MOONCAKE | {"timestamp": time} for time in (3000, 4000.0, 5250)]
    requests = trace(tmp_path, *lines)
    assert ([r.arrival_time for r in requests], requests.format) == ([0, 1, 2.25], "mooncake")
    seconds = trace(tmp_path, *lines, format="mooncake-s")
    assert [r.arrival_time for r in seconds] == [0, 1000, 2250]


def test_a_mooncake_clock_does_not_change_its_unit(tmp_path: Path) -> None:
    lines = [*[MOONCAKE | {"timestamp": 7}] * 100, MOONCAKE | {"timestamp": 7.5}]
    with pytest.raises(TraceError, match=r"trace:101: timestamp: found 7.5, expected whole .*mooncake-s"):
        list(trace(tmp_path, *lines))
    assert len(list(trace(tmp_path, *lines, format="mooncake-s"))) == 101


def test_burstgpt_with_sessions(tmp_path: Path) -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    [request] = trace(tmp_path, header, "5,abc,1.5,ChatGPT,472,18,490,Conversation log\n")
    assert (request.session, request.prompt_len, request.output_len) == ("abc", 472, 18)


def test_azure_rows_of_each_year(tmp_path: Path) -> None:
    """2023: seven digits, no offset; 2024: six and an offset; 2025: a column for the images."""
    year_2023 = ["2023-11-16 18:32:25.8150120,719,10\r\n", "2023-11-16 18:32:25.8150340,1986,6\r\n"]
    assert shape(trace(tmp_path, AZURE, *year_2023)) == [(0, 719, 10), (22e-6, 1986, 6)]
    year_2024 = ["2024-05-10 00:00:00.009930+00:00,2162,5\n", "2024-05-10 00:00:00.017335+00:00,2399,6\n"]
    assert shape(trace(tmp_path, AZURE, *year_2024)) == [(0, 2162, 5), (0.007405, 2399, 6)]
    year_2025 = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
    row = "2024-10-15 00:00:00.5,2,1500,40\n"
    assert shape(trace(tmp_path, year_2025, row)) == [(0, 1500, 40)]


def test_burstgpt_rows_of_its_second_release(tmp_path: Path) -> None:
    """Only conversations have a session; the clock goes on from the first release's."""
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    lines = [
        "19440110.0,1722ac82-0a46-4bf0-aa08-89794e7a2b3f,43,GPT-4,906,446,1352,Conversation log\n",
        "19440161.0,d5983bf9-4b48-497b-892b-a58995247443,2,ChatGPT,36,29,65,Conversation log\n",
        "19440161.0,,1,ChatGPT,300,20,320,API log\n",
        "19440162.0,,0,ChatGPT,0,0,0,API log\n",
    ]
    requests = trace(tmp_path, header, *lines)
    assert shape(requests) == [(0, 906, 446), (51, 36, 29), (51, 300, 20)]
    assert [r.session for r in requests][1:] == ["d5983bf9-4b48-497b-892b-a58995247443", None]
    assert requests.num_dropped == 1


def test_mooncake_rows_share_the_blocks_that_they_begin_with(tmp_path: Path) -> None:
    shared = list(range(46, 58))
    lines = [
        {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [*shared, 2353, 2354]},
        {"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [*shared, 2366]},
    ]
    first, second = trace(tmp_path, *lines)
    assert second.arrival_time == pytest.approx(3.053)
    assert (first.hash_ids or ())[:12] == (second.hash_ids or ())[:12] == tuple(shared)


def test_bailian_rows_of_the_newer_files_have_other_types_and_no_parent(tmp_path: Path) -> None:
    line = {
        "chat_id": 0, "parent_chat_id": -1, "timestamp": 0.0, "input_length": 502, "output_length": 1494,
        "type": "thinking", "turn": 1, "hash_ids": list(range(32)),
    }  # fmt: skip
    [request] = trace(tmp_path, line)
    assert (request.id, request.session, request.prompt_len, request.output_len) == ("0", "0", 502, 1494)


class Characters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def test_sharegpt_asks_with_the_conversation_so_far(tmp_path: Path) -> None:
    other = {"id": 7, "conversations": SHAREGPT["conversations"][:2]}
    requests = list(trace(tmp_path, [SHAREGPT, other]))
    assert [r.prompt for r in requests] == ["Hi", "Hi\nHello there!\nBye", "Hi"]
    assert [r.output_len for r in requests] == [3, 2, 3]  # a token for 4 bytes
    assert [r.arrival_time for r in requests] == [0, 1, 2]
    assert [r.session for r in requests] == ["QWJhYvA_0", "QWJhYvA_0", "7"]
    exact = trace(tmp_path, [SHAREGPT, other], tokenizer=Characters())
    assert [r.output_len for r in exact] == [12, 8, 12]


def test_sharegpt_may_be_json_lines(tmp_path: Path) -> None:
    other = conversation(("human", "Hi"), ("gpt", "Hello"), key="items")
    requests = trace(tmp_path, SHAREGPT, other)
    assert list(requests) == list(trace(tmp_path, [SHAREGPT, other]))
    assert [r.prompt for r in requests] == ["Hi", "Hi\nHello there!\nBye", "Hi"]
    with pytest.raises(
        TraceError, match=r"trace:2: conversations: found 5, expected a list of turns; .*--skip"
    ):
        list(trace(tmp_path, SHAREGPT, {"conversations": 5}))


def test_sharegpt_asks_only_where_a_human_is_answered(tmp_path: Path) -> None:
    turns = [
        ("gpt", "ahem"),
        ("system", "Be brief."),
        ("human", "a"),
        ("user", "b"),
        ("assistant", "c"),
        ("gpt", "d"),
    ]
    requests = trace(tmp_path, [{"id": "1", "conversations": []}, conversation(*turns)])
    assert [(r.prompt, r.session) for r in requests] == [("ahem\nBe brief.\na\nb", None)]
    assert requests.num_dropped == 1


def conversation(*turns: tuple[str, str], key: str = "conversations") -> dict[str, Any]:
    return {key: [{"from": speaker, "value": text} for speaker, text in turns]}


def test_sharegpt_has_questions_and_answers_without_a_text(tmp_path: Path) -> None:
    silent = conversation(
        ("human", ""), ("gpt", "a"), ("human", "b"), ("gpt", ""), ("human", "c"), ("gpt", "d")
    )
    nothing = conversation(("human", ""), ("human", ""), ("gpt", "a"))
    requests = trace(tmp_path, [silent, nothing])
    assert [(r.prompt, r.output_len) for r in requests] == [("\na\nb\n\nc", 1)]
    assert (requests.num_dropped, requests.num_skipped) == (1, 0)


def test_sharegpt_turns_may_stand_under_items(tmp_path: Path) -> None:
    assert shape(trace(tmp_path, [conversation(("human", "Hi"), ("gpt", "Hello"), key="items")])) == [
        (0, None, 2)
    ]


@pytest.mark.parametrize("model", ["gpt", "chatgpt", "bing", "bard", "assistant"])
@pytest.mark.parametrize("human", ["human", "user"])
def test_sharegpt_has_many_names_for_who_speaks(tmp_path: Path, human: str, model: str) -> None:
    turns = (("system", "Be brief."), (human, "Hi"), (model, "Hello"))
    assert [r.prompt for r in trace(tmp_path, [conversation(*turns)])] == ["Be brief.\nHi"]


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


BAD_RECORDS = [
    *((MOONCAKE, without(MOONCAKE, name), name) for name in MOONCAKE),
    *((MOONCAKE, MOONCAKE | {"timestamp": value}, "timestamp") for value in (-1, True, "1", 26_999)),
    *((MOONCAKE, MOONCAKE | {"input_length": value}, "input_length") for value in (0, -1, 1.5, True, "5")),
    *((MOONCAKE, MOONCAKE | {"output_length": value}, "output_length") for value in (-1, 1.5, True)),
    *(
        (MOONCAKE, MOONCAKE | {"hash_ids": value}, "hash_ids")
        for value in ([46], [1, 2, 3], "46", [-1, 0], {})
    ),
    *((BAILIAN, without(BAILIAN, name), name) for name in BAILIAN if name not in ("type", "turn")),
    *((BAILIAN, BAILIAN | {"parent_chat_id": value}, "parent_chat_id") for value in (-2, "x", True)),
    *((BAILIAN, BAILIAN | {"chat_id": value}, "chat_id") for value in (-1, None, 1.0)),
]


@pytest.mark.parametrize(("good", "bad", "field"), BAD_RECORDS)
def test_a_bad_field_of_a_line_is_named(tmp_path: Path, good: Any, bad: Any, field: str) -> None:
    with pytest.raises(TraceError, match=rf"trace:2: {field}(\[0\])?: found .*, expected "):
        list(trace(tmp_path, good, bad))
    requests = trace(tmp_path, good, bad, good, skip_bad=True)
    assert (len(list(requests)), requests.num_skipped, requests.skipped[0][0]) == (2, 1, 2)


@pytest.mark.parametrize(
    ("header", "row", "field"),
    [
        *(
            (AZURE, row, "TIMESTAMP")
            for row in ("x,1,2", ",1,2", "5,1,2", "2023-13-16 18:15:46,1,2", "2023-11-16,1,2")
        ),
        (AZURE, "2023-11-16 18:15:46.12345678,1,2", "TIMESTAMP"),
        (AZURE, "2023-11-16 18:15:46,0,2", "ContextTokens"),
        (AZURE, "2023-11-16 18:15:46,-1,2", "ContextTokens"),
        (AZURE, "2023-11-16 18:15:46,1.0,2", "ContextTokens"),
        (AZURE, "2023-11-16 18:15:46,1_0,2", "ContextTokens"),
        (AZURE, "2023-11-16 18:15:46,,2", "ContextTokens"),
        (AZURE, "2023-11-16 18:15:46,1,-1", "GeneratedTokens"),
        (AZURE, "2023-11-16 18:15:46,1,nan", "GeneratedTokens"),
        (AZURE, "2023-11-16 18:15:46,1", "row"),
        (AZURE, "2023-11-16 18:15:46,1,2,3", "row"),
        (AZURE, '2023-11-16 18:15:46,"1"2,3', "row"),
        ("TIMESTAMP,ContextTokens\n", "2023-11-16 18:15:46,1", "GeneratedTokens"),
        (BURSTGPT, "nan,m,1,2,3,l", "Timestamp"),
        (BURSTGPT, "inf,m,1,2,3,l", "Timestamp"),
        (BURSTGPT, "-1,m,1,2,3,l", "Timestamp"),
        (BURSTGPT, "soon,m,1,2,3,l", "Timestamp"),
        (BURSTGPT, "1,m,0,2,2,l", "Request tokens"),
        (BURSTGPT, "1,m,1,-2,3,l", "Response tokens"),
        (BURSTGPT, "1,m,1,,3,l", "Response tokens"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, header: str, row: str, field: str) -> None:
    with pytest.raises(TraceError, match=rf"trace:2: {field}: found .*, expected "):
        list(trace(tmp_path, header, row + "\n"))


@pytest.mark.parametrize(
    ("header", "first", "second"),
    [
        (AZURE, "2023-11-16 18:15:46,1,2", "2023-11-16 18:15:45.9,1,2"),
        (BURSTGPT, "46,m,1,2,3,l", "45.9,m,1,2,3,l"),
    ],
)
def test_a_clock_that_runs_backwards_is_an_error_or_sorted(
    tmp_path: Path, header: str, first: str, second: str
) -> None:
    lines = (header, f"{first}\n", f"{second}\n")
    with pytest.raises(
        TraceError, match=r"trace:3: (TIMESTAMP|Timestamp): found .*45.9'?, .*; 0.1 s earlier"
    ):
        list(trace(tmp_path, *lines))
    assert [r.arrival_time for r in trace(tmp_path, *lines, sort=True)] == [0, pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (5, "request"),
        ({}, "conversations"),
        ({"conversations": "x"}, "conversations"),
        (SHAREGPT | {"id": 1.5}, "id"),
        ({"conversations": ["x"]}, r"conversations\[0\]"),
        ({"conversations": [{"from": "dog", "value": "x"}]}, r"conversations\[0\].from"),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\].from"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, r"conversations\[0\].from"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value"),
        ({"conversations": [{"from": "human", "value": 5}]}, r"conversations\[0\].value"),
        ({"items": [{"from": "human"}]}, r"items\[0\].value"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path: Path, bad: Any, field: str) -> None:
    with pytest.raises(TraceError, match=rf"trace:1: \[1\]: {field}: found .*, expected "):
        list(trace(tmp_path, [SHAREGPT, bad, SHAREGPT]))
    requests = trace(tmp_path, [SHAREGPT, bad, SHAREGPT], skip_bad=True)
    assert (len(list(requests)), requests.num_skipped) == (4, 1)


SAMPLES = {
    "json": json.dumps({"requests": [{"arrival_time": 0, "prompt_len": 1, "output_len": 1}]}),
    "jsonl": '{"arrival_time": 0, "prompt_len": 1, "output_len": 1}',
    "mooncake": json.dumps(MOONCAKE),
    "bailian": json.dumps(BAILIAN),
    "azure": f"{AZURE}2023-11-16 18:15:46,1,2",
    "burstgpt": f"{BURSTGPT}1,m,1,2,3,l",
    "mooncake-s": json.dumps(MOONCAKE | {"timestamp": 1.5}),
    "sharegpt": json.dumps([SHAREGPT], indent=1),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_format_is_told_from_the_content_and_can_be_named(
    tmp_path: Path, name: str, compress: bool
) -> None:
    path = tmp_path / "anything"
    content = SAMPLES[name].encode()
    path.write_bytes(gzip.compress(content) if compress else content)
    assert list(Trace.load(path)) == list(Trace.load(path, format=name))
    others = [other for other in SAMPLES if other != name]
    for other in others:
        if not {name, other} <= {"mooncake", "mooncake-s", "bailian"}:  # these share their fields
            with pytest.raises(TraceError, match="anything:"):
                list(Trace.load(path, format=other))


@pytest.mark.parametrize("name", SAMPLES)
@given(start=st.floats(0, 1), length=st.integers(0, 30), put=st.binary(max_size=12), compress=st.booleans())
def test_whatever_a_file_holds_the_only_error_is_a_traces(
    tmp_path_factory: pytest.TempPathFactory, name: str, start: float, length: int, put: bytes, compress: bool
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "trace"
    content = "\n".join([SAMPLES[name], *SAMPLES[name].splitlines()[1:]]).encode()
    content = gzip.compress(content) if compress else content
    place = int(start * len(content))
    path.write_bytes(content[:place] + put + content[place + length :])
    for skip_bad in (False, True):
        with suppress(TraceError):
            assert list(Trace.load(path, skip_bad=skip_bad))


def test_a_format_is_told_from_the_first_good_line(tmp_path: Path) -> None:
    requests = trace(tmp_path, "{oops\n", MOONCAKE, skip_bad=True)
    assert (len(list(requests)), requests.num_skipped) == (1, 1)
    with pytest.raises(TraceError, match="trace:1: column"):
        list(trace(tmp_path, "{oops\n", MOONCAKE))


def test_the_examples_are_read(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples" / "traces"
    mooncake = list(Trace.load(examples / "mooncake_conversation.jsonl"))
    azure = list(Trace.load(examples / "azure_2023_conversation.csv"))
    assert (len(mooncake), len(azure)) == (200, 200)
    assert mooncake[0].arrival_time == azure[0].arrival_time == 0
    assert all(r.hash_block_size == 512 for r in mooncake)
