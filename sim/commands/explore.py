"""The command `pagellm explore`: a local page on which a trace is replayed with other settings."""

import argparse
import html
import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.engine.scheduling.policies import POLICIES
from pagellm.sim.commands.sweep import add_step_times, cost_source
from pagellm.sim.commands.trace import add_trace_input, load_trace
from pagellm.sim.sweep.grid import Grid
from pagellm.sim.sweep.serving import Serving, load_costs
from pagellm.sim.traces.trace import Trace

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

_CONTROLS = ("rate_factor", "replicas", "num_blocks", "policy")
_PAGE = Path(__file__).with_name("explore.html")


def add_explore(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `explore`. After parsing, `options.command(options)` runs it; bad input is a `PagellmError`."""
    explore = commands.add_parser("explore", help="replays on a local page", description=_explore.__doc__)
    add_trace_input(explore)
    add_step_times(explore)
    explore.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    explore.add_argument("--port", type=int, default=8765, metavar="N", help="(default: %(default)s)")
    explore.set_defaults(command=_explore)


def _explore(options: argparse.Namespace) -> None:
    """Serve a page on this machine on which a trace is replayed with other settings."""
    explorer = make_explorer(options)
    try:
        server = explorer.server(options.port)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port: found {options.port}, expected a free one: {error}") from None
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def make_explorer(options: argparse.Namespace) -> "Explorer":
    """What serves the page, of the command's options. Raises `PagellmError`."""
    costs = cost_source(options)
    load_costs(costs).check_error(options.accept_profile_error)
    trace = load_trace(options)
    trace = trace if options.limit is None else trace.limited(options.limit)
    next(iter(trace))
    return Explorer(trace, Serving(costs), options.skip_bad)


class Explorer:
    """Replays one trace, one replay at a time, and knows how far it is."""

    def __init__(self, trace: Trace, serving: Serving, skip_bad: bool = False) -> None:
        self._trace, self._serving, self._skip_bad = trace, serving, skip_bad
        self._lock = threading.Lock()
        self.progress = {"ended": 0, "now_s": 0.0}

    def page(self) -> str:
        """The page with its controls."""
        blocks = self._serving.simulator({}).config.num_blocks
        options = "".join(f"<option>{html.escape(name)}</option>" for name in POLICIES)
        text = _PAGE.read_text("utf-8").replace("{{policies}}", options)
        return text.replace("{{blocks}}", str(blocks)).replace("{{trace}}", html.escape(self._trace.name))

    def report(self, query: str) -> str:
        """The page of the replay that a query asks for. Raises `PagellmError`."""
        given = dict(parse_qsl(query))
        if unknown := given.keys() - set(_CONTROLS):
            raise ConfigError(f"explore: found {min(unknown)!r}, expected one of {', '.join(_CONTROLS)}")
        [settings] = Grid.parse(f"{name}={value}" for name, value in given.items())
        if settings.get("policy", "fcfs") not in POLICIES:
            raise ConfigError(f"policy: found {settings['policy']!r}, expected one of {', '.join(POLICIES)}")
        with self._lock, tempfile.TemporaryDirectory() as directory:
            self.progress = {"ended": 0, "now_s": 0.0}
            replayer = self._serving.simulator(settings, skip_bad=self._skip_bad)
            report = replace(replayer, progress=self._note).replay(self._trace)
            path = Path(directory) / "report.html"
            report.to_html(path)
            return path.read_text("utf-8")

    def server(self, port: int) -> "ThreadingHTTPServer":
        """Serves it to this machine alone. Raises `OSError`."""
        # Here, because no other command needs them, and each would import them at its start.
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        explorer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                try:
                    if url.path == "/":
                        self._answer(200, explorer.page())
                    elif url.path == "/report":
                        self._answer(200, explorer.report(url.query))
                    elif url.path == "/progress":
                        self._answer(200, json.dumps(explorer.progress))
                    else:
                        self._answer(404, "not found")
                except PagellmError as error:
                    self._answer(400, f"<p>{html.escape(str(error))}</p>")

            def _answer(self, status: int, text: str) -> None:
                body = text.encode("utf-8", "xmlcharrefreplace")
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Says nothing."""

        return ThreadingHTTPServer(("127.0.0.1", port), Handler)

    def _note(self, num_ended: int, now: float) -> None:
        self.progress = {"ended": num_ended, "now_s": now}
