"""What chat templates say about thoughts, read off templates as they were published."""

from pathlib import Path
from typing import Any

import pytest

from pagellm.engine.errors import RequestError
from pagellm.engine.requests.reasoning import Markers
from pagellm.engine.tokenizer import ChatTemplate
from pagellm.engine.tokenizer.thinking import (
    effort_variables,
    markers_of_template,
    markers_of_tokens,
    switch_variables,
    thought_format,
)

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "chat" / "published"
THINK = Markers("<think>", "</think>")
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
# Of each template: the markers, whitespace before and behind the end marker, what switches thoughts on and
# off, and what says how much. None: there is no such thing.
TEMPLATES: dict[str, tuple[Markers | None, str, str, Any, Any, str | None]] = {
    "Qwen-Qwen3-0.6B": (THINK, "\n", "\n\n", {"enable_thinking": True}, {"enable_thinking": False}, None),
    "Qwen3.5-4B": (THINK, "\n", "\n\n", {"enable_thinking": True}, {"enable_thinking": False}, None),
    "HuggingFaceTB-SmolLM3-3B": (
        THINK, "\n", "\n", {"enable_thinking": True}, {"enable_thinking": False}, None,
    ),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (THINK, "\n", "\n\n", {}, None, None),
    "deepseek-ai-DeepSeek-V3.1": (
        THINK, "", "", {"enable_thinking": True, "thinking": True},
        {"enable_thinking": False, "thinking": False}, None,
    ),
    "GLM-4.6": (THINK, "", "\n", {"enable_thinking": True}, {"enable_thinking": False}, None),
    "GLM-4.7-Flash": (THINK, "", "", {"enable_thinking": True}, {"enable_thinking": False}, None),
    "ByteDance-Seed-OSS": (
        Markers("<seed:think>", "</seed:think>"), "", "\n", {"thinking_budget": -1}, {"thinking_budget": 0},
        None,
    ),
    "mistralai-Ministral-3-14B-Reasoning-2512": (Markers("[THINK]", "[/THINK]"), "", "", {}, None, None),
    "ibm-granite-granite-3.3-2B-Instruct": (
        THINK, "\n", "\n\n", {"thinking": True}, {"thinking": False}, None,
    ),
    "inclusionai-ling-3.0-flash": (
        THINK, "", "", {"enable_thinking": True, "thinking_option": "on"},
        {"enable_thinking": False, "thinking_option": "off"}, None,
    ),
    "MiniMax-M2": (THINK, "\n", "\n\n", {}, None, None),
    "StepFun3.5-Flash": (THINK, "\n", "\n", {}, None, None),
    "openai-gpt-oss-120b": (
        Markers("<|channel|>analysis<|message|>", FINAL), "", "", {}, None, "reasoning_effort",
    ),
    "Apertus-8B-Instruct": (
        Markers("<|inner_prefix|>", "<|inner_suffix|>"), "", "", {"enable_thinking": True},
        {"enable_thinking": False}, None,
    ),
    "llama-cpp-rwkv-world": (THINK, "\n", "", {"enable_thinking": True}, {"enable_thinking": False}, None),
    "ibm-granite-granite-4.0": (None, "", "", None, None, None),
    "Qwen-Qwen2.5-7B-Instruct": (None, "", "", None, None, None),
}  # fmt: skip


def template_of(name: str) -> ChatTemplate:
    source = (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


def asked(template: ChatTemplate, is_on: bool) -> dict[str, Any] | None:
    try:
        return switch_variables(template, None, is_on)
    except RequestError:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_published_template_says_how_thoughts_are_written_and_switched(name: str) -> None:
    markers, before, after, on, off, effort = TEMPLATES[name]
    template = template_of(name)
    assert markers_of_template(template) == markers
    if markers is not None:
        tags = Markers("<response>", "</response>") if "granite-3.3" in name else None
        assert thought_format(markers, template) == (markers, before, after, tags)
    assert asked(template, True) == on
    assert asked(template, False) == off
    if effort is None:
        with pytest.raises(RequestError, match="reasoning_effort: found 'low'"):
            effort_variables(template, None, "low")
    else:
        assert effort_variables(template, None, "low") == {effort: "low"}


def test_every_published_template_is_looked_at() -> None:
    assert {path.stem for path in PUBLISHED.glob("*.jinja")} == TEMPLATES.keys()


TURN = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
ANSWERS = "{{ m.content }}{% endif %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
TO_ANSWER = "{% if add_generation_prompt %}[assistant]"


@pytest.mark.parametrize(
    ("source", "markers"),
    [
        (
            TURN + "{{ '<' ~ 'think:x>' ~ m.reasoning_content ~ '</' ~ 'think:x>' }}" + ANSWERS,
            Markers("<think:x>", "</think:x>"),
        ),
        (
            TURN + " to=self: {{ m.reasoning }}[end][assistant] to=user: " + ANSWERS
            + TO_ANSWER + "{% endif %}",
            Markers("to=self:", "[end][assistant] to=user:"),
        ),
        (
            TURN + "[open]thought.{{ m.thinking }}[close]" + ANSWERS
            + TO_ANSWER + "[open]{{ 'thought.' if thinking != false else 'answer.' }}{% endif %}",
            Markers("thought.", "[close]"),
        ),
        ("{# reasoning #}" + TURN + ANSWERS, None),
    ],
)  # fmt: skip
def test_markers_that_nobody_knows_are_found_where_a_thought_is_written(
    source: str, markers: Markers | None
) -> None:
    assert markers_of_template(ChatTemplate(source)) == markers


def test_markers_may_be_known_from_the_tokens_alone() -> None:
    assert markers_of_tokens(["<|im_end|>", "<think>", "</think>"]) == THINK
    assert markers_of_tokens(["[/THINK]", "[THINK]"]) == Markers("[THINK]", "[/THINK]")
    assert markers_of_tokens(["<|im_end|>", "<think>"]) is None


def test_an_effort_may_be_the_only_switch() -> None:
    template = ChatTemplate("{% if reasoning_effort == 'no_think' %}<think></think>{% endif %}")
    assert switch_variables(template, None, False) == {"reasoning_effort": "no_think"}
    assert switch_variables(template, None, True) == {"reasoning_effort": "high"}


def test_a_thought_is_closed_from_where_it_stands() -> None:
    form = thought_format(THINK, template_of("Qwen-Qwen3-0.6B"))
    assert form.closing() == "\n</think>\n\n"
    assert form.closing(ends_with="\n") == "</think>\n\n"
    assert form.closing(begun_marker="</th") == "ink>\n\n"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen-Qwen3-0.6B", "<think>\nhm\n</think>\n\nhi"),
        ("GLM-4.6", "<think>hm</think>\nhi"),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "[THINK]hm[/THINK]hi"),
        ("openai-gpt-oss-120b", f"<|channel|>analysis<|message|>hm{FINAL}hi"),
    ],
)
def test_a_template_finds_a_past_thought_where_it_looks(field: str, name: str, expected: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hi", field: "hm"}]
    assert expected in template_of(name).render(messages, add_generation_prompt=False)
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hi"}]
    messages[1] = {"role": "assistant", "content": parts}  # type: ignore[dict-item]
    assert expected in template_of(name).render(messages, add_generation_prompt=False)
