"""Chat messages to text, with the exact character spans that the assistant wrote.

All spans are offsets into the full rendering. They come from the template's `{% generation %}` blocks where it has
them; otherwise from rendering the conversation up to and through each assistant turn. Where a template renders a turn
differently once later turns follow (it strips earlier reasoning), that turn is perturbed, and the characters of the
full rendering that change are its span.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import TemplateError

from burnish.config.paths import missing, path_problem
from burnish.data.formats import Message
from burnish.data.tokens import inner_tokenizer
from burnish.errors import ConfigError, DataError

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "ChatSpans",
    "Render",
    "attempt",
    "chat_spans",
    "render_chat",
    "resolve_chat_template",
    "special_texts",
]

logger = logging.getLogger(__name__)

DEFAULT_CHAT_TEMPLATE = """\
{%- if bos_token and bos_token not in ('<|im_start|>', eos_token) %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + eos_token -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
"""ChatML with generation blocks; every turn ends with the tokenizer's EOS token, so that generation stops there."""

_NO_STOP = "the chat template does not teach the model to stop: {}."
_RERENDERED = (
    "the chat template renders earlier assistant turns differently from how they were served (it strips earlier "
    "reasoning or opens a reasoning block); the mask follows the full rendering. To train each turn as it is served, "
    "split conversations with burnish.data.split_turns."
)

_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
# A private-use character, which occurs neither in data nor in templates.
_PROBE = "\uf8d5"

Render: TypeAlias = Callable[..., str]


@dataclass(frozen=True, slots=True)
class ChatSpans:
    """Rendered conversation.

    Attributes:
        text: the full rendering.
        spans: [start, end) characters that the assistant wrote, in order: text, tool calls and end-of-turn token.
        rerendered: number of assistant turns whose rendering differs from the one that was served (the template
            strips earlier reasoning, or its generation prompt opens a reasoning block).
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    rerendered: int = 0


def resolve_chat_template(chat_template: str | None, processing_class: Any, *, tools: Any = None) -> str:
    """Return the Jinja source of a chat template.

    Args:
        chat_template: None (that of the tokenizer), "chatml" (`DEFAULT_CHAT_TEMPLATE`), a path to a .jinja file, or
            Jinja source.
        processing_class: tokenizer or processor.
        tools: JSON schemas; some tokenizers have a separate template for tools.

    Raises:
        DataError: `chat_template` is None and the tokenizer has no template, or "chatml" and it has no EOS token.
        ConfigError: the file does not exist, or the value is none of these.
    """
    if chat_template is None:
        if not getattr(processing_class, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template (a base model?), but the data set is conversational: set "
                'chat_template = "chatml", a path to a .jinja file, or use the plain format (strings for messages).'
            )
        return str(processing_class.get_chat_template(None, tools))
    if chat_template == "chatml":
        if not processing_class.eos_token:
            raise DataError('chat_template = "chatml": the tokenizer has no eos_token to end a turn with: set one.')
        return DEFAULT_CHAT_TEMPLATE
    if "{%" in chat_template or "{{" in chat_template:
        return chat_template
    path = Path(chat_template)
    if path.suffix in (".j2", ".jinja", ".jinja2") and path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template = {chat_template!r}: cannot be read ({error}).") from error
    one_line = "\n" not in chat_template and path_problem(chat_template) is None
    there = f" ({missing(path)})" if one_line and not path.exists() else ""
    raise ConfigError(
        f'chat_template = {chat_template!r}: use "chatml", the path of an existing .jinja file or tokenizer folder, or '
        f"Jinja source{there}."
    )


def render_chat(
    processing_class: Any,
    messages: Sequence[Message],
    *,
    template: str,
    tools: list[dict[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """Render a conversation with a resolved template.

    Raises:
        DataError: the template rejects the conversation.
    """
    try:
        return str(
            processing_class.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(kwargs or {}),
            )
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template rejects the conversation with the roles {roles}: {error}") from error


def chat_spans(
    processing_class: Any,
    messages: Sequence[Message],
    *,
    template: str,
    tools: list[dict[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    first_turn: int = 0,
) -> ChatSpans:
    """Render a conversation and find what the assistant wrote.

    Args:
        processing_class: tokenizer or processor.
        messages: the conversation.
        template: resolved Jinja source.
        tools: JSON schemas.
        kwargs: template variables.
        first_turn: index of the first message whose assistant turns are reported (where the completion begins).

    Raises:
        DataError: the template rejects the conversation, or a turn cannot be located exactly.
    """
    render = partial(render_chat, processing_class, template=template, tools=tools, kwargs=kwargs)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first_turn]
    text = render(messages)
    if not turns:
        return ChatSpans(text, ())
    specials = special_texts(inner_tokenizer(processing_class))
    if _GENERATION.search(template):
        spans = _marked_spans(processing_class, messages, template, tools, kwargs, text)
        skipped = sum(message["role"] == "assistant" for message in messages[:first_turn])
        if skipped:
            spans = _spans_after(spans, render, messages, first_turn, text, len(turns) + skipped, skipped)
        if not spans:
            raise DataError("the template's generation blocks mark nothing in a conversation with assistant turns.")
        after = text[spans[-1][1] :].lstrip()
        if not _ends_turn(text[: spans[-1][1]], specials) and any(map(after.startswith, specials)):
            _warn(template, _NO_STOP.format("its generation blocks leave the end-of-turn token out"))
        return ChatSpans(text, tuple(spans))
    spans: list[tuple[int, int]] = []
    rerendered = 0
    floor = 0
    for turn in turns:
        span, exact = _turn_span(text, render, messages, turn, floor, specials)
        rerendered += not exact
        spans.append(span)
        floor = span[1]
    if not _ends_turn(text[: spans[-1][1]], specials):
        _warn(template, _NO_STOP.format("it ends assistant turns with no special token"))
    if rerendered:
        _warn(template, _RERENDERED)
    return ChatSpans(text, tuple(spans), rerendered)


def _marked_spans(
    processing_class: Any,
    messages: Sequence[Message],
    template: str,
    tools: list[dict[str, Any]] | None,
    kwargs: Mapping[str, Any] | None,
    text: str,
) -> list[tuple[int, int]]:
    """Return the spans of the template's generation blocks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    call: Any = render_jinja_template
    tokenizer = inner_tokenizer(processing_class)
    rendered, indices = call(
        [list(messages)],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **(kwargs or {})},
    )
    if rendered[0] != text:
        raise DataError("the chat template renders differently while its generation blocks are tracked: it must not.")
    return [(int(start), int(end)) for start, end in indices[0] if end > start]


def _spans_after(
    spans: list[tuple[int, int]],
    render: Render,
    messages: Sequence[Message],
    first_turn: int,
    text: str,
    num_turns: int,
    skipped: int,
) -> list[tuple[int, int]]:
    """Keep the spans of turns from `first_turn` on."""
    prompt = render(messages[:first_turn], add_generation_prompt=True)
    if text.startswith(prompt):
        return [span for span in spans if span[0] >= len(prompt)]
    if len(spans) == num_turns:
        return spans[skipped:]
    raise DataError(
        "the chat template renders the prompt differently once the completion follows, and marks "
        f"{len(spans)} generation blocks for {num_turns} assistant turns: the completion cannot be located. "
        "Put exactly one generation block around each assistant turn."
    )


def _turn_span(
    text: str, render: Render, messages: Sequence[Message], turn: int, floor: int, specials: frozenset[str]
) -> tuple[tuple[int, int], bool]:
    """Locate one assistant turn; also return True if the full rendering shows it as it was served."""
    prompt = attempt(render, messages[:turn], add_generation_prompt=True) if turn else None
    through = text if turn == len(messages) - 1 else attempt(render, messages[: turn + 1])
    served = prompt is not None and text.startswith(prompt) and len(prompt) >= floor
    if served and prompt is not None and through is not None and text.startswith(through):
        if not through.startswith(prompt):
            raise _not_located(turn, "its generation prompt is not a prefix of the turn that follows it")
        stripped = through.rstrip()
        is_special = len(stripped) > len(prompt) and _ends_turn(stripped[len(prompt) :], specials)
        return (len(prompt), len(stripped) if is_special else len(through)), True
    low, high = _moved(text, render, messages, turn)
    start = len(prompt) if served and prompt is not None else _after_header(text, render, messages, turn, floor, low)
    end = _after_turn(text, render, messages, turn, high, through, specials)
    if not floor <= min(start, low) <= max(start, low) <= high <= end:
        raise _not_located(turn, "the turn's characters in the full rendering overlap another turn's")
    # A template that only appends an end-of-text token after the whole conversation does not alter the turn.
    unaltered = served and prompt is not None and through is not None and through.startswith(text[:end])
    return (start, end), unaltered


def attempt(render: Render, messages: Sequence[Message], **options: bool) -> str | None:
    """Render part of a conversation; None where the template rejects it."""
    try:
        return render(messages, **options)
    except DataError:
        return None


def _not_located(turn: int, trait: str) -> DataError:
    return DataError(
        f"the assistant turn at message {turn} cannot be located exactly in the rendered conversation: {trait}. "
        "Add {% generation %} ... {% endgeneration %} around assistant turns in the template (a .jinja file, such as "
        'chat_template = "template.jinja"), or train on one turn a row (burnish.data.split_turns).'
    )


def _probes(message: Message) -> list[Message]:
    """Return variants of a message, each with one part replaced by a character that occurs nowhere else."""
    variants: list[Message] = []
    content = message.get("content")
    blocks = [{"type": "text", "text": _PROBE}] if isinstance(content, list) else _PROBE
    variants.append({**message, "content": blocks})
    for name in ("reasoning_content", "reasoning", "thinking"):
        if message.get(name):
            variants.append({**message, name: _PROBE})
    for k, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        probe = {**function, "name": _PROBE}
        calls = list(message["tool_calls"])
        calls[k] = {**call, "function": probe} if "function" in call else probe
        variants.append({**message, "tool_calls": calls})
    return variants


def _moved(text: str, render: Render, messages: Sequence[Message], turn: int) -> tuple[int, int]:
    """Return the range [low, high) of characters in a rendering that depend on one message."""
    low, high = len(text), 0
    for variant in _probes(messages[turn]):
        other = attempt(render, [*messages[:turn], variant, *messages[turn + 1 :]])
        if other is None or other == text:
            continue
        head = _common_prefix(text, other)
        tail = _common_prefix(text[head:][::-1], other[head:][::-1])
        low, high = min(low, head), max(high, len(text) - tail)
    if low > high:
        raise _not_located(turn, "the template drops the turn")
    return low, high


def _common_prefix(a: str, b: str) -> int:
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _after_header(text: str, render: Render, messages: Sequence[Message], turn: int, floor: int, low: int) -> int:
    """Return the end of the role header before a turn; the header is what a generation prompt adds."""
    before = messages[:turn] or [{"role": "user", "content": _PROBE}]
    closed, opened = attempt(render, before), attempt(render, before, add_generation_prompt=True)
    if closed is None or opened is None or closed == opened:
        raise _not_located(turn, "the template ignores add_generation_prompt")
    header = opened[_common_prefix(closed, opened) :]
    window = text[floor:low]
    start = window.rfind(header)
    if start >= 0:
        return floor + start + len(header)
    # A generation prompt may open (or close) a reasoning block that is missing from past turns.
    for size in range(len(header) - 1, 0, -1):
        if header[:size].strip() and window.endswith(header[:size]):
            return low
    raise _not_located(turn, f"past turns do not begin with its generation prompt {header!r}")


def _after_turn(
    text: str,
    render: Render,
    messages: Sequence[Message],
    turn: int,
    high: int,
    through: str | None,
    specials: frozenset[str],
) -> int:
    """Return the end of a turn: past what follows its content both as the last turn and in the full rendering."""
    if through is None:
        raise _not_located(turn, "the template refuses a conversation that ends with this turn")
    own_high = high if through == text else _moved(through, render, messages[: turn + 1], turn)[1]
    tail = through[own_high:]
    shared = _common_prefix(tail, text[high:])
    if ends := [m.end() for token in specials for m in re.finditer(re.escape(token), tail[:shared])]:
        return high + max(ends)
    if shared < len(tail):
        raise _not_located(turn, "the turn ends differently once later turns follow")
    return high + shared


def _ends_turn(text: str, specials: frozenset[str]) -> bool:
    return any(map(text.endswith, specials))


def special_texts(tokenizer: Any) -> frozenset[str]:
    """Return the texts that a tokenizer reads as control tokens."""
    return _added_specials(tokenizer, len(tokenizer)) | frozenset(map(str, tokenizer.all_special_tokens))


@lru_cache(maxsize=4)
def _added_specials(tokenizer: Any, size: int) -> frozenset[str]:
    """Return added tokens flagged special; `size` is part of the cache key because tokens can be added later."""
    del size
    return frozenset(str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)


@lru_cache(maxsize=32)
def _warn(template: str, text: str) -> None:
    """Warn once per template."""
    del template  # part of the cache key
    logger.warning(text)
