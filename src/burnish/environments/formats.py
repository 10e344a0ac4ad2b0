"""Formats of tool calls, and the choice of the one that a chat template renders."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from burnish.data.chat import attempt, render_chat
from burnish.data.formats import Message
from burnish.data.tokens import inner_tokenizer
from burnish.environments.conventions import Block, Convention, ToolCall, call_from_object, dump_json
from burnish.environments.json_calls import JSON_CONVENTIONS
from burnish.environments.text_calls import TEXT_CONVENTIONS, typed_value
from burnish.errors import ConfigError

__all__ = ["TOOL_FORMATS", "ToolCall", "ToolFormat", "describes_tools", "system_text", "tool_format"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A convention in which models write tool calls.

    Attributes:
        name: key of `TOOL_FORMATS`, or "tokenizer" for the tokenizer's own `parse_response`.
        convention: how calls are found and written.
        in_template: True if the chat template renders `tool_calls` of messages in this format; False if it ignores
            them, so that calls must stay in the content.
        encodes_arguments: True if the template takes the arguments of a call as JSON text instead of an object.
    """

    name: str
    convention: Convention = field(repr=False)
    in_template: bool = True
    encodes_arguments: bool = False

    def parse(self, text: str, schemas: Sequence[Mapping[str, Any]] | None = None) -> list[ToolCall]:
        """Read the calls in what the assistant wrote; malformed ones carry a `problem`, and none is dropped.

        Args:
            text: completion, decoded with its special tokens, which some conventions consist of.
            schemas: the tools' schemas, by which conventions that write values as plain text tell "42" from 42.
        """
        calls = [call for block in self._blocks(text) for call in block.calls]
        if not self.convention.values_are_text:
            return calls
        functions = [schema.get("function", schema) for schema in schemas or ()]
        known = {str(f["name"]): f.get("parameters", {}).get("properties", {}) for f in functions}
        return [
            call
            if call.arguments is None
            else replace(
                call,
                arguments={
                    key: typed_value(value, known.get(call.name, {}).get(key, {}))
                    for key, value in call.arguments.items()
                },
            )
            for call in calls
        ]

    def strip(self, text: str) -> str:
        """Return the text without its calls: reasoning and content."""
        if self.convention.content is not None:
            return self.convention.content(text)
        start = 0
        kept: list[str] = []
        for block in self._blocks(text):
            kept.append(text[start : block.start])
            start = block.end
        return "".join([*kept, text[start:]]).strip() if kept else text

    def render(self, calls: Sequence[ToolCall]) -> str:
        """Write calls as a model would."""
        return self.convention.write(calls)

    def message(self, text: str, schemas: Sequence[Mapping[str, Any]] | None = None) -> Message:
        """Return the assistant's message for a completion, as the chat template takes it.

        Malformed calls stay in the content, since no template renders them.
        """
        calls = self.parse(text, schemas) if self.in_template else []
        if not calls or any(call.problem is not None for call in calls):
            return {"role": "assistant", "content": text}
        rendered = [_template_call(call, encode=self.encodes_arguments) for call in calls]
        return {"role": "assistant", "content": self.strip(text), "tool_calls": rendered}

    def _blocks(self, text: str) -> Generator[Block]:
        """Yield the blocks of calls outside reasoning."""
        find, tags = self.convention.find, self.convention.reasoning
        start = self._prefilled(text)
        while (block := find(text, start)) is not None:
            opened = [(at, closing) for opening, closing in tags if (at := text.find(opening, start, block.start)) >= 0]
            if not opened:
                yield block
                start = block.end
                continue
            at, closing = min(opened)
            if (end := text.find(closing, at)) < 0:
                return
            start = end + len(closing)

    def _prefilled(self, text: str) -> int:
        """Return the end of reasoning that the generation prompt opened: a closing tag without an opening one."""
        for opening, closing in self.convention.reasoning:
            end = text.find(closing)
            if end < 0 or 0 <= text.find(opening) < end:
                continue
            start = 0
            while (block := self.convention.find(text, start)) is not None and block.start < end:
                if end < block.end and all(call.problem is None for call in block.calls):
                    break  # the tag is part of an argument
                start = block.end
            else:
                return end + len(closing)
        return 0


_ORDER = ("hermes", "qwen_xml", "mistral", "deepseek", "gemma", "gptoss", "glm", "lfm2", "atem", "llama")
# Bare JSON is last: what reads it also reads JSON between tags.
TOOL_FORMATS: dict[str, ToolFormat] = {
    name: ToolFormat(name, (JSON_CONVENTIONS | TEXT_CONVENTIONS)[name]) for name in _ORDER
}
"""Name -> format, in the order in which they are tried on a chat template."""

_PROBE_ARGUMENTS: dict[str, Any] = {
    "text": "Zürich 東京 🙂 \"double\" 'single' <b>&amp; \\n {x}\nsecond line",
    "digits": "042",
    "count": 3,
    "ratio": -0.5,
    "flag": True,
    "nothing": None,
    "items": [1, "two", False],
    "deep": {"list": [{"inner": "it's"}, 2.5], "empty": {}},
}
_PROBE_TYPES = ("string", "string", "integer", "number", "boolean", "null", "array", "object")
_PROBE = ToolCall("probe_tool", _PROBE_ARGUMENTS, id="a1B2c3D4e")  # Mistral's templates want 9 characters
_PROBE_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _PROBE.name,
        "description": "Probe the template.",
        "parameters": {
            "type": "object",
            "properties": {
                key: {"type": kind, "description": f"Value of {key}."}
                for key, kind in zip(_PROBE_ARGUMENTS, _PROBE_TYPES, strict=True)
            },
            "required": list(_PROBE_ARGUMENTS),
        },
    },
}


def _template_call(call: ToolCall, *, encode: bool) -> dict[str, Any]:
    arguments = call.arguments or {}
    function = {"name": call.name, "arguments": dump_json(arguments) if encode else arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def tool_format(tokenizer: Any, template: str, choice: str | None = None) -> ToolFormat:
    """Choose the format in which a chat template renders tool calls.

    A call with nested arguments, quotes, newlines and characters of other scripts is rendered; the format that reads
    back exactly what was rendered is the one. A template that renders no calls leaves them to the content: hermes.

    Args:
        tokenizer: tokenizer or processor.
        template: resolved Jinja source.
        choice: key of `TOOL_FORMATS`; None to find it by the round trip.

    Raises:
        ConfigError: an unknown choice, or a template whose calls no format reads.
    """
    names = ", ".join(TOOL_FORMATS)
    if choice is not None and choice not in TOOL_FORMATS:
        raise ConfigError(f"tool_format = {choice!r}: use one of {names}, or None to find it from the chat template.")
    formats = dict(TOOL_FORMATS)
    if getattr(inner_tokenizer(tokenizer), "response_template", None) is not None:
        formats["tokenizer"] = ToolFormat("tokenizer", _own_convention(inner_tokenizer(tokenizer)))
    unread = ""
    for encode in (False, True):
        written = _rendered_probe(tokenizer, template, encode=encode)
        if _PROBE.name not in written:
            continue
        for found in formats.values():
            calls = found.parse(written, [_PROBE_SCHEMA])
            if [(call.name, call.arguments) for call in calls] == [(_PROBE.name, _PROBE.arguments)]:
                if choice not in (None, found.name):
                    logger.warning(
                        "tool_format = %r, but the chat template renders calls as %r: past turns will not look as the "
                        "model wrote them.",
                        choice,
                        found.name,
                    )
                    return replace(TOOL_FORMATS[choice], in_template=False)
                return replace(found, encodes_arguments=encode)
        unread = unread or written
    if choice is not None:
        return replace(TOOL_FORMATS[choice], in_template=False)
    if not unread:
        logger.warning("the chat template renders no tool calls: they are read from the content, in hermes format.")
        return replace(TOOL_FORMATS["hermes"], in_template=False)
    raise ConfigError(
        f"tool_format = None: the chat template renders tool calls as {unread[:300]!r}, which no format reads back "
        f"exactly. Set tool_format to one of {names} to have the model write that one, or change the chat template."
    )


def _rendered_probe(tokenizer: Any, template: str, *, encode: bool) -> str:
    """Render the probe's call as the model would write it; "" where the template rejects it."""
    render = partial(render_chat, tokenizer, template=template)
    call = _template_call(_PROBE, encode=encode)
    for content in ("", [{"type": "text", "text": "Go."}]):
        user = {"role": "user", "content": content or "Go."}
        turn = {"role": "assistant", "content": content, "tool_calls": [call]}

        if (full := attempt(render, [user, turn])) is None:
            continue
        for prompt in (attempt(render, [user], add_generation_prompt=True), attempt(render, [user])):
            if prompt is not None and full.startswith(prompt):
                return full[len(prompt) :]
        return full
    return ""


def _own_convention(tokenizer: Any) -> Convention:
    """Read calls with the tokenizer's `parse_response`, which does not say where they stand."""

    def read(text: str) -> tuple[Message, str | None]:
        try:
            return dict(tokenizer.parse_response(text, prefix="")), None
        except Exception as error:  # its parsers raise what the template's author did not expect
            return {}, f"the call cannot be read: {type(error).__name__}: {error}"[:300]

    def find(text: str, start: int) -> Block | None:
        if start:
            return None
        message, problem = read(text)
        calls = [call_from_object(call, text) for call in message.get("tool_calls") or ()]
        if problem is not None:
            calls = [ToolCall("", None, text, None, problem)]
        return Block(0, len(text), tuple(calls)) if calls and text else None

    def write(calls: Sequence[ToolCall]) -> str:
        raise ConfigError(
            "tool_format: the tokenizer's own format can only be read; render messages with the template."
        )

    return Convention(find, write, (), content=lambda text: str(read(text)[0].get("content") or ""))


def describes_tools(tokenizer: Any, template: str, schemas: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if a chat template renders the names and parameters of the tools that it is given."""
    tools = [dict(schema) for schema in schemas]
    texts: list[str] = []
    for given in (None, tools):
        render = partial(render_chat, tokenizer, template=template, tools=given)
        contents = ("Go.", [{"type": "text", "text": "Go."}])
        found = [attempt(render, [{"role": "user", "content": content}]) for content in contents]
        texts.append(next((text for text in found if text is not None), ""))
    functions = [schema.get("function", schema) for schema in schemas]
    words = {str(name) for f in functions for name in (f["name"], *f.get("parameters", {}).get("properties", {}))}
    return bool(words) and all(texts[1].count(word) > texts[0].count(word) for word in words)


def system_text(schemas: Sequence[Mapping[str, Any]]) -> str:
    """Describe tools, and the hermes format of calls, for templates that do not."""
    lines = "\n".join(dump_json(schema.get("function", schema)) for schema in schemas)
    return (
        "You can call these tools, one JSON schema a line:\n"
        f"{lines}\n"
        "To call one, write its name and arguments as JSON between tags, and end your turn:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}\n</tool_call>\n'
        "For several calls, write several such blocks. The results follow in the next turn."
    )
