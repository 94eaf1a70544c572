"""Chat templates: rendered as in training, bad messages refused, foreign programs kept in bounds."""

import time
from typing import Any

import pytest

from pagellm.engine.errors import CheckpointError, RequestError
from pagellm.engine.tokenizer import ChatTemplate, Tokenizer, TokenizerSpec
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
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **settings)


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
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content: found \['x'\], expected a string"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(CHATML, messages)


def test_a_message_that_calls_tools_needs_no_content() -> None:
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert render("{{ messages[0].tool_calls[0].id }}", calls) == "1"


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


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * [0] }}",
        "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% set x = namespace(v=7) %}{% for i in range(100) %}{% set x.v = x.v * x.v %}{% endfor %}",
    ],
)
def test_a_hostile_template_is_stopped(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template: not allowed"):
        render(source)


def test_a_template_that_was_stopped_once_is_counted_afresh_the_next_time() -> None:
    template = ChatTemplate("{% for m in messages %}{% for i in range(90000) %}{% endfor %}{% endfor %}ok")
    with pytest.raises(CheckpointError, match="loop rounds"):
        template.render(HELLO * 4)
    assert template.render(HELLO) == "ok"


def test_a_model_without_a_template_says_so() -> None:
    vocab = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}
    tokenizer = Tokenizer(TokenizerSpec(vocab, [], Pretokenizer.named("gpt2")))
    with pytest.raises(RequestError, match="this model has no chat template"):
        tokenizer.apply_chat_template(HELLO)
