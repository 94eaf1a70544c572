"""The engine's commands: arguments in, text or JSON out. Everything else is the API's business."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.commands import batch, inspect, quantize, serve
from pagellm.engine.commands.flags import Flag, add_flags, given
from pagellm.engine.config import (
    DEFAULT_MODEL,
    GENERATION_CONFIGS,
    PREEMPTIONS,
    QUANTIZATIONS,
    TOOL_CALL_PARSERS,
    EngineConfig,
)
from pagellm.engine.errors import ConfigError, RequestError
from pagellm.engine.progress import say, say_piece
from pagellm.engine.requests.outputs import RequestOutput
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.policies import BUDGET_POLICIES, KINDS, POLICIES
from pagellm.engine.user_policy import import_policy

if TYPE_CHECKING:
    from pagellm.engine.llm import LLM, ChatStream

ENGINE_FLAGS = {
    "block_size": Flag("tokens of a KV block"),
    "num_blocks": Flag("blocks of the KV cache (default: what a quarter of the available memory holds)"),
    "max_num_seqs": Flag("sequences that run at once"),
    "max_num_batched_tokens": Flag("tokens of one step"),
    "max_model_len": Flag("tokens of prompt and output (default: the model's context)"),
    "max_prefill_chunk": Flag("tokens of one prompt in one step (default: as many as the step has)"),
    "policy": Flag(
        f"who goes first: {', '.join(POLICIES)}, or a SchedulingPolicy of your own as module:Class or "
        "path/file.py:Class, as those below",
        "NAME",
    ),
    "victim": Flag("who makes way: youngest or a VictimPolicy (default: as --policy says)", "NAME"),
    "admission": Flag("who is let in: accept or an AdmissionPolicy", "NAME"),
    "eviction": Flag("which cached block is given up first: lru or an EvictionPolicy", "NAME"),
    "budget": Flag(
        f"tokens of a step and of a chunk: {', '.join(BUDGET_POLICIES)} (prompts have a quarter of them "
        "beside decodes) or a BudgetPolicy",
        "NAME",
    ),
    "preemption": Flag(
        "what happens to the KV of a sequence that makes way; auto: the cheaper as measured",
        choices=PREEMPTIONS,
    ),
    "num_swap_blocks": Flag(
        "KV blocks of the second tier (default: as many as --num-blocks where anything uses it, else 0)",
        names=("--swap-blocks", "--num-swap-blocks"),
    ),
    "swap_dir": Flag("keep them in a file there (default: in memory)", "DIR"),
    "enable_hierarchical_cache": Flag("keep cached blocks that are evicted in the second tier"),
    "watermark": Flag("share of the blocks kept for growth"),
    "max_preemptions": Flag("after so many, a sequence is not preempted again"),
    "step_log": Flag("write one line of JSON for each step", "FILE"),
    "num_threads": Flag("threads (default: all cores)"),
    "quantization": Flag(
        "format of the weights; auto: as the checkpoint has them if they are in 8 or 4 bits",
        choices=QUANTIZATIONS,
    ),
    "enable_prefix_caching": Flag("compute every prompt from its first token"),
}
GENERATION_FLAG = {
    "generation_config": Flag(
        "where no flag says how to sample: auto: as the model's own files do",
        choices=GENERATION_CONFIGS,
    )
}
CHAT_FLAGS = {
    "reasoning_markers": Flag(
        "what stands around the model's thoughts; auto: what its chat template says, none: it has none",
        "START...END",
    )
}
TOOL_FLAG = {
    "tool_call_parser": Flag(
        "how the model writes calls of tools; auto: as its chat template says",
        choices=("auto", *TOOL_CALL_PARSERS),
    )
}
# Not here is what tells requests apart that share an engine: a command's requests are all of one user.
SAMPLING_FLAGS = {
    "n": Flag("completions of each prompt"),
    "max_tokens": Flag("tokens of the answer"),
    "min_tokens": Flag("tokens before anything may end it"),
    "temperature": Flag("0 is greedy", "T"),
    "top_k": Flag("sample among the K likeliest; 0 keeps all", "K"),
    "top_p": Flag("sample among the likeliest that have this probability together", "P"),
    "min_p": Flag("leave out what is less likely than this share of the likeliest", "P"),
    "repetition_penalty": Flag("divides the logits of tokens that were there"),
    "presence_penalty": Flag("subtracted from the logits of tokens of the answer"),
    "frequency_penalty": Flag("the same, as often as they occurred"),
    "seed": Flag("the same seed gives the same text"),
    "stop": Flag("end the answer before this text; may be given repeatedly"),
    "stop_token_ids": Flag("end the answer at this token; may be given repeatedly", "ID"),
    "bad_words": Flag("keep this text out of the answer; may be given repeatedly"),
    "include_stop_str_in_output": Flag("leave that text in the answer"),
    "ignore_eos": Flag("go on after the end-of-text token"),
    "skip_special_tokens": Flag("leave special tokens in the text"),
    "logprobs": Flag("with --json: log-probabilities of the N likeliest tokens"),
    "thinking_token_budget": Flag("tokens of thoughts at most, which are closed then"),
}


def add_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `generate`, `chat`, `bench`, `inspect`, `quantize`, `serve`, `batch` and `warmup`.

    After parsing, `options.command(options)` runs the chosen one, which raises `PagellmError` for bad input.
    """
    generate = commands.add_parser("generate", help="continue texts", description=_generate.__doc__)
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="standard input if there is none")
    generate.add_argument("--chat", action="store_true", help="ask each prompt as a chat's first message")
    add_model_options(generate)
    _add_sampling(generate, SAMPLING_FLAGS, max_tokens=128, temperature=0.0)
    _add_chat(generate)
    generate.set_defaults(command=_generate)

    chat = commands.add_parser("chat", help="talk with the model", description=_chat.__doc__)
    chat.add_argument("--system", help="what the system message says")
    add_model_options(chat)
    flags = {name: flag for name, flag in SAMPLING_FLAGS.items() if name != "n"}  # one answer each
    _add_sampling(chat, flags, max_tokens=512, temperature=0.6)
    _add_chat(chat)
    chat.set_defaults(command=_chat)

    bench = commands.add_parser("bench", help="measure this machine", description=_bench.__doc__)
    add_model_options(bench)
    bench.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of each prompt")
    bench.add_argument("--decode", type=int, default=128, metavar="N", help="tokens to generate after it")
    bench.add_argument(
        "--batch", type=_integers, default=[1, 4, 16], metavar="N,N,...", help="sequences at once"
    )
    bench.add_argument("--repeat", type=int, default=3, metavar="N", help="runs, whose median is reported")
    bench.set_defaults(command=_bench)

    inspect.add_command(commands)
    quantize.add_command(commands)
    serve.add_command(commands)
    batch.add_command(commands)

    warmup = commands.add_parser(
        "warmup", help="compile the kernels ahead of time", description=_warmup.__doc__
    )
    warmup.add_argument("--json", action="store_true", help="print JSON for machines")
    warmup.set_defaults(command=_warmup)


def add_model_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the model, --json, and a flag for each setting of the engine. defaults: those of this command."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"a known name, a path or a hub id (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    add_flags(parser.add_argument_group("engine"), EngineConfig, ENGINE_FLAGS, defaults)
    parser.set_defaults(engine_defaults=defaults)


def _add_sampling(parser: argparse.ArgumentParser, flags: Mapping[str, Flag], **defaults: Any) -> None:
    group = parser.add_argument_group("sampling")
    add_flags(group, SamplingParams, flags, defaults)
    add_flags(group, EngineConfig, GENERATION_FLAG)
    parser.set_defaults(sampling_defaults=defaults)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    group.add_argument("--thinking", choices=("on", "off"), help="whether the model thinks before it answers")
    group.add_argument("--reasoning-effort", metavar="EFFORT", help="how much, such as low or high")
    group.add_argument(
        "--chat-template-kwargs", metavar="JSON", help="further variables for the model's chat template"
    )
    add_flags(group, EngineConfig, CHAT_FLAGS)


def _integers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected positive integers such as 1,4,16")
    return values


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The settings that were given, the command's defaults of the others. Raises `ConfigError`."""
    return EngineConfig(**options.engine_defaults | given_settings(options))


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by the names of `EngineConfig`. Raises `ConfigError`."""
    settings = given(options, EngineConfig)
    for setting in KINDS:
        import_policy(settings.get(setting), setting)
    return settings


def load_llm(model: str, config: EngineConfig) -> "LLM":
    """The model; what it takes is imported now."""
    from pagellm.engine.llm import LLM

    return LLM(model, config=config)


def _llm(options: argparse.Namespace) -> "LLM":
    return load_llm(options.model, engine_config(options))


@contextmanager
def needing_server(command: str) -> Iterator[None]:
    """Around imports of the server: raises `ConfigError` where what it needs is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pagellm":
            raise
        raise ConfigError(f"{command}: needs pip install 'pagellm[serve]' ({error})") from None


def _sampling_params(options: argparse.Namespace) -> SamplingParams:
    if options.logprobs is not None and not options.json:
        raise RequestError(f"--logprobs: found {options.logprobs}, expected --json with it, which has them")
    return SamplingParams(**options.sampling_defaults | given(options, SamplingParams))


def _with_models_defaults(llm: "LLM", params: SamplingParams, options: argparse.Namespace) -> SamplingParams:
    """The parameters with what the model's own configuration says in the place of what was not asked for."""
    defaults = llm.engine.generation_defaults
    used = {name: value for name, value in defaults.items() if name not in given(options, SamplingParams)}
    if used and not options.json:
        named = ", ".join(f"{name} {value}" for name, value in used.items())
        say(f"as the model's own configuration says: {named}")
    return replace(params, **used)


def _chat_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `LLM.chat`. Raises `RequestError`."""
    chosen: dict[str, Any] = {}
    if options.thinking is not None:
        chosen["thinking"] = options.thinking == "on"
    if options.reasoning_effort is not None:
        chosen["reasoning_effort"] = options.reasoning_effort
    if options.chat_template_kwargs is not None:
        try:
            chosen["chat_template_kwargs"] = parse_json(options.chat_template_kwargs)
        except JsonError as error:
            raise RequestError(f"chat_template_kwargs: found {error}, expected a JSON object") from None
    return chosen


def _generate(options: argparse.Namespace) -> None:
    """Continue each prompt; several are served together.

    With --chat, thoughts go to standard error.
    """
    params = _sampling_params(options)
    chosen = _chat_options(options)
    for name in chosen if not options.chat else ():
        raise RequestError(f"{name}: found {getattr(options, name)}, expected --chat with it")
    texts: list[str] = options.prompts or _prompt_from_stdin()
    llm = _llm(options)
    params = _with_models_defaults(llm, params, options)
    conversations = [[{"role": "user", "content": text}] for text in texts]
    if options.json:
        served = llm.chat(conversations, params, **chosen) if options.chat else llm.generate(texts, params)
        outputs = [_to_json(output) for output in served]
        for output, text in zip(outputs, texts, strict=True):
            output["prompt"] = text
        print(json.dumps({"model": options.model, "outputs": outputs}, allow_nan=False))
        return
    streams: list[Iterator[str]]
    if options.chat:
        chats = llm.chat_stream_all(conversations, params, **chosen)
        streams = [_text_of(stream) for each in chats for stream in each]
    else:
        streams = [stream for each in llm.stream_all(texts, params) for stream in each]
    if len(streams) == 1:
        _print_pieces(streams[0])
        return
    for index, stream in enumerate(streams):
        text = texts[index // params.n]
        print(f"{'' if index == 0 else chr(10)}>>> {' '.join(text.split())}", flush=True)
        _print_pieces(stream)


def _prompt_from_stdin() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError("PROMPT: found none, expected one as an argument or on standard input")
    return [_from_stdin(sys.stdin.read)]


def _from_stdin(read: Callable[[], str]) -> str:
    """What is read there. Raises `RequestError` for what cannot be read, and `EOFError` as `read` does."""
    try:
        return read()
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        raise RequestError(
            f"standard input: found the byte {found!r} at {error.start}, expected text as {error.encoding}"
        ) from None
    except OSError as error:
        if error.filename is not None:  # the output's, to which a question was written
            raise
        raise RequestError(f"standard input: {error.strerror}") from None


def _print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _text_of(stream: "ChatStream") -> Iterator[str]:
    """An answer's text piece by piece. The thought before it goes to standard error."""
    is_thinking = False
    for reasoning, text in stream:
        if reasoning:
            say_piece(reasoning)
            is_thinking = True
        if text:
            if is_thinking:
                say_piece("\n\n")
                is_thinking = False
            yield text
    if is_thinking:
        say_piece("\n")


def _to_json(output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": output.text,
        "reasoning": output.reasoning,
        "num_reasoning_tokens": output.num_reasoning_tokens,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "outputs": [asdict(completion) for completion in output.outputs],
        "sampling_params": asdict(output.sampling_params) | {"logit_bias": dict(output.sampling_params.bias)},
    }


def _chat(options: argparse.Namespace) -> None:
    """Talk with the model, one message a line.

    Ctrl-C stops an answer, Ctrl-D ends. With --json each answer is one JSON object. Thoughts go to standard
    error.
    """
    params = _sampling_params(options)
    chosen = _chat_options(options)
    if sys.stdin is None:
        raise RequestError("standard input: found it closed, expected messages, one a line")
    llm = _llm(options)
    params = _with_models_defaults(llm, params, options)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    interactive = sys.stdin.isatty() and not options.json
    while True:
        try:
            line = _from_stdin(lambda: input("> " if interactive else ""))
        except EOFError:
            break
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(llm, messages, params, chosen, options.json)
        except RequestError as error:
            messages.pop()
            if not interactive:
                raise
            say(str(error))
            continue
        messages.append(answer)


def _answer(
    llm: "LLM", messages: list[dict[str, str]], params: SamplingParams, chosen: dict[str, Any], as_json: bool
) -> dict[str, str]:
    """Gives out the answer; returns it as the message that the next turn knows it as."""
    if as_json:
        output = llm.chat(messages, params, **chosen)[0]
        message = {"role": "assistant", "content": output.text}
        print(json.dumps(message | _to_json(output), allow_nan=False), flush=True)
        return message | ({"reasoning": output.reasoning} if output.reasoning else {})
    stream = llm.chat_stream(messages, params, **chosen)
    with suppress(KeyboardInterrupt):
        for piece in _text_of(stream):
            print(piece, end="", flush=True)
    print()
    reasoning, text = stream.so_far
    return {"role": "assistant", "content": text} | ({"reasoning": reasoning} if reasoning else {})


def _bench(options: argparse.Namespace) -> None:
    """Measure prefill and decode speed, in tokens a second, with random prompts."""
    from pagellm.engine.commands.throughput import measure

    for name in ("prefill", "decode", "repeat"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name}: found {getattr(options, name)}, expected a positive integer")
    llm = _llm(options)
    results = []
    if not options.json:
        print(f"{options.model}, {llm.engine.config.num_threads} threads, tokens a second")
        print(f"{'batch':>6} {f'prefill {options.prefill}':>16} {f'decode {options.decode}':>16}")
    for size in options.batch:
        result = measure(llm.engine, size, options.prefill, options.decode, options.repeat)
        results.append(asdict(result))
        if not options.json:
            print(
                f"{size:>6} {result.prefill_tokens_per_s:>16.1f} {result.decode_tokens_per_s:>16.1f}",
                flush=True,
            )
    if options.json:
        settings = {"model": options.model, "quantization": llm.engine.config.quantization}
        print(json.dumps(settings | {"num_threads": llm.engine.config.num_threads, "results": results}))


def _warmup(options: argparse.Namespace) -> None:
    """Compile the kernels for this machine, or see that they are in the cache."""
    from pagellm.engine.execution.compilation import compile_kernels

    start = time.perf_counter()
    directory = compile_kernels()
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps({"seconds": seconds, "directory": str(directory) if directory else None}))
    else:
        where = f"kept in {directory}" if directory else "for this process only"
        print(f"kernels ready after {seconds:.1f} s, {where}")
