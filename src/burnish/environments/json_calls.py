"""Conventions whose calls are JSON: Hermes and Qwen, Llama, Mistral, DeepSeek, gpt-oss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from burnish.environments.conventions import Block, Convention, ToolCall, call_from_object, decode_json, dump_json

__all__ = ["JSON_CONVENTIONS"]


def json_block(
    text: str,
    start: int,
    value_start: int,
    *,
    closing: str,
    resume: str,
    name: str | None = None,
    identifier: str | None = None,
) -> Block:
    """Read a block whose calls are JSON.

    Args:
        text: the whole text.
        start: first character of the block.
        value_start: first character of the JSON.
        closing: pattern of what ends a well-formed block.
        resume: pattern of what ends a malformed one, or begins the next.
        name: name of the tool where it stands outside the JSON, which then holds the arguments alone.
        identifier: the call's identifier where it stands outside the JSON.
    """
    value, end, problem = decode_json(text, value_start)
    if problem is None:
        if closed := re.compile(rf"\s*(?:{closing})").match(text, end):
            end = closed.end()
        elif not re.compile(r"\s*(?:$|[<\[])").match(text, end):  # a missing end tag loses nothing, text does
            problem = "JSON with text after it"
    if problem is not None:
        end_match = re.compile(rf"{resume}|\Z").search(text, max(value_start, start + 1))
        assert end_match is not None
        raw = text[start : end_match.end()]
        if name is None:
            said = re.search(r'"name"\s*:\s*"([^"\\]*)"', raw)
            name = said[1] if said else ""
        return Block(start, end_match.end(), (ToolCall(name or "", None, raw, identifier, f"the call is {problem}"),))
    raw = text[start:end]
    if name is not None:
        return Block(start, end, (call_from_object({"name": name, "arguments": value, "id": identifier}, raw),))
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    return Block(start, end, tuple(call_from_object(one, raw) for one in values))


def find_hermes(text: str, start: int) -> Block | None:
    opened = re.compile(r"<tool_call>\s*").search(text, start)
    if opened is None:
        return None
    return json_block(text, opened.start(), opened.end(), closing="</tool_call>", resume="</tool_call>|(?=<tool_call>)")


def write_hermes(calls: Sequence[ToolCall]) -> str:
    parts = [dump_json({"name": call.name, "arguments": call.arguments or {}}) for call in calls]
    return "\n".join(f"<tool_call>\n{part}\n</tool_call>" for part in parts)


_BARE_KEYS = {"arguments", "function", "id", "name", "parameters", "type"}


def find_llama(text: str, start: int) -> Block | None:
    """Find bare JSON at the start of a line; other JSON, without a name and parameters, is content."""
    while opened := re.compile(r"<\|python_tag\|>\s*|(?:^|;)[ \t]*(?=\{)", re.M).search(text, start):
        begin, value_start = opened.span()
        value, end, problem = decode_json(text, value_start)
        if problem is None and isinstance(value, dict):
            keys = set(cast("dict[str, Any]", value))
            is_call = bool(keys & {"parameters", "arguments"}) and ("name" in keys or keys <= _BARE_KEYS)
        else:
            pattern = (
                r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*"\s*(?:,\s*"(?:parameters|argum)|,?\s*\Z)'
            )
            is_call = re.compile(pattern).match(text, value_start) is not None
        if is_call or "python_tag" in opened[0]:
            return json_block(text, begin, value_start, closing="", resume=r"(?=<\|)")
        start = end if problem is None else value_start + 1
    return None


def write_llama(calls: Sequence[ToolCall]) -> str:
    return "; ".join(dump_json({"name": call.name, "parameters": call.arguments or {}}) for call in calls)


def find_mistral(text: str, start: int) -> Block | None:
    begin = text.find("[TOOL_CALLS]", start)
    if begin < 0:
        return None
    named = r"\[TOOL_CALLS\]\s*(?:([^\s\[\]{}\"]+)\s*(?:\[CALL_ID\]\s*([^\s\[]*)\s*)?(?:\[ARGS\])?\s*)?"
    head = re.compile(named).match(text, begin)
    assert head is not None
    return json_block(
        text, begin, head.end(), closing="", resume=r"(?=\[TOOL_CALLS\]|</s>)", name=head[1], identifier=head[2]
    )


def write_mistral(calls: Sequence[ToolCall]) -> str:
    objects = [
        {"name": call.name, "arguments": call.arguments or {}} | ({"id": call.id} if call.id else {}) for call in calls
    ]
    return f"[TOOL_CALLS] {dump_json(objects)}" if calls else ""


# The fullwidth vertical line and the lower block are those of DeepSeek's vocabulary.
_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEP = (
    f"<\uff5ctool\u2581{name}\uff5c>"
    for name in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
)


def find_deepseek(text: str, start: int) -> Block | None:
    """Find a call of V3 and R1 (`function`, separator, name, fenced JSON) or of V3.1 (name, separator, JSON)."""
    begin = rf"(?:{_CALLS_BEGIN}\s*(?:{_CALL_BEGIN})?|{_CALL_BEGIN})"
    pattern = rf"{begin}\s*(?:([^<\n]*){_SEP}(?:([^\n{{`]*)\n```(?:json)?\s)?)?\s*"
    head = re.compile(pattern).search(text, start)
    if head is None:
        return None
    return json_block(
        text,
        head.start(),
        head.end(),
        closing=rf"(?:```)?\s*{_CALL_END}(?:\s*{_CALLS_END})?",
        resume=rf"{_CALL_END}(?:\s*{_CALLS_END})?|{_CALLS_END}|(?={_CALL_BEGIN})",
        name=(head[1] if head[2] is None else head[2] or "").strip() if head[1] is not None else "",
    )


def write_deepseek(calls: Sequence[ToolCall]) -> str:
    parts = [
        f"{_CALL_BEGIN}function{_SEP}{call.name}\n```json\n{dump_json(call.arguments or {})}\n```{_CALL_END}"
        for call in calls
    ]
    return _CALLS_BEGIN + "\n".join(parts) + _CALLS_END if calls else ""


def find_gptoss(text: str, start: int) -> Block | None:
    """Find a harmony message to a function; the recipient stands in the role or in the channel."""
    pattern = (
        r"(?:\A|<\|start\|>assistant(?:<\|channel\|>\w+)?|<\|channel\|>\w+)\s*to=functions\.([^\s<]*)[^<]*"
        r"(?:<\|(?:channel|constrain)\|>[^<]*)*(?:<\|message\|>)?\s*"
    )
    head = re.compile(pattern).search(text, start)
    if head is None:
        return None
    return json_block(
        text,
        head.start(),
        head.end(),
        closing=r"<\|call\|>",
        resume=r"<\|(?:call|end|return)\|>|(?=<\|start\|>)",
        name=head[1],
    )


def write_gptoss(calls: Sequence[ToolCall]) -> str:
    parts = [
        f" to=functions.{call.name}<|channel|>commentary json<|message|>{dump_json(call.arguments or {})}<|call|>"
        for call in calls
    ]
    return "<|start|>assistant".join(parts)


def content_gptoss(text: str) -> str:
    """Return what harmony messages say to the user, without their headers, reasoning and calls."""
    start = 0
    kept: list[str] = []
    while block := find_gptoss(text, start):
        kept.append(text[start : block.start])
        start = block.end
    rest = "".join([*kept, text[start:]])
    pattern = r"<\|channel\|>(\w+)[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|start|call)\|>|\Z)"
    messages = re.findall(pattern, rest, re.S)
    return "\n".join(said.strip() for channel, said in messages if channel != "analysis") if messages else rest.strip()


JSON_CONVENTIONS: dict[str, Convention] = {
    "hermes": Convention(find_hermes, write_hermes),
    "mistral": Convention(find_mistral, write_mistral, (("<think>", "</think>"), ("[THINK]", "[/THINK]"))),
    "deepseek": Convention(find_deepseek, write_deepseek),
    "gptoss": Convention(find_gptoss, write_gptoss, (), content=content_gptoss),
    "llama": Convention(find_llama, write_llama),
}
"""Name -> convention."""
