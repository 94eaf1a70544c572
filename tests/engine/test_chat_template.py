"""Chat templates: rendered as in training, bad messages refused, foreign programs kept in bounds."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pagellm.engine import FinishReason
from pagellm.engine.errors import CheckpointError, RequestError
from pagellm.engine.tokenizer import ChatTemplate, Tokenizer, TokenizerSpec
from pagellm.engine.tokenizer.bpe import Bpe
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer

CHATML = """{% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, messages: Any = HELLO, **settings: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **settings)


def test_a_conversation_is_laid_out_with_blocks_trimmed() -> None:
    turn = "<|im_start|>user\nHello<|im_end|>\n"
    assert render(CHATML) == turn + "<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == turn


def test_a_template_sees_the_special_tokens_the_tools_and_further_variables() -> None:
    source = "{{ bos_token }}{{ tools | tojson }}{{ thinking }}{{ eos_token }}"
    assert render(source, tools=[{"name": "é<&>"}], thinking=True) == '<s>[{"name": "é<&>"}]True</s>'
    assert ChatTemplate("{{ bos_token is defined }}").render(HELLO) == "False"


def test_loop_controls_and_generation_blocks_work() -> None:
    skip_1_stop_at_3 = "{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}"
    assert render("{% for i in range(9) %}" + skip_1_stop_at_3 + "{{ i }}{% endfor %}") == "02"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hello"


def test_the_date_is_formatted() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(RequestError, match="the chat template refuses them: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: found 'hi', expected a non-empty list"),
        ([], r"messages: found \[\], expected a non-empty list"),
        (None, "messages: found None, expected a non-empty list"),
        ({"role": "user", "content": "hi"}, "messages: found .*, expected a non-empty list"),
        (["hi"], r"messages\[0\]: found 'hi', expected"),
        ([*HELLO, {"content": "x"}], r"messages\[1\].role: found None, expected a string"),
        ([{"role": 1, "content": "x"}], r"messages\[0\].role: found 1, expected a string"),
        ([{"role": "user"}], r"messages\[0\].content: found None, expected a string"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content: found 5, expected a string"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\]: found 'x', expected"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}],
            r"messages\[0\].content\[1\].type: found 'image_url', expected 'text'",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            r"messages\[0\].content\[0\].text: found None, expected a string",
        ),
        ([{"role": "user", "content": "x", "image": object()}], r"messages\[0\].image: found <object"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(CHATML, messages)


def test_a_message_that_calls_tools_needs_no_content() -> None:
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert render("{{ messages[0].tool_calls[0].id }}", calls) == "1"


def test_names_without_a_value_are_not_there() -> None:
    calls = [{"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": None}]}]
    assert (
        render("{{ messages[0] | tojson }}", calls) == '{"role": "assistant", "tool_calls": [{"id": null}]}'
    )


def test_text_parts_are_seen_as_parts_or_joined_by_line_ends() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    through_parts = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    assert render(through_parts, parts) == "[a][b]"
    in_a_macro = "{% macro w(c) %}{% for p in c | list %}[{{ p.text }}]{% endfor %}{% endmacro %}"
    assert render(in_a_macro + "{{ w(messages[0]['content']) }}", parts) == "[a][b]"
    assert render("{{ messages[0].content | upper }}", parts) == "A\nB"


@dataclass
class Message:
    role: str
    content: str | None
    tool_calls: tuple[str, ...] | None = None


def test_messages_may_be_objects_of_a_clients_library() -> None:
    assert (
        render("{{ messages[0] | tojson }}", [Message("user", "hi")]) == '{"role": "user", "content": "hi"}'
    )
    calls = [{"role": "assistant", "content": "", "tool_calls": [Message("x", None)]}]
    assert render("{{ messages[0].tool_calls[0].role }}", calls) == "x"


def test_a_template_sees_copies_in_jsons_types() -> None:
    messages = [
        {"role": "user", "content": "x", "many": (np.int64(1), np.float32(0.5), {"a": FinishReason.STOP})}
    ]
    assert render("{{ messages[0].many | tojson }}", messages) == '[1, 0.5, {"a": "stop"}]'
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(RequestError, match="too deep"):
        render("", [{"role": "user", "content": "x", "more": nested}])


def test_the_final_message_is_continued() -> None:
    chat = [*HELLO, {"role": "assistant", "content": " Well, "}]
    turn = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, chat, continue_final_message=True) == turn + " Well, "
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    assert render(trimming, chat, continue_final_message=True) == turn + "Well,"
    for messages, source in ((chat, "nothing"), ([{"role": "assistant", "tool_calls": [{}]}], CHATML)):
        with pytest.raises(RequestError, match="continue_final_message: found"):
            render(source, messages, continue_final_message=True)
    with pytest.raises(RequestError, match="continue_final_message: found True with add_generation_prompt"):
        render(CHATML, chat, continue_final_message=True, add_generation_prompt=True)


def test_one_of_several_templates_is_chosen_by_name_or_by_the_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "with tools", "rag": "{{ documents | length }}"})
    assert template.render(HELLO) == "plain"
    assert template.render(HELLO, tools=[{"name": "f"}]) == "with tools"
    assert template.render(HELLO, chat_template="rag", documents=[{"text": "x"}]) == "1"
    for name in ("other", 1):
        with pytest.raises(
            RequestError, match=r"chat_template: found .*, expected one of .*'default', 'rag'"
        ):
            template.render(HELLO, chat_template=name)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="chat_template: found 'default'"):
        ChatTemplate({"rag": "x"}).render(HELLO)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("f", "tools: found 'f'"),
        ([print], r"tools\[0\]: found <built-in function print>"),
        ([1], r"tools\[0\]"),
    ],
)
def test_tools_that_are_no_schemas_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(CHATML, tools=tools)


@pytest.mark.parametrize(
    "source", ["{{ messages[0].a.b }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{% include 'x' %}"]
)
def test_a_template_that_fails_on_the_messages_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="messages: the chat template fails on them"):
        render(source)


@pytest.mark.parametrize("source", ["{% for x in messages %}", "{{", "{% nonsense %}", "{{" + "(" * 5000])
def test_a_template_that_does_not_parse_is_a_checkpoint_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template: does not parse"):
        render(source)


# A text that may grow, one of a million characters, and lists that are 2^60 numbers when written out.
GROWING = (
    "{% set n = namespace(v='a' * 1000, l=[0]) %}{% for i in range(60) %}{% set n.v = EXPR %}{% endfor %}"
)
MILLION = "{% set n = namespace(v='a' * 1000000) %}"
SHARED = (
    "{% set n = namespace(l=[0], m=[0], t=(0,)) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}"
    "{% set n.m = [n.m, n.m] %}{% set n.t = (n.t, n.t) %}{% endfor %}{{ EXPR }}"
)
REPEATED = MILLION + "{% for i in range(99999) %}{% set n.x = EXPR %}{% endfor %}"


@pytest.mark.parametrize(
    "expression",
    [
        "n.v + n.v", "n.v ~ n.v", "[n.v, n.v] | join", "n.v.join([n.v, n.v])", "n.v.replace('a', 'aa')",
        "n.v | replace('a', 'aa')", "n.v.replace('', n.v)", "'%s%s' % (n.v, n.v)",
        "'%s%s' | format(n.v, n.v)", "'{0}{0}'.format(n.v)", "'{a}{a}'.format_map({'a': n.v})", "n.v * 2",
        "2 * n.v", "n.v | list + n.v | list", "n.v | map('upper') | join(n.v)", "n.v | tojson | tojson",
        "((n.v ~ '\\n') * 9) | indent(1000)", "(n.v | safe) + '<' * 100000",
        "('%s%s' | safe) % (n.v, n.v)", "('{0}{0}' | safe).format(n.v)",
        "(n.v | list, n.v | list) | sum(start=[])", "([n.v] * 100000) | join",
        "dict.fromkeys(range(99999), n.v) | string",
    ],
)  # fmt: skip
def test_a_template_cannot_make_anything_grow_without_end(expression: str) -> None:
    with pytest.raises(CheckpointError, match="chat template: not allowed"):
        render(GROWING.replace("EXPR", expression))


@pytest.mark.parametrize(
    "expression",
    [
        "n.l", "n.l | string", "n.l == n.m", "n.l in [n.m]", "n.l | tojson", "n.l ~ ''", "'%s' % (n.l,)",
        "'{}'.format(n.l)", "[n.l] | join", "n.l | pprint", "n.l | lower", "[n.l, n.m] | sort",
        "n.l is eq n.m", "[n.l].index(n.m)", "{'a': n.l}.items()", "n.l | map('string') | list",
        "raise_exception(n.l)", "{n.t: 1}", "{}[n.t]", "{}.get(n.t)", "n.t in {}", "[n.t] | unique | list",
        "dict([(n.t, 1)])",
    ],
)  # fmt: skip
def test_a_template_cannot_write_out_or_compare_what_is_shared_exponentially(expression: str) -> None:
    with pytest.raises(CheckpointError, match="chat template: not allowed"):
        render(SHARED.replace("EXPR", expression))


@pytest.mark.parametrize(
    "expression",
    [
        "n.v[1:]", "n.v == n.v[1:]", "'b' in n.v", "n.v.count('b')", "n.v.upper()", "n.v | upper",
        "n.v | list", "n.v.split('a')", "n.v.splitlines()", "n.v | tojson", "n.v | trim", "n.v | reverse",
        "n.v is lower", "n.v.isalpha()", "(n.v, n.v) | max", "n.v | truncate(10)", "n.v > 'b'",
        "range(99999) | list", "range(99999) | sum", "range(99999) | map('string') | join",
        "range(99999).count(5.5)", "range(99999) | batch(3) | list",
    ],
)  # fmt: skip
def test_a_template_cannot_repeat_what_takes_long(expression: str) -> None:
    with pytest.raises(CheckpointError, match="chat template: not allowed"):
        render(REPEATED.replace("EXPR", expression))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ [-(10**12)] | map('_step') | list }}{{ 'a'.center(-(10**12)) }}"
        + GROWING.replace("EXPR", "n.v + n.v"),
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
        "{% set x %}{% for i in range(99999) %}" + "y" * 30000 + "{% endfor %}{% endset %}",
        MILLION + "{% set x %}{% for i in range(99999) %}{{ n.v }}{% endfor %}{% endset %}",
        MILLION + "{% for i in range(99999) %}{{ n.v }}{% endfor %}",
        MILLION + "{{ n.v.rfind('b' + n.v[:500000]) }}",
        MILLION + "{{ n.v.strip(n.v) }}",
        MILLION + "{{ n.v | int(0, 16) }}",
        "{{ 9 ** 999999999 }}",
        "{% set x = namespace(v=7) %}{% for i in range(100) %}{% set x.v = x.v * x.v %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * [0] }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ ''['ljust'](10**10) }}",
        "{{ 'a\nb' | indent(10**10) }}",
        "{{ 'a' | batch(10**10, 'x') | list }}",
        "{{ 'a' | slice(10**10) | list }}",
        "{{ 1 | round(10**9, 'ceil') }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%(a)1000000000d' % {'a': 1} }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%.1000000000f' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ ('%s' * 100000) % (('a' * 100000,) * 100000) }}",
        "{{ ('{0[a]}' * 100000).format({'a': 'b' * 100000}) }}",
        "{{ ('<!---->' * 10**6) | striptags }}",
        "{{ strftime_now('%c' * 10**6) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ 'a'.encode() }}",
        "{{ 'aaa'.translate({97: 'a' * 1000000}) }}",
    ],
)
def test_a_hostile_template_is_stopped(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template: not allowed"):
        render(source)


def test_a_template_changes_nothing_that_it_is_given() -> None:
    for source in ("{{ dict.update(messages[0], {'x': 1}) }}", "{{ dict.pop(messages[0], 'role') }}"):
        with pytest.raises(RequestError, match="fails on them: UndefinedError"):
            render(source)
    assert (
        render("{{ dict(a=1, **{'b': 2}) | tojson }}{{ dict.fromkeys('a') }}")
        == '{"a": 1, "b": 2}' + "{'a': None}"
    )


@pytest.mark.parametrize(
    "source", ["{{ 'a' | center(10**10) }}", "{{ 'a' ~ 'b' * 10**10 }}", "{{ 9**9**9**9 }}"]
)
def test_constants_are_not_computed_when_a_template_is_compiled(source: str) -> None:
    assert render("{% if false %}" + source + "{% endif %}ok") == "ok"


def test_a_template_that_was_stopped_once_has_its_whole_budget_the_next_time() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% for i in range(90000) %}{{ '.' * 12 }}{% endfor %}{% endfor %}ok"
    )
    with pytest.raises(CheckpointError, match="characters of output"):
        template.render(HELLO * 4)
    assert template.render(HELLO).endswith(".ok")


def test_what_is_refused_is_one_short_line() -> None:
    for source in ("{{ raise_exception('a\n' * 100000) }}", "{{ messages['a' * 100000] + 1 }}"):
        with pytest.raises(RequestError) as raised:
            render(source)
        assert len(str(raised.value)) < 400
        assert "\n" not in str(raised.value)


def test_a_source_or_a_conversation_beyond_all_use_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="chat template: found 100000 characters, expected at most 65536"
    ):
        render("a" * 100_000)
    with pytest.raises(RequestError, match="messages: found more than 16777216 characters in all"):
        render(CHATML, [{"role": "user", "content": "a" * (1 << 24)}])


def test_a_model_without_a_template_says_so() -> None:
    vocab = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}
    tokenizer = Tokenizer(TokenizerSpec(vocab, Bpe(vocab, []), Pretokenizer.named("gpt2")))
    with pytest.raises(RequestError, match="this model has no chat template"):
        tokenizer.apply_chat_template(HELLO)
