"""What a model's chat template says about its thoughts: their markers, and the names that switch them.

Templates name neither in a common way. So markers in use are looked for in the template's text; where there
are none of these, a conversation with a thought in it is rendered, and what stands around that is taken. How
a thought is closed is read off the same rendering. Each of the 70 templates that llama.cpp is tested with is
a case of this; `tests/engine/test_thinking.py` has eighteen of them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pagellm.engine.errors import PagellmError, RequestError, found
from pagellm.engine.requests.reasoning import Markers
from pagellm.engine.tokenizer.chat_template import ChatTemplate

# Those whose both markers stand in the template, in order: what is more special comes first.
_PAIRS = (
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    Markers("[THINK]", "[/THINK]"),  # Mistral
    Markers("<|channel>thought", "<channel|>"),  # Gemma 4
    Markers("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Markers("◁think▷", "◁/think▷"),  # Kimi-VL
    Markers("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
    # gpt-oss and Solar Open: the end of a message, and the header of the one with the answer.
    Markers("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    Markers("<|think|>", "<|end|><|begin|>assistant<|content|>"),
)
_PARTS_OF_PAIRS = {  # where a template puts a marker together
    "<|end|><|start|>assistant<|channel|>final<|message|>": "final<|message|>",
    "<|end|><|begin|>assistant<|content|>": "assistant<|content|>",
}
# Those whose end marker alone tells: a template that only takes thoughts out of past turns has no other.
_TAGS = tuple(
    Markers(f"<{name}>", f"</{name}>") for name in ("seed:think", "mm:think", "think", "thought", "thinking")
)
_ANSWER_TAGS = Markers("<response>", "</response>")  # of Granite, whose template asks for them by name
# What switches thoughts on and off in the templates in use, and with which values.
_SWITCHES: Mapping[str, tuple[Any, Any]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning": (True, False),
    "thinking_mode": ("enabled", "disabled"),
    "thinking_option": ("on", "off"),
    "thinking_budget": (-1, 0),
}
_EFFORTS = ("reasoning_effort", "thinking_effort", "reasoning_strength")
THINKING_VARIABLES = (*_SWITCHES, *_EFFORTS)
_NO_EFFORT = ("no_think", "none")  # efforts that are no thought at all
_QUESTION, _THOUGHT, _ANSWER = "Q1question1Q", "Q2thought2Q", "Q3answer3Q"  # words that no template has
_MENTIONS = re.compile("think|reason|thought", re.IGNORECASE)


class ThoughtFormat(NamedTuple):
    """How a model writes a thought down.

    before_end, after_end: whitespace around the end marker. answer_tags: what may stand around an answer.
    """

    markers: Markers
    before_end: str
    after_end: str
    answer_tags: Markers | None = None

    def closing(self, begun_marker: str = "", ends_with: str = "") -> str:
        """What closes a thought whose text ends with the beginning of a marker, or with such whitespace."""
        before = "" if self.before_end and ends_with.endswith(self.before_end) else self.before_end
        rest = self.markers.end.removeprefix(begun_marker) if begun_marker else before + self.markers.end
        return rest + self.after_end


def markers_of_template(template: ChatTemplate) -> Markers | None:
    """The markers that a model with this template uses, as far as that says it."""
    sources = "\0".join(template.sources.values())
    for markers in _PAIRS:
        if markers.start in sources and _PARTS_OF_PAIRS.get(markers.end, markers.end) in sources:
            return markers
    for markers in _TAGS:
        if markers.end in sources:
            return markers
    return _rendered_markers(template) if _MENTIONS.search(sources) else None


def markers_of_tokens(added_tokens: Iterable[str]) -> Markers | None:
    """The markers that are among a model's added tokens."""
    tokens = set(added_tokens)
    return next((markers for markers in (*_PAIRS, *_TAGS) if tokens.issuperset(markers)), None)


def thought_format(markers: Markers, template: ChatTemplate | None) -> ThoughtFormat:
    """How thoughts with these markers are written, with the whitespace of a model's own template."""
    form = _thought_format(markers, template)
    sources = "" if template is None else "\0".join(template.sources.values())
    return form._replace(answer_tags=_ANSWER_TAGS) if "".join(_ANSWER_TAGS) in sources else form


def _thought_format(markers: Markers, template: ChatTemplate | None) -> ThoughtFormat:
    is_tag = markers.end == "</think>"
    usual = ThoughtFormat(markers, "\n" * is_tag, "\n\n" * is_tag)  # of DeepSeek R1 and Qwen3
    if template is None:
        return usual
    rendered = _rendered_thought(template)
    if rendered is not None:
        before, is_there, after = rendered[1].partition(markers.end)
        if is_there:
            return ThoughtFormat(markers, _if_space(before), _if_space(after))
    opened = _generation_prompt(template, is_on=True)
    if markers.start and opened.endswith(f"{markers.start}\n"):
        return ThoughtFormat(markers, "\n", "\n\n")
    # Where thinking is off, the prompt has an empty thought.
    _, is_there, empty = _generation_prompt(template, is_on=False).rpartition(markers.start or "\0")
    inside, is_closed, after = empty.partition(markers.end)
    if is_there and is_closed and not inside.strip():
        return ThoughtFormat(markers, "\n" * ("\n" in inside), _if_space(after))
    return usual


def opens_thoughts(template: ChatTemplate, markers: Markers) -> bool:
    """Whether the template opens a thought itself where one is wanted, so that the model need not."""
    return _generation_prompt(template, is_on=True).rstrip().endswith(markers.start)


def switch_variables(template: ChatTemplate, name: str | None, is_on: bool) -> dict[str, Any]:
    """The variables that switch thoughts on or off in a template.

    name: of the template, as in `ChatTemplate.render`. Raises `RequestError` where it has no such switch.
    """
    read = template.template(name, None).variables()
    variables: dict[str, Any] = {
        name: values[0 if is_on else 1] for name, values in _SWITCHES.items() if name in read
    }
    if not variables and "reasoning_effort" in read:
        literals = template.template(name, None).literals.split("\0")
        none = [effort for effort in _NO_EFFORT if effort in literals]
        if none:
            variables = {"reasoning_effort": "high" if is_on else none[0]}
    if not variables and not (is_on and markers_of_template(template)):
        raise RequestError(
            f"thinking: found {'on' if is_on else 'off'}, expected none: this model's chat template has no "
            "switch for it"
        )
    return variables


def effort_variables(template: ChatTemplate, name: str | None, effort: str) -> dict[str, Any]:
    """The variable that says how much to think. Raises `RequestError` where a template has none."""
    read = template.template(name, None).variables()
    variables = {variable: effort for variable in _EFFORTS if variable in read}
    if not variables:
        raise RequestError(
            f"reasoning_effort: found {found(effort)}, expected none: this model's chat template does not ask"
        )
    return variables


def _rendered_thought(template: ChatTemplate) -> tuple[str, str] | None:
    """What a template writes before a thought, behind the question, and between it and the answer."""
    messages = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT},
    ]
    text = _render(template, messages, is_on=True, add_generation_prompt=False)
    before, is_there, rest = text.rpartition(_QUESTION)[2].partition(_THOUGHT)
    between, is_answered, _ = rest.partition(_ANSWER)
    return (before, between) if is_there and is_answered else None


def _generation_prompt(template: ChatTemplate, is_on: bool | None = None) -> str:
    """What a template writes behind a question, thoughts on, off, or as they are unless said."""
    text = _render(template, [{"role": "user", "content": _QUESTION}], is_on=is_on)
    return text.rpartition(_QUESTION)[2]


def _render(
    template: ChatTemplate, messages: list[dict[str, str]], is_on: bool | None, **options: Any
) -> str:
    """The conversation, or "" if the template does not take it."""
    variables: dict[str, Any] = {}
    if is_on is not None:
        variables = {name: values[0 if is_on else 1] for name, values in _SWITCHES.items()}
    try:
        return template.render(messages, **variables, **options)
    except PagellmError:
        return ""


def _rendered_markers(template: ChatTemplate) -> Markers | None:
    rendered = _rendered_thought(template)
    if rendered is None or not rendered[1].strip():
        return None
    before, end = rendered[0], rendered[1].strip()
    tag = f"<{end[2:]}"
    if end.startswith("</") and tag in before:
        return Markers(tag, end)
    # The rest of it is the header of the answer, which prompts end with.
    headers = {_generation_prompt(template, is_on) for is_on in (None, True, False)}
    shared = (_num_shared(before, header) for header in headers)
    size = max((size for size in shared if size < len(before)), default=0)
    return Markers(before[size:].strip(), end)


def _num_shared(first: str, second: str) -> int:
    """How many characters two texts begin with that are the same."""
    size = min(len(first), len(second))
    return next((at for at in range(size) if first[at] != second[at]), size)


def _if_space(text: str) -> str:
    return text if text.isspace() else ""
