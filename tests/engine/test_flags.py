"""Flags made of dataclasses: each field once, its type and default, and only what was given comes back."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

import pytest

from pagellm.__main__ import main
from pagellm.engine import EngineConfig, SamplingParams
from pagellm.engine.commands.cli import CHAT_FLAGS, ENGINE_FLAGS, GENERATION_FLAG, SAMPLING_FLAGS, TOOL_FLAG
from pagellm.engine.commands.flags import Flag, add_flags, given
from tests.conftest import model_path

MODEL = ["--model", str(model_path("llama_tiny")), "--num-blocks", "16"]


@dataclass(frozen=True)
class Settings:
    size: int = 3
    share: float | None = None
    name: str = "x"
    words: str | Sequence[str] = ()
    numbers: Sequence[int] = ()
    is_quiet: bool = False
    enable_noise: bool = True


FLAGS = {field.name: Flag(f"the {field.name}") for field in fields(Settings)}


def parse(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings, FLAGS)
    return given(parser.parse_args(arguments), Settings)


def test_what_was_not_given_leaves_nothing_behind() -> None:
    assert parse() == {}


def test_each_type_has_its_form() -> None:
    arguments = ["--size", "4", "--share", "0.5", "--name", "y", "--words", "a", "--words", "b", "--numbers"]
    assert parse(*arguments, "7", "--is-quiet", "--no-noise") == {
        "size": 4, "share": 0.5, "name": "y", "words": ["a", "b"], "numbers": [7], "is_quiet": True,
        "enable_noise": False,
    }  # fmt: skip


def test_the_defaults_of_a_command_are_in_its_help() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings, FLAGS, {"size": 9})
    text = parser.format_help()
    assert "the size (default: 9)" in text
    assert "the name (default: x)" in text
    assert "the share\n" in text


def test_every_setting_of_the_engine_has_a_flag() -> None:
    flags = ENGINE_FLAGS | GENERATION_FLAG | CHAT_FLAGS | TOOL_FLAG
    # An engine takes its model's own window alone; the simulator's flag sets another.
    assert flags.keys() == {field.name for field in fields(EngineConfig)} - {"window"}


def test_every_sampling_parameter_has_a_flag_unless_it_is_of_one_user_or_prompt() -> None:
    others = {"logit_bias", "prompt_logprobs", "cache_salt", "priority", "tenant", "deadline_s", "structured"}
    assert SAMPLING_FLAGS.keys() | others == {field.name for field in fields(SamplingParams)}
    assert not SAMPLING_FLAGS.keys() & others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "0"], "block_size: found 0, expected a positive integer (--block-size)"),
        (["--policy", "lottery"], "or path/file.py:Class (--policy)"),
        (["--preemption", "swap", "--swap-blocks", "0"], "expected at least 1 (--swap-blocks)"),
        (["--top-p", "2"], "(--top-p)"),
        (["--model", "nowhere"], "hub id (org/name)"),
        (["--logprobs", "1"], "--logprobs: found 1, expected --json with it"),
    ],
)
def test_an_error_names_the_flag_of_its_field(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a", *MODEL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("(--") == message.count("(--")
