"""The chat templates of a model's directory, and the tokens that its files name for templates to write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.checks import expect, read_text

_MAX_TEMPLATE_BYTES = 1 << 20
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_chat_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name, as `transformers` finds them; one that has no name is the "default".

    They are `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, or else the configuration's.

    Raises `CheckpointError` if one cannot be read, or the configuration has something else in its place.
    """
    templates = {}
    if (directory / "chat_template.jinja").exists():
        templates["default"] = read_text(directory / "chat_template.jinja", _MAX_TEMPLATE_BYTES)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path, _MAX_TEMPLATE_BYTES)
    if templates:
        return templates
    where = f"{directory / 'tokenizer_config.json'}: chat_template"
    named = tokenizer_config.get("chat_template")
    if named is None:
        return {}
    if not isinstance(named, list):
        return {"default": expect(named, str, where)}
    for index, entry in enumerate(named):
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(k), str) for k in ("name", "template")
        ):
            raise CheckpointError(
                f'{where}[{index}]: found {found(entry)}, expected {{"name": ..., "template": ...}}'
            )
        templates[entry["name"]] = entry["template"]
    return templates


def read_template_tokens(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The tokens that the files name by role, such as `bos_token`; of two files the later one counts.

    files: what the files hold, by their paths.

    Raises `CheckpointError` if a role has something else than a token.
    """
    tokens = {}
    for path, values in files.items():
        for role in _ROLES:
            value = values.get(role)
            content = value.get("content") if isinstance(value, dict) else value
            if content is not None:
                tokens[role] = expect(content, str, f"{path}: {role}")
    return tokens
