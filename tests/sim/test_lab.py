"""The gallery, replayed in one table, and each of its policies confirmed on the real engine."""

import json
from pathlib import Path

import pytest

from pagellm.__main__ import main
from pagellm.engine import ConfigError
from pagellm.engine.errors import PagellmError
from pagellm.sim import Trace, TraceRequest, Workload, synthesise
from pagellm.sim.lab import Confirmation, entries, small
from tests.conftest import model_path

ROOT = Path(__file__).parents[2]
GALLERY = sorted(map(str, (ROOT / "examples" / "policies").glob("*.py")))
TRACE = str(ROOT / "examples" / "traces" / "mooncake_conversation.jsonl")


def crowd() -> list[TraceRequest]:
    """Prompts of five beginnings that come more and less often, of two tenants and lengths, all at once."""
    beginnings = [0, 1, 0, 2, 3, 0, 1, 4, 2, 0, 3, 1, 0, 4, 2, 0, 1, 3, 0, 2, 4, 1, 0, 3]
    return [
        TraceRequest(
            arrival_time=0.0,
            prompt_len=41 if number % 3 else 33,
            output_len=4 + number % 9,
            hash_ids=(10 * group, 10 * group + 1, 10 * group + 2, 100 + number, 200 + number, 300 + number)[
                : 6 if number % 3 else 5
            ],
            hash_block_size=8,
            tenant="ab"[number % 5 == 0],
            id=str(number),
            index=number,
        )
        for number, group in enumerate(beginnings)
    ]


@pytest.fixture(scope="module")
def confirm() -> Confirmation:
    return Confirmation(str(model_path("llama_gqa")), crowd())


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: Path(path).stem)
def test_each_policy_is_short_and_its_decisions_and_bits_are_the_engines(
    path: str, confirm: Confirmation
) -> None:
    assert len(Path(path).read_text("utf-8").splitlines()) < 40
    for entry in entries([path]):
        steps, _ = confirm(entry)
        assert steps > 60


def test_a_router_that_decides_otherwise_on_real_engines_is_not_confirmed(
    confirm: Confirmation, tmp_path: Path
) -> None:
    path = tmp_path / "moody.py"
    path.write_text(
        "from pagellm.sim import Router\n"
        "class Moody(Router):\n"
        "    made = 0\n"
        "    def __init__(self):\n"
        "        Moody.made += 1\n"
        "    def choose(self, sequence, replicas):\n"
        "        return 1 if Moody.made > 2 and len(sequence.token_ids) == 33 else 0\n"
    )
    [entry] = entries([str(path)])
    with pytest.raises(PagellmError, match=r"^Moody: request \d+ went to engine 0, simulated 1"):
        confirm(entry)


def test_the_laboratory_prints_a_row_for_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "lab.html"
    files = [path for path in GALLERY if Path(path).stem in ("lru", "belady", "kv_router")]
    arguments = ["--trace", TRACE, "--limit", "30", "--roofline", "h100-sxm,llama-3.1-8b"]
    arguments += ["--set", "num_blocks=10000", "--replicas", "2", "--report", str(page), "--json"]
    assert main(["lab", *files, *arguments]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["built in", "Belady", "KvRouter", "LRU", "round robin"]
    same = [name for name in rows["LRU"] if name not in ("policy", "kind")]
    assert [rows["LRU"][name] for name in same] == [rows["built in"][name] for name in same]
    assert rows["Belady"]["hit_rate"] >= rows["LRU"]["hit_rate"]
    assert page.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "rate_factor=2"], "set: found key 'rate_factor', expected a setting of the engine"),
        (["--set", "hardware=h100-sxm"], "set: found key 'hardware', expected a setting of the engine"),
        (["--set", "num_blocks=10,20"], "set: found several values of a setting, expected one, which is"),
        (["--confirm-requests", "0"], "confirm_requests: found 0, expected a positive integer"),
    ],
)
def test_what_the_laboratory_does_not_take_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lab", GALLERY[0], "--trace", TRACE, "--roofline", "h100-sxm,llama-3.1-8b", *arguments]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_setting_may_name_a_policy_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lab_policy_of_mine.py").write_text(
        "from pagellm import SchedulingPolicy\nclass Mine(SchedulingPolicy):\n    prefills_alone = True\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--trace", TRACE, "--limit", "3", "--roofline", "h100-sxm,llama-3.1-8b", "--json"]
    lru = next(path for path in GALLERY if Path(path).stem == "lru")
    assert main(["lab", lru, *arguments, "--set", "policy=lab_policy_of_mine:Mine"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_a_file_without_a_policy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.py"
    path.write_text("x = 1")
    with pytest.raises(ConfigError, match="found no policy, expected a class that is one"):
        list(entries([str(path)]))


def test_what_is_confirmed_is_a_crowd_that_shares_prompts() -> None:
    requests = small(Trace.load(TRACE), 24)
    assert {request.arrival_time for request in requests} == {0.0}
    assert max(request.prompt_len or 0 for request in requests) == 48
    ids = [request.hash_ids or () for request in requests]
    assert len({first for first, *_ in ids}) < len(requests)
    assert [request.index for request in requests] == list(range(24))


def test_a_policy_that_fails_costs_its_own_replays_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Belady's needs prompts that are known, and a turn that waits for an answer is not."""
    (tmp_path / "boom.py").write_text(
        "from pagellm import SchedulingPolicy\n"
        "class Boom(SchedulingPolicy):\n"
        "    def order(self, sequence, stats):\n"
        "        return sequence.output_len\n"
    )
    trace = tmp_path / "turns.jsonl"
    synthesise(Workload(num_requests=20, turns="fixed:2")).save(trace)
    gallery = Path(__file__).parents[2] / "examples" / "policies"
    files = [str(tmp_path / "boom.py"), str(gallery / "belady.py"), str(gallery / "lru.py")]
    arguments = ["lab", *files, "--trace", str(trace), "--roofline", "l4,smollm2-135m", "--json"]
    assert main([*arguments, "--report", str(tmp_path / "lab.html")]) == 2
    out, err = capsys.readouterr()
    rows = {row["policy"]: row for row in json.loads(out)["rows"]}
    assert "asks for 'output_len', which a policy cannot see" in rows["Boom"]["error"]
    assert "with a trace whose turns wait for answers" in rows["Belady"]["error"]
    assert rows["LRU"]["error"] is rows["built in"]["error"] is None
    assert rows["LRU"]["requests_per_s"] > 0
    assert "lab: 2 of 4 replays failed; the first: policy Boom: order(): " in err
