"""The command `serve`: the engine behind HTTP. What it does beyond its flags is the server's business."""

import argparse
import os
from functools import partial
from typing import Any

from pagellm.engine.checks import integer, number, path
from pagellm.engine.commands.flags import Flag, add_flags, given
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.server.limits import LONGEST_S, Limits

_KEYS_VARIABLE = "PAGELLM_API_KEYS"
_LIMIT_FLAGS = {
    "max_queued_requests": Flag("prompts without a token, beyond which more are answered with 503"),
    "max_queued_tokens": Flag("the same for the tokens of these prompts (default: no limit)"),
    "max_body_bytes": Flag("bytes of a request"),
    "max_n": Flag("completions that a request may ask for of a prompt"),
    "max_logprobs": Flag("log-probabilities that it may ask for of a token"),
    "max_stop_strings": Flag("stop strings that it may have"),
    "keep_alive": Flag("seconds after which a stream without news says that it is alive", "S"),
    "request_timeout": Flag(
        "seconds from its arrival after which a request is given up (default: no limit)", "S"
    ),
}


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `serve`."""
    from pagellm.engine.commands.cli import CHAT_FLAGS, GENERATION_FLAG, TOOL_FLAG, add_model_options

    serve = commands.add_parser("serve", help="serve the model over HTTP", description=_serve.__doc__)
    add_model_options(serve, budget="stall_free")
    add_flags(serve.add_argument_group("sampling"), EngineConfig, GENERATION_FLAG)
    add_flags(serve.add_argument_group("chat"), EngineConfig, CHAT_FLAGS | TOOL_FLAG)
    group = serve.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0: any (default: %(default)s)")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME",
        help="what clients may call the model; answers use the first (default: as --model)",
    )  # fmt: skip
    group.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="S", dest="shutdown_timeout",
        help="seconds that requests under way have after SIGTERM (default: %(default)g)",
    )  # fmt: skip
    add_flags(group, Limits, _LIMIT_FLAGS)
    group.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="ORIGIN", dest="allowed_origins",
        help="origins whose pages may ask, such as https://example.org, or * (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--api-key-file", metavar="FILE", dest="api_key_file",
        help=f"keys, one a line, of which requests must have one; also in {_KEYS_VARIABLE}, with commas",
    )  # fmt: skip
    group.add_argument(
        "--kv-events", metavar="ENDPOINT", dest="kv_events",
        help="publish what the prefix cache knows over ZMQ, as vLLM does, e.g. tcp://*:5557",
    )  # fmt: skip
    group.add_argument(
        "--kv-events-replay", metavar="ENDPOINT", dest="kv_events_replay",
        help="and again what was published, to who asks here",
    )  # fmt: skip
    group.add_argument(
        "--kv-events-topic", default="", metavar="TEXT", dest="kv_events_topic",
        help="the topic under which it is published (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", dest="log_format",
        help="what the log says of each request: a line of text, or of JSON (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--otlp-traces-endpoint", metavar="URL", dest="otlp_traces_endpoint",
        help="send a span of each request there, over OTLP and HTTP, such as http://localhost:4318/v1/traces",
    )  # fmt: skip
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve over TLS with this certificate")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="and its key")
    serve.set_defaults(command=_serve)


def _serve(options: argparse.Namespace) -> None:
    """Serve the model to clients of OpenAI's and vLLM's interface.

    Ctrl-C or SIGTERM ends it when the requests under way have ended; a second one ends it at once. With
    --json one line on standard output says where it listens and what it serves, once it does.
    """
    from pagellm.engine.commands.cli import engine_config, load_llm, needing_server

    integer("port", options.port, 0, 65535, error=ConfigError)
    number("shutdown_timeout", options.shutdown_timeout, 0.0, LONGEST_S, error=ConfigError)
    if options.ssl_keyfile is not None and options.ssl_certfile is None:
        raise ConfigError("ssl_keyfile: found one without a certificate, expected --ssl-certfile with it")
    limits = Limits(**given(options, Limits))
    if options.kv_events is None and (options.kv_events_replay is not None or options.kv_events_topic):
        raise ConfigError("kv_events: found none beside its replay or topic, expected --kv-events with them")
    keys = _api_keys(options.api_key_file)
    config = engine_config(options)
    if options.kv_events is not None and not config.enable_prefix_caching:
        raise ConfigError("kv_events: found one with --no-prefix-caching, expected a cache to tell of")
    with needing_server("serve"):
        from pagellm.engine.server.kv_events import KvEvents
        from pagellm.engine.server.run import run_server

    events = None
    if options.kv_events is not None:
        events = KvEvents(options.kv_events, options.kv_events_replay, options.kv_events_topic)
    run_server(
        partial(load_llm, options.model, config), options.served_model_name or [options.model],
        options.host, options.port, options.shutdown_timeout, limits, keys=keys,
        ssl_certfile=options.ssl_certfile, ssl_keyfile=options.ssl_keyfile,
        allowed_origins=options.allowed_origins, events=events, log_format=options.log_format,
        otlp_traces_endpoint=options.otlp_traces_endpoint, as_json=options.json,
    )  # fmt: skip


def _api_keys(file: str | None) -> list[str]:
    """The keys of the file, one a line, and of the environment. Raises `ConfigError` for bad ones."""
    keys = [key for key in os.environ.get(_KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            with open(path("api_key_file", file, ConfigError), encoding="ascii") as lines:
                in_file = [line for line in lines if line.strip()]
        except UnicodeDecodeError:
            raise ConfigError(f"api_key_file: found bytes beyond ASCII in {file}, expected none") from None
        if not in_file:
            raise ConfigError(f"api_key_file: found no key in {file}, expected one a line")
        keys += in_file
    return [key.strip() for key in keys]
