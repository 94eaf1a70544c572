"""The workers of a sweep on a Ray cluster: each does one piece of work at a time on some core of it.

Ray is not needed otherwise, and is imported here alone.
"""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from pagellm.engine.errors import ConfigError
from pagellm.sim.sweep.workers import Worker

_PATIENCE_S = 10.0


class _Remote(Executor):
    """Sends what it is given to the cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = self._ray.remote(num_cpus=1)(function).remote(*arguments, **named).future()
        return future


def _reach(address: str) -> None:
    """Raises `OSError` where nobody answers at HOST:PORT, which Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()


@contextmanager
def start_ray_workers(address: str, number: int | None) -> Iterator[tuple[list[Worker], Callable[[], None]]]:
    """So many workers on the cluster at an address, as many as it has cores where that is None.

    As `start_workers`; an interrupt is raised where it comes. Raises `ConfigError`.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("ray: found no package ray, expected it installed: pip install ray") from None
    was_initialised = ray.is_initialized()
    try:
        _reach(address)
        if not was_initialised:
            ray.init(address=address, logging_level="error", log_to_driver=False)
        number = number or max(1, int(ray.cluster_resources().get("CPU", 1)))
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(f"ray: {address}: {reason}, expected the address of a cluster") from None
    try:
        yield [Worker(lambda: _Remote(ray)) for _ in range(number)], lambda: None
    finally:
        if not was_initialised:
            ray.shutdown()
