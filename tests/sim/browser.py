"""Pages as a browser makes them: loaded without a window, their scripts run, the document read back."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

# Which browser: nothing said, the first of these that is installed; an empty name, none.
NAMED = os.environ.get("PAGELLM_BROWSER")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
    "--window-size=1280,2000", "--virtual-time-budget=10000", "--dump-dom",
)  # fmt: skip
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


def browse(path: Path) -> tuple[Element, list[str]]:
    """A page after its scripts have run, and what the browser's console said."""
    return browse_address(path.as_uri(), path.parent / "browser")


def browse_address(address: str, profile: Path, *more: str) -> tuple[Element, list[str]]:
    """What is at an address after its scripts have run, and what the browser's console said.

    Without a browser the test is skipped; where `PAGELLM_BROWSER` names one, as in CI, that has to work.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None) if NAMED is None else NAMED
    if not browser:
        pytest.skip("no browser is installed: none of " + ", ".join(NAMES))
    done = subprocess.run(
        [browser, *OPTIONS, *more, f"--user-data-dir={profile}", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    parser = _Parser()
    parser.feed(done.stdout)
    return parser.open[0], re.findall(r"CONSOLE.*", done.stderr)
