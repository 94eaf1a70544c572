"""Pages as a browser makes them: loaded without a window, their scripts run, the document read back."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest

# Which browser: nothing said, the first of these that is installed; an empty name, none.
NAMED = os.environ.get("PAGELLM_BROWSER")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
    "--window-size=1280,2000", "--virtual-time-budget=10000", "--dump-dom",
)  # fmt: skip
# Starts a command that reads from descriptor 3 and writes to 4, as a browser does to be told what to do.
_WITH_PIPES = """
import fcntl, os, sys
told, said = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(told, 3)
os.dup2(said, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class Element:
    """An element of a document, its children being elements and texts."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that it shows, each space a plain one."""
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return re.sub(r"[\u202f\u00a0]", " ", "".join(parts))

    def all(self, tag: str, **attributes: str) -> list["Element"]:
        """The elements inside with this tag and these attributes; _class stands for class."""
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [e for e in self._inside() if e.tag == tag and wanted.items() <= e.attributes.items()]

    def one(self, tag: str, **attributes: str) -> "Element":
        """The only such element."""
        [element] = self.all(tag, **attributes)
        return element

    def rows(self) -> list[list[str]]:
        """The cells of a table."""
        return [
            [e.text for e in row.children if isinstance(e, Element) and e.tag in ("td", "th")]
            for row in self.all("tr")
        ]

    def _inside(self) -> Iterator["Element"]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child._inside()


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def browser() -> str:
    """The browser's command. Without one the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None) if NAMED is None else NAMED
    if not found:
        pytest.skip("no browser is installed: none of " + ", ".join(NAMES))
    return found


def browse(path: Path) -> tuple[Element, list[str]]:
    """A page after its scripts have run, and what the browser's console said."""
    return browse_address(path.as_uri(), path.parent / "browser")


def browse_address(address: str, profile: Path, *more: str) -> tuple[Element, list[str]]:
    """What is at an address after its scripts have run, and what the browser's console said.

    Without a browser the test is skipped; where `PAGELLM_BROWSER` names one, as in CI, that has to work.
    """
    done = subprocess.run(
        [browser(), *OPTIONS, *more, f"--user-data-dir={profile}", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    parser = _Parser()
    parser.feed(done.stdout)
    return parser.open[0], re.findall(r"CONSOLE.*", done.stderr)


class Driven:
    """A browser without a window, at an address; it is told what to do by its own protocol over two pipes."""

    def __init__(self, address: str, profile: Path, width: int, height: int) -> None:
        self._profile, self._address, self._size = profile, address, (width, height)
        self._numbers = count(1)
        self._rest = b""
        self.console: list[str] = []

    def __enter__(self) -> "Driven":
        told, self._out = os.pipe()
        self._in, said = os.pipe()
        options = [one for one in OPTIONS if "dump-dom" not in one and "virtual-time" not in one]
        command = [
            browser(),
            *options,
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        start = [sys.executable, "-c", _WITH_PIPES, str(told), str(said), *command]
        self._process = subprocess.Popen(
            start, pass_fds=(told, said), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(told)
        os.close(said)
        self._session: dict[str, str] = {}
        [page] = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Runtime.enable")
        width, height = self._size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=self._address)
        self.until("document.readyState === 'complete'")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        self._process.kill()
        self._process.wait()
        os.close(self._in)

    def call(self, method: str, **params: Any) -> Any:
        """What the browser answers to a command of its protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.console.append(json.dumps(answer["params"])[:1000])

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "the browser says nothing"
            data = os.read(self._in, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, within_s: float = 30) -> Any:
        """The value of an expression once it is one that counts as true."""
        end_s = time.monotonic() + within_s
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end_s, expression
            time.sleep(0.05)
        return value
