"""Conventions whose values stand between tags or in a notation of their own: Qwen 3.5, GLM, Muse Glimmer, Gemma 4."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from burnish.environments.conventions import Block, Convention, ToolCall, decode_json, dump_json, object_of

__all__ = ["TEXT_CONVENTIONS", "typed_value"]


@dataclass(frozen=True, slots=True)
class _Tags:
    """Patterns of a convention in which each value stands between tags, as text."""

    opening: str
    parameter: str
    value_end: str
    closing: str
    resume: str


_QWEN_XML = _Tags(
    opening=r"<tool_call>\s*(?:<function=([^>\n]*)>)?|<function=([^>\n]*)>",
    parameter=r"\s*<parameter=([^>\n]*)>\n?",
    value_end=r"\n?</parameter>(?=\s*(?:<parameter=|</function>))",
    closing=r"</function>(?:\s*</tool_call>)?",
    resume=r"</tool_call>|(?=<tool_call>|<function=)",
)
_GLM = _Tags(
    opening=r"<tool_call>\s*([\w.-]*)(?=\s|<|\Z)",
    parameter=r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>",
    value_end=r"</arg_value>(?=\s*(?:<arg_key>|</tool_call>))",
    closing=r"</tool_call>",
    resume=r"</tool_call>|(?=<tool_call>)",
)
_ATEM = _Tags(
    opening=r'(?:<atem:function_calls>\s*)?<atem:invoke name="([^"\n]*)">',
    parameter=r'\s*<atem:parameter name="([^"\n]*)">',
    value_end=r"</atem:parameter>(?=\s*(?:<atem:parameter |</atem:invoke>))",
    closing=r"</atem:invoke>(?:\s*</atem:function_calls>)?",
    resume=r"</atem:function_calls>|(?=<atem:invoke)",
)


def find_tags(tags: _Tags, text: str, start: int) -> Block | None:
    opened = re.compile(tags.opening).search(text, start)
    if opened is None:
        return None
    name = next((group for group in opened.groups() if group), "").strip()
    arguments: dict[str, Any] = {}
    at = opened.end()
    problem = None if name else "the call has no name"
    while problem is None and (parameter := re.compile(tags.parameter).match(text, at)):
        key, at = parameter[1].strip(), parameter.end()
        end = re.compile(tags.value_end).search(text, at)
        # The end tag of a later call's value ends none of this call.
        if end is None or re.compile(rf"(?:{tags.closing})\s*(?:{tags.opening})").search(text, at, end.start()):
            problem = f"the value of {key!r} has no end tag"
        elif not key or key in arguments:
            problem = f"the parameter {key!r} stands twice" if key else "a parameter has no name"
        else:
            arguments[key] = text[at : end.start()]
            at = end.end()
    if problem is None and (closed := re.compile(rf"\s*(?:{tags.closing})").match(text, at)):
        call = ToolCall(name, arguments, text[opened.start() : closed.end()])
        return Block(opened.start(), closed.end(), (call,))
    stop = re.compile(rf"{tags.resume}|\Z").search(text, at)
    assert stop is not None
    problem = problem or "the call is cut, or has text between its parameters"
    call = ToolCall(name, None, text[opened.start() : stop.end()], None, problem)
    return Block(opened.start(), stop.end(), (call,))


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else dump_json(value)


def write_qwen_xml(calls: Sequence[ToolCall]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={call.name}>\n"
        + "".join(f"<parameter={k}>\n{_value_text(v)}\n</parameter>\n" for k, v in (call.arguments or {}).items())
        + "</function>\n</tool_call>"
        for call in calls
    )


def write_glm(calls: Sequence[ToolCall]) -> str:
    return "\n".join(
        f"<tool_call>{call.name}\n"
        + "".join(
            f"<arg_key>{k}</arg_key>\n<arg_value>{_value_text(v)}</arg_value>\n"
            for k, v in (call.arguments or {}).items()
        )
        + "</tool_call>"
        for call in calls
    )


def write_atem(calls: Sequence[ToolCall]) -> str:
    parts = [
        f'<atem:invoke name="{call.name}">\n'
        + "".join(
            f'<atem:parameter name="{k}">{_value_text(v)}</atem:parameter>\n' for k, v in (call.arguments or {}).items()
        )
        + "</atem:invoke>\n"
        for call in calls
    ]
    return f"<atem:function_calls>\n{''.join(parts)}</atem:function_calls>" if calls else ""


def _admitted(schema: Mapping[str, Any]) -> set[str]:
    """Return the JSON types that a schema admits; none where it does not say."""
    kinds = schema.get("type", [])
    admitted = {kinds} if isinstance(kinds, str) else {str(kind) for kind in kinds}
    for option in schema.get("anyOf", ()):
        admitted |= _admitted(option)
    return admitted | ({"null"} if admitted and schema.get("nullable") else set())


_LITERALS: dict[str, Any] = {"True": True, "False": False, "None": None}
_JSON_TYPES: dict[type, tuple[str, ...]] = {
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
}


def typed_value(text: str, schema: Mapping[str, Any]) -> Any:
    """Read a value that was written as plain text by the types that its schema admits; `{}` admits all."""
    if text in _LITERALS:
        value = _LITERALS[text]
    else:
        value, end, problem = decode_json(stripped := text.strip())
        if problem or end < len(stripped):
            value = text
    admitted = _admitted(schema)
    kinds = _JSON_TYPES.get(type(value), ("null",))
    is_admitted = not admitted or not admitted.isdisjoint(kinds) or "string" not in admitted
    return text if isinstance(value, str) or not is_admitted else value


_QUOTE = '<|"|>'


def find_gemma(text: str, start: int) -> Block | None:
    opened = re.compile(r"<\|tool_call>\s*(?:call:\s*([\w.-]*))?\s*").search(text, start)
    if opened is None:
        return None
    name, problem = opened[1] or "", None
    arguments: Any = None
    end = opened.end()
    try:
        arguments, end = _gemma_value(text, end)
        problem = None if name and isinstance(arguments, dict) else "the call is not written as call:name{key:value}"
    except RecursionError:
        problem = "the arguments are nested too deeply"
    except ValueError as error:
        problem = f"the arguments cannot be read: {error}"
    closed = re.compile(r"\s*(?:<tool_call\|>|(?=<)|\Z)").match(text, end)
    if problem is None and closed is None:
        problem = "text follows the arguments"
    if problem is not None or closed is None:
        stop = re.compile(r"<tool_call\|>|(?=<\|tool_call>)|\Z").search(text, opened.end())
        assert stop is not None
        raw = text[opened.start() : stop.end()]
        return Block(opened.start(), stop.end(), (ToolCall(name, None, raw, None, problem),))
    return Block(opened.start(), closed.end(), (ToolCall(name, arguments, text[opened.start() : closed.end()]),))


def _gemma_value(text: str, at: int) -> tuple[Any, int]:
    """Read a value of Gemma's notation: JSON with bare keys and `<|"|>` for quotes."""
    if text.startswith(_QUOTE, at):
        end = text.find(_QUOTE, at + len(_QUOTE))
        if end < 0:
            raise ValueError("a string does not end")
        return text[at + len(_QUOTE) : end], end + len(_QUOTE)
    opening = text[at : at + 1]
    if opening not in ("{", "["):
        bare = re.compile(r"[^,\[\]{}<]*").match(text, at)
        assert bare is not None
        said = bare[0].strip()
        if said in _LITERALS:
            return _LITERALS[said], bare.end()
        value, end, problem = decode_json(said)
        if problem or end < len(said):
            raise ValueError(f"{said[:50]!r} is not a value")
        return value, bare.end()
    items: list[Any] = []
    pairs: list[tuple[str, Any]] = []
    closing = "}" if opening == "{" else "]"
    at += 1
    while not text.startswith(closing, at := _after_space(text, at)):
        if opening == "{":
            key = re.compile(rf"(?:{re.escape(_QUOTE)}(.*?){re.escape(_QUOTE)}|([^:,{{}}<]+))\s*:\s*", re.S).match(
                text, at
            )
            if key is None:
                raise ValueError("a key is missing, or the call is cut")
            value, at = _gemma_value(text, key.end())
            pairs.append((key[2].strip() if key[1] is None else key[1], value))
        else:
            value, at = _gemma_value(text, at)
            items.append(value)
        at = _after_space(text, at)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith(closing, at):
            raise ValueError(f"{closing} is missing, or the call is cut")
    return (object_of(pairs) if opening == "{" else items), at + 1


def _after_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip()) if text[at : at + 1].isspace() else at


def _gemma_text(value: Any) -> str:
    if isinstance(value, str):
        return f"{_QUOTE}{value}{_QUOTE}"
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value).items()
        return "{" + ",".join(f"{key}:{_gemma_text(inner)}" for key, inner in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma_text, cast("list[Any]", value))) + "]"
    return dump_json(value)


def write_gemma(calls: Sequence[ToolCall]) -> str:
    return "".join(f"<|tool_call>call:{call.name}{_gemma_text(call.arguments or {})}<tool_call|>" for call in calls)


TEXT_CONVENTIONS: dict[str, Convention] = {
    "qwen_xml": Convention(partial(find_tags, _QWEN_XML), write_qwen_xml, values_are_text=True),
    "gemma": Convention(find_gemma, write_gemma, (("<|channel>thought", "<channel|>"),)),
    "glm": Convention(partial(find_tags, _GLM), write_glm, values_are_text=True),
    "atem": Convention(partial(find_tags, _ATEM), write_atem, values_are_text=True),
}
"""Name -> convention."""
