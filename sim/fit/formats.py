"""Recorded runs as benchmarks write them down: a reader a format, which decides what its numbers mean.

A run is told by its content, a directory by the file in it that is known, or that is the one run in it; a
file may be compressed by gzip. What does not carry when requests came, how long they were and when they had
their tokens is refused by the name of what is missing; requests that failed, or got no token, are left out.
"""

import csv
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pagellm.engine import checks
from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import TraceError, found
from pagellm.engine.scheduling.policies import KINDS
from pagellm.sim.fields import Fields, check_no_device
from pagellm.sim.fit.recorded_run import RecordedRun, Served, experiment_of, settings_of, with_texts
from pagellm.sim.fit.stages import is_stages, read_stages
from pagellm.sim.traces.files import cell_value

MAX_BYTES = 1 << 30
# Of a directory's, the first that is there.
_FILES = (
    "requests.jsonl", "vllm/requests.jsonl", "profile_export.jsonl", "benchmarks.json",
    "per_request_lifecycle_metrics.json", "results/per_request_lifecycle_metrics.json",
)  # fmt: skip
# Our own engine schedules a step when it begins.
_OWN = {"steps_ahead": 0.0}
# Seconds of a unit that a file names.
_UNITS = {"s": 1.0, "sec": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_KNOWN = (
    "vLLM's bench serve --save-detailed, AIPerf's profile_export.jsonl, GuideLLM's benchmarks.json, "
    "inference-perf's per_request_lifecycle_metrics.json, LLMServingSim's requests.jsonl, BLIS's TraceV2 or "
    "stages, a step log, or the --results of a replay"
)


class _Reading:
    """Requests as they are read, those left out counted; a bad one is an error that names its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.served: list[Served] = []
        self.num_left_out = 0

    def add(
        self,
        place: str,
        arrival_s: float,
        prompt_len: int,
        output_len: int,
        first_token_s: float,
        last_token_s: float,
        prefix: tuple[str, int] = ("", 0),
    ) -> None:
        """A request; raises `TraceError` for times that run backwards."""
        if not first_token_s >= arrival_s:
            raise TraceError(
                f"{place}: found the first token {arrival_s - first_token_s:g} s before the request"
            )
        if not last_token_s >= first_token_s:
            raise TraceError(
                f"{place}: found the last token {first_token_s - last_token_s:g} s before the first"
            )
        self.served.append(Served(arrival_s, prompt_len, output_len, first_token_s, last_token_s, prefix))

    def add_record(self, record: Fields, *names: str, clock_s: float = 0.0) -> None:
        """A request that one record has whole, times in seconds.

        names: of its fields, as `add` has them. clock_s: what its arrival is to be put forward by.
        """
        arrival, prompt_len, output_len, first, last = names
        self.add(
            record.place,
            _time(record, arrival) + clock_s,
            record.integer(prompt_len),
            record.integer(output_len),
            _time(record, first),
            _time(record, last),
        )

    def run(
        self,
        format: str,
        at_client: bool,
        settings: Mapping[str, Any] | None = None,
        clients: int | None = None,
        **known: Any,
    ) -> RecordedRun:
        """The run of what was read. Raises `TraceError`."""
        experiment = experiment_of(str(self.path), self.served, settings, clients)
        return RecordedRun(str(self.path), format, at_client, [experiment], self.num_left_out, **known)


def load_run(path: str | os.PathLike[str]) -> RecordedRun:
    """The one run in a file, or in a directory that a benchmark wrote. Raises `TraceError`."""
    runs = load_runs(path)
    if len(runs) > 1:
        names = ", ".join(str(run.experiments[0].name) for run in runs[:4])
        raise TraceError(f"{path}: found {len(runs)} runs, {names}, expected one")
    return runs[0]


def load_runs(path: str | os.PathLike[str]) -> list[RecordedRun]:
    """All runs in a file or directory: stages, appended results and directories may have several.

    Raises `TraceError`.
    """
    path = checks.path("run", path, TraceError)
    if path.is_dir():
        names = [path / f"{name}{end}" for name in _FILES for end in ("", ".gz")]
        names = [name for name in names if name.is_file()]
        if not names:
            return _of_directory(path)
        path = names[0]
    text = _read(path)
    document = _document(text)
    if isinstance(document, dict):
        return [_of_object(path, document)]
    if isinstance(document, list):
        return read_stages(path, document) if is_stages(document) else [_inference_perf(path, document)]
    first = text.lstrip().split("\n", 1)[0]
    if first.startswith("{"):
        records = list(_json_lines(path, text))
        if _is_vllm_bench(records[0].values):  # --append-result
            return [_vllm_bench(path, record) for record in records]
        return [_of_records(path, records)]
    if "arrival_time_us" in (name.strip(' "') for name in first.split(",")):
        return [_trace_v2(path, text)]
    raise _unknown(path, first)


def _of_directory(folder: Path) -> list[RecordedRun]:
    """The runs in a directory whose files have names of their own; others in it are passed over."""
    runs: list[RecordedRun] = []
    why = ""
    for path in sorted(folder.iterdir()):
        if path.name.removesuffix(".gz").endswith((".json", ".jsonl", ".csv")) and path.is_file():
            try:
                runs += load_runs(path)
            except TraceError as error:
                why = why or f"; {error}"
    if not runs:
        raise TraceError(f"{folder}: found a directory without a recorded run, expected {_KNOWN}{why}")
    return runs


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            check_no_device(path, file, TraceError)
            data = file.read(MAX_BYTES + 1)
            if data.startswith(b"\x1f\x8b"):
                with gzip.open(io.BytesIO(data)) as unpacked:
                    data = unpacked.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise TraceError(f"{path}: found more than {MAX_BYTES} bytes, expected a recorded run")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: found {error.object[error.start :][:8]!r}, expected UTF-8") from None


def _document(text: str) -> Any:
    """The value of one JSON document; None where there are several, or none."""
    try:
        return parse_json(text)
    except JsonError:
        return None


def _unknown(path: Path, value: Any) -> TraceError:
    return TraceError(f"{path}: found {found(value)}, expected a recorded run: {_KNOWN}")


def _of_object(path: Path, document: dict[str, Any]) -> RecordedRun:
    if "benchmarks" in document:
        return _guidellm(path, document)
    if _is_vllm_bench(document):
        return _vllm_bench(path, Fields(document, str(path), TraceError))
    if "successes" in document and "load_summary" in document:
        raise TraceError(
            f"{path}: found the summary of a stage, expected its requests: inference-perf writes them to "
            "per_request_lifecycle_metrics.json with report.request_lifecycle.per_request"
        )
    if "summary" in document and "timeline" in document:
        raise TraceError(
            f"{path}: found a report, expected its requests: replay --real --results writes them"
        )
    if "schema_version" in document and (path.parent / "requests.jsonl").is_file():
        return load_run(path.parent / "requests.jsonl")
    return _of_records(path, [Fields(document, f"{path}:1", TraceError)])


def _of_records(path: Path, records: list[Fields]) -> RecordedRun:
    """JSON Lines, told by the fields of the first."""
    first = records[0].values
    if "metadata" in first and "metrics" in first:
        return _aiperf(path, records)
    if "input_toks" in first:
        return _llmservingsim(path, records)
    if "duration_s" in first and "scheduled" in first:
        return _step_log(path, records)
    if "outcome" in first:
        return _results(path, records)
    if "first_token_s" in first and "prompt_len" in first:
        return _plain(path, records)
    raise _unknown(path, dict(first))


def _json_lines(path: Path, text: str) -> Iterator[Fields]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield Fields(parse_json(line), f"{path}:{number}", TraceError, name="record")
            except JsonError as error:
                raise TraceError(f"{path}:{number}: found {error}, expected a record as JSON") from None


def _time(fields: Fields, name: str, unit: float = 1.0) -> float:
    """A moment, in seconds."""
    return fields.number(name, None, "a time") * unit


def _plain(path: Path, records: Iterable[Fields]) -> RecordedRun:
    """A line for each request: arrival_time, prompt_len, output_len, first_token_s, last_token_s; seconds."""
    reading = _Reading(path)
    for record in records:
        reading.add_record(
            record, "arrival_time", "prompt_len", "output_len", "first_token_s", "last_token_s"
        )
    return reading.run("requests in seconds", at_client=False)


def _results(path: Path, records: Iterable[Fields]) -> RecordedRun:
    """What `replay --real --results` writes."""
    reading = _Reading(path)
    for record in records:
        if record.get("replica"):
            raise record.bad("replica", record.get("replica"), "the requests of one engine")
        if record.get("outcome") != "finished":
            reading.num_left_out += 1
            continue
        reading.add_record(
            record, "arrival_s", "prompt_tokens", "output_tokens", "first_token_s", "last_token_s"
        )
    return reading.run("results of a replay", at_client=False, constants=_OWN)


def _step_log(path: Path, records: Iterable[Fields]) -> RecordedRun:
    """Steps of our own engine: a token of a sequence is there when the step that sampled it has ended."""
    reading = _Reading(path)
    arrivals: dict[int, tuple[str, float, int]] = {}
    tokens: dict[int, list[float]] = {}  # how many, and when the first and the last were there
    settings: dict[str, Any] = {}
    for record in records:
        if record.has("config"):
            config = record.section("config")
            # Those that are built in: a user's policy is code, which no file names.
            policies = {
                name: value
                for name, kind in KINDS.items()
                for value in [config.get(name)]
                if isinstance(value, str) and value in kind.built_in
            }
            settings = {**settings_of(config), **policies}
        if record.has("replica"):
            raise record.bad("replica", record.get("replica"), "the steps of one engine")
        for values in record.entries("added"):
            added = Fields(values, record.place, TraceError, "added.")
            sequence = added.integer("sequence", 0)
            arrivals[sequence] = record.place, _time(added, "arrival_s"), added.integer("num_prompt_tokens")
        end = _time(record, "start_s") + record.seconds("duration_s")
        for entry in record.entries("scheduled"):
            if not isinstance(entry, list) or len(entry) != 4 or type(entry[0]) is not int:
                raise record.bad("scheduled", entry, "[sequence, computed before, computed now, sampled]")
            if entry[3]:
                seen = tokens.setdefault(entry[0], [0, end, end])
                seen[0] += 1
                seen[2] = end
        for entry in record.entries("ended"):
            if not isinstance(entry, list) or not entry or type(entry[0]) is not int:
                raise record.bad("ended", entry, "[sequence, reason]")
            reading.num_left_out += arrivals.pop(entry[0], None) is not None
    for sequence, (place, arrival, prompt_len) in arrivals.items():
        if sequence in tokens:
            count, first, last = tokens[sequence]
            reading.add(place, arrival, prompt_len, int(count), first, last)
        else:
            reading.num_left_out += 1
    return reading.run("step log", at_client=False, settings=settings, constants=_OWN)


def _llmservingsim(path: Path, records: list[Fields]) -> RecordedRun:
    """What LLMServingSim's bench records of vLLM, with the engine's settings in meta.json beside it.

    arrival_time may be by another clock than the engine's times; then the smallest time from it to the
    queue is taken for the difference of the clocks.
    """
    reading = _Reading(path)
    clock = min(_time(record, "queued_ts") - _time(record, "arrival_time") for record in records)
    for record in records:
        names = "arrival_time", "input_toks", "output_toks", "first_token_ts", "last_token_ts"
        reading.add_record(record, *names, clock_s=clock)
    meta_path = path.parent / "meta.json"
    known: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if meta_path.is_file():
        meta = Fields(_document(_read(meta_path)), str(meta_path), TraceError, name="meta")
        empty: dict[str, Any] = {}
        engine, cache, hardware = (
            Fields(meta.get(name) or empty, meta.place, TraceError, f"{name}.")
            for name in ("engine_kwargs", "kv_cache", "hardware")
        )
        if engine.get("data_parallel_size") not in (None, 1):
            raise engine.bad(
                "data_parallel_size", engine.get("data_parallel_size"), "the requests of one engine"
            )
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if engine.has(name):
                settings[name] = engine.integer(name)
        if cache.has("num_gpu_blocks"):
            settings["num_blocks"] = cache.integer("num_gpu_blocks")
        if cache.has("block_size"):
            settings["block_size"] = cache.integer("block_size")
        if meta.has("model"):
            known["model"] = meta.text("model")
        if hardware.has("device_name"):
            known["hardware"] = hardware.text("device_name")
        if engine.has("tensor_parallel_size"):
            known["num_devices"] = engine.integer("tensor_parallel_size")
        if (version := _version(meta.get("vllm_version"))) is not None and version < (0, 14):
            known["constants"] = {"steps_ahead": 0.0}
    return reading.run("LLMServingSim", at_client=False, settings=settings, **known)


def _version(text: Any) -> tuple[int, int] | None:
    """The first two numbers of a version."""
    numbers = re.match(r"v?(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def _is_vllm_bench(document: Mapping[Any, Any]) -> bool:
    return "request_throughput" in document or "input_lens" in document


def _vllm_bench(path: Path, fields: Fields) -> RecordedRun:
    """What `vllm bench serve --save-result --save-detailed` writes: a list of each, all in seconds.

    A request that failed has no output, whether it says why or not. Where all were asked for at once and
    max_concurrency let so many through, each of these was followed by another when it had ended.
    """
    columns = []
    for name in ("start_times", "input_lens", "output_lens", "ttfts", "itls"):
        values = fields.get(name)
        if not isinstance(values, list):
            raise fields.bad(name, values, "a list with a value a request: vllm bench serve --save-detailed")
        columns.append(values)
    if len({len(values) for values in columns}) != 1:
        sizes = ", ".join(str(len(values)) for values in columns)
        names = "start_times, input_lens, output_lens, ttfts and itls"
        raise TraceError(f"{path}: found {sizes} {names}, expected as many of each")
    errors = fields.entries("errors")
    reading = _Reading(path)
    for index, (start, prompt_len, output_len, ttft, itls) in enumerate(zip(*columns, strict=True)):
        place = f"{path}: request {index}"
        if (index < len(errors) and errors[index]) or output_len == 0:
            reading.num_left_out += 1
            continue
        if not isinstance(itls, list):
            raise TraceError(f"{place}: itls: found {found(itls)}, expected a list")
        values = {"start_times": start, "input_lens": prompt_len, "output_lens": output_len, "ttfts": ttft}
        one = Fields(values, place, TraceError)
        begin = _time(one, "start_times")
        first = begin + one.number("ttfts", checks.SMALLEST, "seconds above 0: streamed answers")
        gaps = Fields({str(n): gap for n, gap in enumerate(itls)}, place, TraceError, "itls.")
        last = first + sum(gaps.seconds(name) for name in gaps.values)
        reading.add(place, begin, one.integer("input_lens"), one.integer("output_lens"), first, last)
    known: dict[str, Any] = {"model": fields.text("model_id")} if fields.has("model_id") else {}
    clients = None
    if fields.has("max_concurrency") and fields.get("request_rate") in (None, "inf", math.inf):
        clients = fields.integer("max_concurrency")
    return reading.run("vLLM bench serve", at_client=True, clients=clients, **known)


def _aiperf(path: Path, records: Iterable[Fields]) -> RecordedRun:
    """AIPerf's profile_export.jsonl: starts in nanoseconds, other figures with their unit."""
    reading = _Reading(path)
    for record in records:
        metadata, metrics = record.section("metadata"), record.section("metrics")
        if (
            record.has("error")
            or metadata.get("was_cancelled")
            or metadata.get("benchmark_phase") not in (None, "profiling")
        ):
            reading.num_left_out += 1
            continue
        begin = _time(metadata, "request_start_ns", 1e-9)
        first, whole = (_with_unit(metrics, name) for name in ("time_to_first_token", "request_latency"))
        lengths = []
        for name in ("input_sequence_length", "output_sequence_length"):
            if not metrics.has(name):
                raise metrics.bad(name, None, "a number of tokens")
            lengths.append(metrics.section(name).integer("value"))
        reading.add(record.place, begin, lengths[0], lengths[1], begin + first, begin + max(first, whole))
    return reading.run("AIPerf", at_client=True)


def _with_unit(metrics: Fields, name: str) -> float:
    if not metrics.has(name):
        raise metrics.bad(name, None, "a time with its unit: streamed answers")
    metric = metrics.section(name)
    unit = metric.get("unit")
    if not isinstance(unit, str) or unit not in _UNITS:
        raise metric.bad("unit", unit, f"one of {', '.join(_UNITS)}")
    return metric.seconds("value") * _UNITS[unit]


def _guidellm(path: Path, document: dict[str, Any]) -> RecordedRun:
    """GuideLLM's benchmarks.json, all of its benchmarks one after the other: moments in seconds.

    Newer ones have the moments of a request under info.timings, older ones beside its lengths.
    """
    reading = _Reading(path)
    benchmarks = document["benchmarks"]
    if not isinstance(benchmarks, list):
        raise TraceError(f"{path}: benchmarks: found {found(benchmarks)}, expected a list")
    for index, values in enumerate(benchmarks):
        benchmark = Fields(values, str(path), TraceError, f"benchmarks[{index}].")
        requests = benchmark.section("requests")
        served = requests.get("successful")
        if not isinstance(served, list):
            raise requests.bad("successful", served, "a list of requests")
        for status in ("errored", "incomplete"):
            reading.num_left_out += len(requests.entries(status))
        _check_whole(benchmark, len(served))
        for number, one in enumerate(served):
            if isinstance(one, dict) and one.get("output_tokens") == 0:
                reading.num_left_out += 1
                continue
            _guidellm_request(
                reading, Fields(one, str(path), TraceError, f"benchmarks[{index}].requests[{number}].")
            )
    return reading.run("GuideLLM", at_client=True)


def _check_whole(benchmark: Fields, num_served: int) -> None:
    """Raises `TraceError` for a sample of the requests that were served."""
    totals = benchmark.get("metrics") or {}
    totals = totals.get("request_totals") if isinstance(totals, dict) else None
    total = totals.get("successful") if isinstance(totals, dict) else None
    if isinstance(total, int) and total > num_served:
        raise TraceError(
            f"{benchmark.place}: found {num_served} of {total} requests that were served, expected all of "
            "them: guidellm without a limit on sampled requests"
        )


def _guidellm_request(reading: _Reading, one: Fields) -> None:
    place = f"{one.place}: request {len(reading.served)}"
    info = one.get("info")
    timings = info.get("timings") if isinstance(info, dict) else None
    if isinstance(timings, dict):
        times = Fields(timings, one.place, TraceError, "info.timings.")
        end = "last_token_iteration" if times.has("last_token_iteration") else "request_end"
        late = times.has("resolve_start") and not times.has("request_start")
        names = ("resolve_start" if late else "request_start", "first_token_iteration", end)
    else:
        times, names = one, ("start_time", "first_token_time", "last_token_time")
    begin, first, last = (_time(times, name) for name in names)
    prompt_len, output_len = (one.integer(name) for name in ("prompt_tokens", "output_tokens"))
    reading.add(place, begin, prompt_len, output_len, first, last)


def _inference_perf(path: Path, document: list[Any]) -> RecordedRun:
    """inference-perf's per_request_lifecycle_metrics.json: moments in seconds, of each token as well.

    What was asked is there, too, as JSON in a text: it tells which prompts begin alike, and whether sampling
    was left to the model.
    """
    reading = _Reading(path)
    texts: list[str] = []
    asked: list[dict[str, Any]] = []
    for index, values in enumerate(document):
        one = Fields(values, str(path), TraceError, f"[{index}].")
        if one.has("error") or _got_nothing(one):
            reading.num_left_out += 1
            continue
        begin = _time(one, "start_time")
        info = one.section("info")
        response = info.section("response_metrics") if info.has("response_metrics") else info
        times = response.get("output_token_times") or response.get("chunk_times")
        if not isinstance(times, list) or not times:
            raise response.bad("output_token_times", times, "the moment of each token: streamed answers")
        moments = Fields(
            {"first": times[0], "last": times[-1]}, str(path), TraceError, f"[{index}].output_token_times."
        )
        output_len = _server_tokens(response) or response.integer("output_tokens")
        reading.add(
            f"{path}: request {index}", begin, _input_tokens(info), output_len,
            _time(moments, "first"), _time(moments, "last"),
        )  # fmt: skip
        body = _document(one.get("request")) if isinstance(one.get("request"), str) else None
        if isinstance(body, dict):
            asked.append(body)
            texts.append(_prompt_text(body))
    if texts and len(texts) == len(reading.served) and all(texts):
        reading.served = with_texts(reading.served, texts)
    is_left = bool(asked) and not any("temperature" in body for body in asked)
    return reading.run("inference-perf", at_client=True, samples_as_model=is_left)


def _prompt_text(body: Mapping[str, Any]) -> str:
    """The prompt of a request to an OpenAI server; empty where it is none that is known."""
    messages = body.get("messages")
    if isinstance(messages, list):
        return "".join(str(message) for message in messages)
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, str) else ""


def _got_nothing(one: Fields) -> bool:
    """Whether a request ended without any token."""
    info = one.get("info")
    response = info.get("response_metrics", info) if isinstance(info, dict) else None
    return isinstance(response, dict) and response.get("output_tokens") == 0


def _input_tokens(info: Fields) -> int:
    """Of a prompt's text; older versions have them beside the response, where newer ones only repeat them."""
    request = info.section("request_metrics") if info.has("request_metrics") else info
    text = request.section("text") if request.has("text") else request
    text = text if text.has("input_tokens") else info
    if not text.has("input_tokens"):
        raise text.bad("input_tokens", None, "a number of tokens")
    return text.integer("input_tokens")


def _server_tokens(response: Fields) -> int | None:
    """Output tokens as the server counted them, where it said so."""
    usage = response.get("server_usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _csv_rows(path: Path, text: str) -> Iterator[dict[str | Any, str | Any]]:
    try:
        yield from csv.DictReader(io.StringIO(text))
    except csv.Error as error:
        raise TraceError(f"{path}: found {error}, expected comma-separated values") from None


def _trace_header(path: Path) -> Fields:
    """What the YAML beside a TraceV2 says, all of it scalars in one section or none; nothing without one.

    It has the name of the data, or as BLIS's examples call the two.
    """
    stem = path.name.removesuffix(".gz").removesuffix(".csv")
    names = (f"{stem}.yaml", f"{stem}.yml", stem.replace("data", "header") + ".yaml", "trace_header.yaml")
    header = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    values: dict[str, Any] = {}
    for line in _read(header).splitlines() if header else ():
        name, colon, value = line.partition(":")
        if colon and not line.lstrip().startswith("#"):
            values[name.strip()] = cell_value(value.partition(" #")[0].strip().strip("\"'"))
    said = Fields(values, str(header), TraceError)
    unit = values.get("time_unit", "microseconds")
    if unit != "microseconds":
        raise said.bad("time_unit", unit, "'microseconds'")
    return said


def _trace_v2(path: Path, text: str) -> RecordedRun:
    """BLIS's TraceV2: moments in microseconds by the client's clock; a request's begins when it was sent.

    A header beside it may say what served, and how many requests warmed it up.
    """
    reading = _Reading(path)
    header = _trace_header(path)
    known: dict[str, Any] = {"model": str(header.get("model"))} if header.has("model") else {}
    if header.has("tensor_parallel"):
        known["num_devices"] = header.integer("tensor_parallel")
    num_warm = header.integer("warm_up_requests", 0) if header.has("warm_up_requests") else 0
    for number, row in enumerate(_csv_rows(path, text), 2):
        place = f"{path}:{number}"
        if number < num_warm + 2:
            reading.num_left_out += 1
            continue
        if row.get("status") not in (None, "", "ok") or row.get("output_tokens") == "0":
            reading.num_left_out += 1
            continue
        cells = {name: cell_value((cell or "").strip()) for name, cell in row.items() if name}
        one = Fields(cells, place, TraceError)
        if not one.get("first_chunk_time_us"):
            raise one.bad(
                "first_chunk_time_us",
                one.get("first_chunk_time_us"),
                "the moment of the first token of a run that was observed, in microseconds",
            )
        begin = "send_time_us" if one.get("send_time_us") else "arrival_time_us"
        prompt_len = one.get("server_input_tokens") or one.get("input_tokens")
        prefix = ("", 0)
        if row.get("prefix_group") and one.get("prefix_length"):
            prefix = (str(row["prefix_group"]), one.integer("prefix_length", 0))
        lengths = Fields({"input_tokens": prompt_len}, place, TraceError)
        prompt_len = lengths.integer("input_tokens")
        if prefix[1] >= prompt_len:
            prefix = (prefix[0], prompt_len - 1)
        known.setdefault("model", row.get("model") or None)
        reading.add(
            place, _time(one, begin, 1e-6), prompt_len, one.integer("output_tokens"),
            _time(one, "first_chunk_time_us", 1e-6), _time(one, "last_chunk_time_us", 1e-6), prefix,
        )  # fmt: skip
    return reading.run("BLIS TraceV2", at_client=True, settings=settings_of(header), **known)
