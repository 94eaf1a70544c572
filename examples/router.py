"""Two servers of one model and vLLM's router before them, by one command; Ctrl-C ends them all.

    pip install 'pagellm[serve]' vllm-router
    python examples/router.py                       # then: base_url="http://localhost:30000/v1"
    python examples/router.py --policy cache_aware --servers 4 -- --quantization int8 --num-threads 1

What follows `--` is given to each `pagellm serve`. With `kv_aware` the servers publish what their prefix
caches know, and a prompt goes to where most of it is known; with `cache_aware` the router guesses that from
what it sent where. Servers on other machines are started there in the same way, and named to the router.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def main() -> int:
    """Starts what is asked for; returns the exit status of the first that ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--policy", default="kv_aware", help="of the router (default: %(default)s)")
    parser.add_argument("--servers", type=int, default=2, metavar="N")
    parser.add_argument("--port", type=int, default=30000, help="of the router (default: %(default)s)")
    parser.add_argument("--first-server-port", type=int, default=8000, metavar="N")
    parser.add_argument("--first-events-port", type=int, default=5557, metavar="N")
    parser.add_argument("rest", nargs="*", help="flags of each server, after --")
    options = parser.parse_args()
    beside = Path(sys.executable).parent / "vllm-router"
    router = str(beside) if beside.exists() else shutil.which("vllm-router")
    if router is None:
        print("router.py: found no vllm-router, expected pip install vllm-router", file=sys.stderr)
        return 2
    urls, commands = [], []
    sources = ["--kv-event-model", options.model]
    for index in range(options.servers):
        port, events = options.first_server_port + index, options.first_events_port + 2 * index
        urls.append(f"http://127.0.0.1:{port}")
        sources += ["--kv-event-source", f"{urls[-1]}=tcp://127.0.0.1:{events}"]
        sources += ["--kv-event-replay-source", f"{urls[-1]}=tcp://127.0.0.1:{events + 1}"]
        commands.append(
            [
                sys.executable, "-m", "pagellm", "serve", "--model", options.model, "--port", str(port),
                "--kv-events", f"tcp://127.0.0.1:{events}",
                "--kv-events-replay", f"tcp://127.0.0.1:{events + 1}", *options.rest,
            ]
        )  # fmt: skip
    processes = [subprocess.Popen(command) for command in commands]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while not all(map(is_ready, urls)):
            if any(process.poll() is not None for process in processes):
                return 1
            time.sleep(0.2)
        processes.append(
            subprocess.Popen(
                [router, "--policy", options.policy, "--port", str(options.port),
                 "--prometheus-port", str(options.port + 1),
                 *(sources if options.policy == "kv_aware" else ()), "--worker-urls", *urls]
            )
        )  # fmt: skip
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


def is_ready(url: str) -> bool:
    """Whether a server has its model."""
    try:
        with urllib.request.urlopen(f"{url}/health"):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


if __name__ == "__main__":
    sys.exit(main())
