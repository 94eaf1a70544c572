"""The server in a Ray cluster: replicas of it behind Ray Serve, asked like one server.

    pip install 'pagellm[serve]' 'ray[serve]'
    python examples/ray_serve.py --replicas 2        # then: base_url="http://localhost:8000/v1"

On one machine it starts a cluster of its own; with `RAY_ADDRESS` it joins the one that is there. Ray chooses
a replica by how many requests it has, which knows nothing of prefixes: where prompts begin alike, the router
of `examples/router.py` finds more in the caches.
"""

import argparse
import sys
from typing import Any

from ray import serve


def deployment(model: str, replicas: int, threads: int, settings: dict[str, Any]) -> Any:
    """An application of Ray Serve: every replica is a whole server, with `threads` processors of its own."""

    def app() -> Any:
        from pagellm import LLM
        from pagellm.engine.server.app import make_app
        from pagellm.engine.server.service import Service

        llm = LLM(model, num_threads=threads, **settings)  # a replica is asked once it has its model
        return make_app(Service(lambda: llm, [model]))

    @serve.deployment(
        name="pagellm", num_replicas=replicas, max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": threads},
    )  # fmt: skip
    @serve.ingress(app)
    class Server:
        """One replica."""

    return Server.bind()


def main() -> int:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--replicas", type=int, default=2, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each replica")
    parser.add_argument(
        "--num-blocks", type=int, default=2048, metavar="N", help="of each replica's KV cache"
    )
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    settings = {"num_blocks": options.num_blocks}
    serve.run(deployment(options.model, options.replicas, options.threads, settings), blocking=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
