"""The page on which a trace is replayed with other settings."""

import argparse
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from pagellm.sim import Workload, synthesise
from pagellm.sim.commands.explore import add_explore, make_explorer
from tests.sim.browser import Driven


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    synthesise(Workload(num_requests=12)).save(tmp_path / "trace.jsonl")
    parser = argparse.ArgumentParser()
    add_explore(parser.add_subparsers())
    arguments = ["explore", str(tmp_path / "trace.jsonl"), "--roofline", "l4,smollm2-135m"]
    server = make_explorer(parser.parse_args(arguments)).server(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def get(url: str) -> str:
    with urlopen(url) as answer:
        return str(answer.read().decode())


def test_a_replay_is_seen_with_other_settings(address: str) -> None:
    page = get(f"{address}/")
    assert all(f'name="{name}"' in page for name in ("rate_factor", "replicas", "num_blocks", "policy"))
    assert "{{" not in page
    report = get(f"{address}/report?rate_factor=2&replicas=2&num_blocks=900&policy=fair")
    data = json.loads(report.split('id="data"')[1].split(">", 1)[1].split("</script>")[0])["reports"][0]
    assert (data["load"]["rate_factor"], data["load"]["replicas"]) == (2, 2)
    assert (data["config"]["num_blocks"], data["config"]["policy"]) == (900, "fair")
    assert json.loads(get(f"{address}/progress"))["ended"] == 12


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(width: int, address: str, tmp_path: Path) -> None:
    with Driven(f"{address}/", tmp_path / "browser", width, 844) as page:
        said = "document.querySelector('output').textContent"
        page.until(f"{said} === 'done'")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        inside = "document.querySelector('iframe').contentDocument.body.textContent"
        assert "12 of 12" in page.until(inside)
        page.evaluate("document.querySelector('[name=num_blocks]').value = 2")
        page.evaluate("document.querySelector('button').click()")
        page.until(f"{said} === 'refused, as is said below'")
        page.until(f"{inside}.includes('expected at most 32')")
        assert page.console == []


@pytest.mark.parametrize("query", ["replicas=0", "policy=nobody:Policy", "step_log=x", "num_blocks=a"])
def test_a_bad_setting_is_named(query: str, address: str) -> None:
    with pytest.raises(HTTPError) as error:
        get(f"{address}/report?{query}")
    assert error.value.code == 400
    assert query.partition("=")[0] in error.value.read().decode()
