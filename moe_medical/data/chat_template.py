"""A tokenizer folder's chat template as a function from messages to text.

The jinja settings are those of transformers' `apply_chat_template` (trim_blocks, lstrip_blocks, loop
controls, raise_exception, strftime_now, tojson without HTML escapes, `generation` blocks), not its import.
The sandbox is immutable: a template from a hub cannot change what it is given nor reach Python's internals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_medical.errors import ConfigError, Problem

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text."""

PLAIN_TEMPLATE = (
    "{{ leading_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)
"""For a model without a chat template: `{system}\\n{prompt}\\n{target}{eos}`, after the tokenizer's bos."""

_SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    "additional_special_tokens",
)


def read_json(file: Path) -> dict[str, Any]:
    """An optional JSON file; {} where it is not there.

    Raises:
        ConfigError: where it is there but is no JSON object.
    """
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(str(file.parent), [Problem(str(file), "must be valid JSON", str(e))]) from None
    if not isinstance(value, dict):
        raise ConfigError(str(file.parent), [Problem(str(file), "must hold an object", type(value).__name__)])
    return value


def read_special_tokens(folder: Path) -> dict[str, Any]:
    """Name -> text of the special tokens that tokenizer_config.json or special_tokens_map.json set."""
    config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    found = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name)}
    return {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}


def read_template(folder: Path) -> str | None:
    """Text of the folder's (default) chat template, or None."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def compile_template(folder: Path, template: str, variables: Mapping[str, Any]) -> Render:
    """The template as a function.

    Raises:
        ConfigError: now for a syntax error, on rendering for anything the template raises.
    """
    try:
        compiled = _environment().from_string(template)
    except jinja2.TemplateError as e:
        raise _template_error(folder, e) from None

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return compiled.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as e:  # a template may fail in any way that Python can
            raise _template_error(folder, e) from None

    return render


def _template_error(folder: Path, error: Exception) -> ConfigError:
    line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    rule = f"cannot be rendered ({type(error).__name__}: {error})"
    return ConfigError(str(folder), [Problem(f"chat template{line}", rule)])


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for other trainers; the text is kept."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
