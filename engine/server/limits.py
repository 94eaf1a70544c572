"""What a server takes, of everybody together and of one request: settings, checked at the door."""

from dataclasses import dataclass

from pagellm.engine.checks import integer, number
from pagellm.engine.errors import ConfigError
from pagellm.engine.requests.sampling_params import MAX_LOGPROBS

MAX_COMPLETIONS = 1024  # of one request, over all its prompts
LONGEST_S = 1e6


@dataclass(frozen=True)
class Limits:
    """What a server takes; a bad value is a `ConfigError` that names it. None: no limit.

    max_queued_requests: prompts that have no token yet; max_queued_tokens: of these prompts together. What
    more comes is refused at once, for it would wait longer than anybody does.
    max_body_bytes: of a request. max_n, max_logprobs, max_stop_strings: that it may ask for. request_timeout:
    seconds from its arrival after which it is given up. keep_alive: seconds after which a stream that has
    nothing to say says so.
    """

    max_queued_requests: int | None = 1024
    max_queued_tokens: int | None = None
    max_body_bytes: int = 64 << 20
    max_n: int = 128
    max_logprobs: int = MAX_LOGPROBS
    max_stop_strings: int = 256
    request_timeout: float | None = None
    keep_alive: float = 15.0

    def __post_init__(self) -> None:
        self._check_count("max_queued_requests", 1, optional=True)
        self._check_count("max_queued_tokens", 1, optional=True)
        self._check_count("max_body_bytes", 1)
        self._check_count("max_n", 1, MAX_COMPLETIONS)
        self._check_count("max_logprobs", 0, MAX_LOGPROBS)
        self._check_count("max_stop_strings", 0)
        number("keep_alive", self.keep_alive, 0.001, LONGEST_S, error=ConfigError)
        if self.request_timeout is not None:
            number("request_timeout", self.request_timeout, 0.001, LONGEST_S, error=ConfigError)

    def _check_count(self, name: str, low: int, high: int | None = None, optional: bool = False) -> None:
        value = getattr(self, name)
        if not (optional and value is None):
            integer(name, value, low, high, error=ConfigError)
