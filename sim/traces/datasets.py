"""The formats of workloads and data sets whose requests stand for themselves.

Sources: Vidur (arrived_at, num_prefill_tokens, num_decode_tokens), ServeGen (its CSV files, and
data/offline/README.md), OpenAI's batch API, inference-perf (per_request_lifecycle_metrics.json), vLLM's
custom data set. What has no times comes one a second, in the file's order; a batch is there at once.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pagellm.sim.traces.parsing import Fields, Parse, integer, lengths, model_of, pieces, section, text_of
from pagellm.sim.traces.prompt_tokens import Encoder
from pagellm.sim.traces.request import MAX_HASH_ID, bad_value, check_integer, check_number, check_text

_SERVEGEN_BLOCK_SIZE = 16
_MEDIA = ("image_tokens", "audio_tokens", "video_tokens")


def vidur(_: Encoder | None) -> Parse:
    """Rows of a CSV file; without arrived_at they are only lengths."""
    number = 0

    def parse(row: Mapping[str, Any]) -> Iterator[Fields]:
        nonlocal number
        whole = {name: _whole(row, name) for name in ("num_prefill_tokens", "num_decode_tokens")}
        time = check_number("arrived_at", row["arrived_at"]) if "arrived_at" in row else number
        number += 1
        yield {"arrival_time": time, **lengths(whole, "num_prefill_tokens", "num_decode_tokens")}

    return parse


def _whole(row: Mapping[str, Any], name: str) -> Any:
    """A count, which a data frame may have written as 12.0."""
    value = row.get(name)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def servegen(_: Encoder | None) -> Parse:
    """Rows of a workload that was made, in seconds; or requests of a batch task, which are there at once."""
    number = 0

    def parse(row: Mapping[str, Any]) -> Iterator[Fields]:
        nonlocal number
        number += 1
        data = row.get("data", row)
        if not isinstance(data, Mapping):
            raise bad_value("data", data, "an object")
        if "timestamp" in row:
            output_len = check_integer("output_tokens", _whole(data, "output_tokens"), 0)
            prompt = "input_tokens" if "input_tokens" in data else "text_tokens"
            prompt_len = check_integer(prompt, _whole(data, prompt), min(output_len, 1))
            prompt_len += sum(_media_tokens(data, name) for name in _MEDIA)
            time = check_number("timestamp", row["timestamp"])
            yield {"arrival_time": time, "prompt_len": prompt_len, "output_len": output_len}
            return
        output = row.get("output_length")
        fields: Fields = {
            "arrival_time": 0,
            "output_len": None if output is None else check_integer("output_length", output, 0),
        }
        if row.get("type") is not None:
            fields["class_"] = check_text("type", row["type"])
        length = integer(row, "input_length", 1)
        if row.get("hash_ids") is None:
            yield fields | {"prompt_len": length}
        else:
            yield fields | pieces(row["hash_ids"], length, _SERVEGEN_BLOCK_SIZE, MAX_HASH_ID - number)

    return parse


def _media_tokens(data: Mapping[str, Any], name: str) -> int:
    values = data.get(name) or []
    values = values if isinstance(values, list) else [values]
    return sum(check_integer(name, value, 0) for value in values)


def openai_batch(_: Encoder | None) -> Parse:
    """Requests as they are sent to the API: chats, completions or responses."""

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        body = record.get("body")
        if not isinstance(body, Mapping):
            raise bad_value("body", body, "an object")
        names = ("max_completion_tokens", "max_output_tokens", "max_tokens")
        name = next((name for name in names if body.get(name) is not None), None)
        fields: Fields = {
            "arrival_time": 0,
            "output_len": None if name is None else check_integer(f"body.{name}", body[name], 0),
            "id": check_text("custom_id", record.get("custom_id")),
            **model_of(body),
        }
        if "messages" in body:
            yield fields | {"prompt": text_of(body["messages"], "body.messages")}
            return
        prompt = body.get("prompt", body.get("input"))
        if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            yield fields | {"prompt_token_ids": prompt}
        elif isinstance(prompt, list) and "input" in body:
            yield fields | {"prompt": text_of(prompt, "body.input")}
        else:
            yield fields | {"prompt": check_text("body.prompt", prompt)}

    return parse


def vllm_custom(_: Encoder | None) -> Parse:
    """A prompt a line, and how much is answered where output_tokens says so."""
    number = 0

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        nonlocal number
        output = record.get("output_tokens")
        yield {
            "arrival_time": number,
            "output_len": None if output is None else check_integer("output_tokens", output, 0),
            "prompt": check_text("prompt", record.get("prompt")),
        }
        number += 1

    return parse


def inference_perf(_: Encoder | None) -> Parse:
    """The requests of a run as its report has them; those that failed have nothing to generate."""

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        info = record.get("info")
        if not isinstance(info, Mapping):
            raise bad_value("info", info, "an object with the lengths of a request")
        request, response = (section(info, name) for name in ("request_metrics", "response_metrics"))
        text = section(request, "text") or request
        output = response.get("output_tokens", info.get("output_tokens"))
        prompt = text.get("input_tokens", info.get("input_tokens"))
        failed = record.get("error") is not None
        fields: Fields = {
            "arrival_time": check_number("start_time", record.get("start_time")),
            "prompt_len": check_integer("input_tokens", prompt, 1),
            "output_len": 0 if failed else check_integer("output_tokens", output, 0),
        }
        if record.get("session_id") is not None:
            fields["session"] = str(record["session_id"])
        yield fields

    return parse
