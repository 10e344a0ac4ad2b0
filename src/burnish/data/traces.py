"""Checks that a chat template renders every part of a conversation.

A template silently skips keys that it does not use. Under a template without tool calls, for example, a turn that only
calls a tool becomes a bare end of turn, and the model learns to stop at once. The source of a template does not tell
reliably, so each part is removed once and the two renderings are compared.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from itertools import product
from typing import Any, cast

from burnish.data.chat import Render, attempt
from burnish.data.formats import Message
from burnish.errors import DataError

__all__ = ["check_traces", "fit_to_template"]

_MISSING: Any = object()


def fit_to_template(render: Render, messages: Sequence[Message]) -> list[Message]:
    """Convert missing contents and the arguments of tool calls to the form that the template expects.

    Some templates concatenate arguments and need JSON text; most apply `tojson` and would encode a text twice. Some
    need `content` to be None beside tool calls, others need a string.

    Args:
        render: function from messages to text.
        messages: a conversation without keys that are None.

    Returns:
        The messages in the first form whose rendering contains the arguments as JSON, encoded once.

    Raises:
        DataError: there is no such form.
    """
    absent = any("content" not in message for message in messages)
    called = any(message.get("tool_calls") for message in messages)
    if not absent and not called:
        return list(messages)
    problem: DataError | None = None
    for content, as_text in product((_MISSING, None, "") if absent else (_MISSING,), (False, True)[: 1 + called]):
        fitted = [_fitted(message, content, as_text=as_text) for message in messages]
        try:
            text = render(fitted)
        except DataError as error:
            problem = problem or error
            continue
        calls = (call for message in fitted for call in message.get("tool_calls") or ())
        given = (arguments for call in calls if (arguments := _function(call).get("arguments")))
        if wrong := next((arguments for arguments in given if _is_miswritten(arguments, text)), None):
            problem = problem or DataError(f"the chat template does not write the arguments {wrong!r:.80} as JSON.")
            continue
        return fitted
    assert problem is not None
    raise problem


def check_traces(render: Render, messages: Sequence[Message], *, render_without_tools: Render | None = None) -> None:
    """Refuse a conversation of which the template does not render a part.

    It suffices that a key is rendered while its turn is the last one (as reasoning that later turns strip). The id that
    links a tool's result to its call, and a tool's name beside its result, may be missing.

    Args:
        render: function from messages to text.
        messages: the conversation, as it will be rendered.
        render_without_tools: the same without tools, if the row has tools.

    Raises:
        DataError: names the message, the key and the fix.
    """
    text = render(messages)
    if render_without_tools is not None and attempt(render_without_tools, messages) == text:
        raise _no_trace("tools")
    for position, message in enumerate(messages):
        for key, without in _parts(message):
            if key == "content" and _is_verbatim(message["content"], text):
                continue
            if attempt(render, [*messages[:position], without, *messages[position + 1 :]]) != text:
                continue
            served = attempt(render, messages[: position + 1])
            if served is not None and attempt(render, [*messages[:position], without]) != served:
                continue
            raise _no_trace(f"the key {key!r} of message {position} ({message['role']})")


def _no_trace(part: str) -> DataError:
    return DataError(
        f"the chat template leaves out {part}, so the model would be trained without it: use a chat template that "
        "reads it (chat_template, or the tokenizer's own), move what it says into content, or drop it."
    )


def _parts(message: Message) -> Generator[tuple[str, Message]]:
    """Yield each part of a message that must be rendered, with the message without it."""
    for key, value in message.items():
        if key in ("role", "tool_call_id") or (key == "name" and message["role"] == "tool"):
            continue
        if value is not None and value not in ("", [], {}):
            yield key, {name: other for name, other in message.items() if name != key}
    calls: list[Any] = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        if _function(call).get("arguments") not in (None, "", "{}", {}):
            bare = _with_arguments(call, _MISSING)
            yield (
                f"tool_calls[{number}].arguments",
                {**message, "tool_calls": [*calls[:number], bare, *calls[number + 1 :]]},
            )
        if len(calls) > 1:
            yield f"tool_calls[{number}]", {**message, "tool_calls": [*calls[:number], *calls[number + 1 :]]}


def _is_verbatim(content: Any, text: str) -> bool:
    """Return True for content that the text contains; most contents thus need no second rendering."""
    if isinstance(content, str):
        return content.strip() in text
    blocks = cast("Sequence[Mapping[str, Any]]", content)
    return all(str(block.get("text", "")).strip() in text for block in blocks)


def _fitted(message: Message, content: Any, *, as_text: bool) -> Message:
    if "content" not in message and content is not _MISSING:
        message = {**message, "content": content}
    if calls := message.get("tool_calls"):
        message = {**message, "tool_calls": [_with_arguments(call, _form(call, as_text)) for call in calls]}
    return message


def _form(call: Any, as_text: bool) -> Any:
    given = _function(call).get("arguments", _MISSING)
    if as_text and isinstance(given, Mapping):
        return json.dumps(given, ensure_ascii=False)
    return json.loads(given or "{}") if isinstance(given, str) and not as_text else given


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", call.get("function", call))


def _with_arguments(call: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    function = {key: value for key, value in _function(call).items() if key != "arguments"}
    if arguments is not _MISSING:
        function["arguments"] = arguments
    return {**call, "function": function} if "function" in call else function


def _is_miswritten(arguments: Any, text: str) -> bool:
    """Return True if the text contains arguments as Python prints them, or as JSON within a JSON string."""
    if isinstance(arguments, str):
        return any(json.dumps(arguments, ensure_ascii=escaped) in text for escaped in (False, True))
    return str(arguments) != json.dumps(arguments, ensure_ascii=False) and str(arguments) in text
