"""Conventions with values between tags or in a notation of their own: Qwen 3.5, GLM, Muse Glimmer, Gemma 4, LFM2."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
        # A call inside a value shows that the value was cut: its end tag is that of a later one.
        if end is None or re.compile(tags.opening).search(text, at, end.start()):
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


def _read_block(
    text: str,
    span: tuple[int, int],
    read: Callable[[str, int], tuple[list[tuple[str, Any]], int]],
    *,
    end_tag: str,
    start_tag: str,
    name: str = "",
) -> Block:
    """Read a block of calls that a function decodes.

    Args:
        text: the whole text.
        span: first character of the block, and of its notation.
        read: return the calls at a position and their end; raises ValueError.
        end_tag: text that ends the block.
        start_tag: text that begins the next one.
        name: name of a call that cannot be read.
    """
    calls: list[tuple[str, Any]] = []
    start, at = span
    try:
        calls, at = read(text, at)
        problem = None
    except RecursionError:
        problem = "the arguments are nested too deeply"
    except ValueError as error:
        problem = f"the call cannot be read: {error}"
    closed = re.compile(rf"\s*(?:{re.escape(end_tag)}|(?=<)|\Z)").match(text, at)
    if problem is None and closed is not None:
        raw = text[start : closed.end()]
        return Block(start, closed.end(), tuple(ToolCall(called, arguments, raw) for called, arguments in calls))
    stop = re.compile(rf"{re.escape(end_tag)}|(?={re.escape(start_tag)})|\Z").search(text, span[1])
    assert stop is not None
    call = ToolCall(name, None, text[start : stop.end()], None, problem or "text follows the arguments")
    return Block(start, stop.end(), (call,))


def find_gemma(text: str, start: int) -> Block | None:
    opened = re.compile(r"<\|tool_call>\s*(?:call:\s*([\w.-]*))?\s*").search(text, start)
    if opened is None:
        return None
    name = opened[1] or ""

    def read(text: str, at: int) -> tuple[list[tuple[str, Any]], int]:
        arguments, end = _gemma_value(text, at)
        if not name or not isinstance(arguments, dict):
            raise ValueError("write call:name{key:value}")
        return [(name, arguments)], end

    return _read_block(text, opened.span(), read, end_tag="<tool_call|>", start_tag="<|tool_call>", name=name)


def _gemma_value(text: str, at: int) -> tuple[Any, int]:
    """Read a value of Gemma's notation: JSON with bare keys and `<|"|>` for quotes."""
    if text.startswith(_QUOTE, at):
        end = text.find(_QUOTE, at + len(_QUOTE))
        if end < 0:
            raise ValueError("a string does not end")
        return text[at + len(_QUOTE) : end], end + len(_QUOTE)
    opening = text[at : at + 1]
    if opening not in ("{", "["):
        return _literal(text, at, r"[^,\[\]{}<]*")
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
        at = _after_item(text, at, closing)
    return (object_of(pairs) if opening == "{" else items), at + 1


def _literal(text: str, at: int, pattern: str) -> tuple[Any, int]:
    """Read a number or constant, as JSON or Python writes it."""
    bare = re.compile(pattern).match(text, at)
    assert bare is not None
    said = bare[0].strip()
    if said in _LITERALS:
        return _LITERALS[said], bare.end()
    value, end, problem = decode_json(said)
    if problem or end < len(said):
        raise ValueError(f"{said[:50]!r} is not a value")
    return value, bare.end()


def _after_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip()) if text[at : at + 1].isspace() else at


def _after_item(text: str, at: int, closing: str) -> int:
    at = _after_space(text, at)
    if text.startswith(",", at):
        return at + 1
    if not text.startswith(closing, at):
        raise ValueError(f"{closing} is missing, or the call is cut")
    return at


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


def find_lfm2(text: str, start: int) -> Block | None:
    """Find calls as Python writes them, with JSON for lists and objects: `[name(key='value', other={"a": 1})]`."""
    opened = re.compile(r"<\|tool_call_start\|>\s*(?:\[\s*(\w*))?").search(text, start)
    if opened is None:
        return None
    tag = "<|tool_call_start|>"
    span = (opened.start(), opened.start() + len(tag))
    name = opened[1] or ""
    return _read_block(text, span, _python_calls, end_tag="<|tool_call_end|>", start_tag=tag, name=name)


def _python_calls(text: str, at: int) -> tuple[list[tuple[str, Any]], int]:
    calls: list[tuple[str, Any]] = []
    if not text.startswith("[", at := _after_space(text, at)):
        raise ValueError("write [name(key=value)]")
    at += 1
    while not text.startswith("]", at := _after_space(text, at)):
        if (head := re.compile(r"([\w.-]+)\s*\(").match(text, at)) is None:
            raise ValueError("a name and ( are missing, or the call is cut")
        pairs: list[tuple[str, Any]] = []
        at = head.end()
        while not text.startswith(")", at := _after_space(text, at)):
            if (key := re.compile(r"(\w+)\s*=\s*").match(text, at)) is None:
                raise ValueError("a key and = are missing, or the call is cut")
            value, at = _python_value(text, key.end())
            pairs.append((key[1], value))
            at = _after_item(text, at, ")")
        calls.append((head[1], object_of(pairs)))
        at = _after_item(text, at + 1, "]")
    return calls, at + 1


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def _python_value(text: str, at: int) -> tuple[Any, int]:
    if text[at : at + 1] in ("'", '"'):
        quote = text[at]
        quoted = re.compile(rf"{quote}((?:[^{quote}\\]|\\.)*){quote}", re.S).match(text, at)
        if quoted is None:
            raise ValueError("a string does not end")
        return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), quoted[1], flags=re.S), quoted.end()
    if text[at : at + 1] in ("[", "{"):
        value, end, problem = decode_json(text, at)
        if problem:
            raise ValueError(problem)
        return value, end
    return _literal(text, at, r"[^,()\[\]<]*")


def _python_text(value: Any) -> str:
    if isinstance(value, str):
        for raw, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
            value = value.replace(raw, escaped)
        return f"'{value}'"
    return dump_json(value) if isinstance(value, dict | list) else str(value)


def write_lfm2(calls: Sequence[ToolCall]) -> str:
    parts = [
        f"{call.name}({', '.join(f'{key}={_python_text(value)}' for key, value in (call.arguments or {}).items())})"
        for call in calls
    ]
    return f"<|tool_call_start|>[{', '.join(parts)}]<|tool_call_end|>" if calls else ""


TEXT_CONVENTIONS: dict[str, Convention] = {
    "qwen_xml": Convention(partial(find_tags, _QWEN_XML), write_qwen_xml, values_are_text=True),
    "gemma": Convention(find_gemma, write_gemma, (("<|channel>thought", "<channel|>"),)),
    "glm": Convention(partial(find_tags, _GLM), write_glm, values_are_text=True),
    "lfm2": Convention(find_lfm2, write_lfm2),
    "atem": Convention(partial(find_tags, _ATEM), write_atem, values_are_text=True),
}
"""Name -> convention."""
