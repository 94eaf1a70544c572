"""Chat templates render what `transformers` renders: tests/fixtures/chat has templates and its texts."""

import json
from typing import Any

import pytest

from pagellm.engine.errors import RequestError
from pagellm.engine.tokenizer import ChatTemplate
from tests.conftest import MODELS

CHAT = MODELS.parent / "chat"
EXPECTED = json.loads((CHAT / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {
        path.stem: ChatTemplate(path.read_text(encoding="utf-8"), EXPECTED["special_tokens"])
        for path in CHAT.glob("*.jinja")
    }


@pytest.mark.parametrize(
    "case", EXPECTED["cases"], ids=lambda case: f"{case['template']}-{case['messages']}-{case['options']}"
)
def test_a_conversation_is_rendered_as_by_transformers(
    templates: dict[str, ChatTemplate], case: dict[str, Any]
) -> None:
    template, messages = templates[case["template"]], EXPECTED["messages"][case["messages"]]
    options = EXPECTED["options"][case["options"]]
    if "error" in case:
        with pytest.raises(RequestError):
            template.render(messages, **options)
    else:
        assert template.render(messages, **options) == case["text"]
