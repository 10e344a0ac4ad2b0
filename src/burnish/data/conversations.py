"""Tokenization of conversational rows, with their templates, tools and template variables."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from burnish.data.chat import chat_spans, render_chat, resolve_chat_template
from burnish.data.formats import Message, check_roles, messages_of, row_template_kwargs, row_tools
from burnish.data.limits import EncodeStats
from burnish.data.tokens import tokenize_chat
from burnish.data.traces import check_traces, fit_to_template
from burnish.errors import DataError
from burnish.types import Completion

__all__ = ["ChatRow", "first_unscored", "naming_row"]


class ChatRow:
    """Tokenizer of one row, with the row's template, tools and template variables."""

    def __init__(
        self,
        processing_class: Any,
        row: Mapping[str, Any],
        index: int,
        chat_template: str | None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.processing_class = processing_class
        self.index = index
        tools = row_tools(row, index)
        with naming_row(index):
            template = resolve_chat_template(chat_template, processing_class, tools=tools)
        variables = {**(kwargs or {}), **row_template_kwargs(row, index)}
        self.options: dict[str, Any] = {"template": template, "tools": tools, "kwargs": variables}

    def conversation(self, messages: Any, assistant_only: bool, stats: EncodeStats | None) -> Completion:
        """Encode a whole conversation as one completion."""
        messages = self._fitted(self._checked(messages))
        with naming_row(self.index):
            if not assistant_only:
                ids = tokenize_chat(self.processing_class, self._render(messages), ())[0]
                return Completion(ids, first_unscored(len(ids)), _assistant_text(messages))
            chat = chat_spans(self.processing_class, messages, **self.options)
            ids, mask, _ = tokenize_chat(self.processing_class, chat.text, chat.spans)
        _count_rerendered(stats, chat.rerendered)
        mask[0] = False
        return Completion(ids, mask, _assistant_text(messages))

    def pair(self, prompt: Any, completion: Any, stats: EncodeStats | None) -> tuple[list[int], Completion]:
        """Encode a prompt and its completion up to the last end of turn; only assistant turns are scored."""
        prompt, completion = self._checked(prompt), self._checked(completion)
        if completion[0]["role"] != "assistant":
            raise DataError(
                f"row {self.index}: a completion must begin with an assistant message, this one begins with "
                f"{completion[0]['role']!r}: move the messages before it to the prompt."
            )
        if completion[-1]["role"] != "assistant":
            raise DataError(
                f"row {self.index}: a completion must end with an assistant message, this one ends with "
                f"{completion[-1]['role']!r}: drop the messages after the last answer."
            )
        if prompt[-1]["role"] == "assistant":
            raise DataError(
                f"row {self.index}: the prompt ends with an assistant message: merge it with the completion's first."
            )
        messages = self._fitted([*prompt, *completion])
        with naming_row(self.index):
            chat = chat_spans(self.processing_class, messages, first_turn=len(prompt), **self.options)
            first, last = chat.spans[0][0], chat.spans[-1][1]
            ids, mask, num_prompt = tokenize_chat(self.processing_class, chat.text[:last], chat.spans, boundary=first)
        _count_rerendered(stats, chat.rerendered)
        scored = mask[num_prompt:]
        return ids[:num_prompt], Completion(
            ids[num_prompt:], None if all(scored) else scored, _assistant_text(completion)
        )

    def prompt(self, messages: Any) -> list[int]:
        """Encode a prompt for generation."""
        messages = self._fitted(self._checked(messages))
        open_turn = messages[-1]["role"] == "assistant"
        with naming_row(self.index):
            text = self._render(messages, prompt=True, open_turn=open_turn)
            return tokenize_chat(self.processing_class, text, ())[0]

    def _checked(self, value: Any) -> list[Message]:
        messages = messages_of(value)
        with naming_row(self.index):
            check_roles(messages, self.options["template"])
        return messages

    def _fitted(self, messages: Sequence[Message]) -> list[Message]:
        """Convert a conversation to the form that the template expects; refuse one that it would not render whole."""
        with naming_row(self.index):
            fitted = fit_to_template(self._render, messages)
            without_tools = partial(self._render, tools=None) if self.options["tools"] else None
            check_traces(self._render, fitted, render_without_tools=without_tools)
        return fitted

    def _render(
        self, messages: Sequence[Message], *, prompt: bool = False, open_turn: bool = False, **options: Any
    ) -> str:
        return render_chat(
            self.processing_class,
            messages,
            add_generation_prompt=prompt and not open_turn,
            continue_final_message=prompt and open_turn,
            **{**self.options, **options},
        )


@contextmanager
def naming_row(index: int) -> Generator[None]:
    """Name the row in errors of layers that do not know it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"row {index}: {error}") from error


def _assistant_text(messages: Sequence[Message]) -> str:
    """Return the text of the assistant messages; tool calls as JSON."""
    texts: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            content = message.get("content") or ""
            blocks = cast("Sequence[Mapping[str, Any]]", [] if isinstance(content, str) else content)
            texts.append(content if isinstance(content, str) else "".join(str(b.get("text", "")) for b in blocks))
            if calls := message.get("tool_calls"):
                texts.append(json.dumps(calls, ensure_ascii=False, default=str))
    return "\n".join(filter(None, texts))


def first_unscored(num_tokens: int) -> list[bool]:
    """Return a mask of all tokens but the first, which nothing predicts."""
    return [position > 0 for position in range(num_tokens)]


def _count_rerendered(stats: EncodeStats | None, num_turns: int) -> None:
    if stats is not None:
        stats.num_rerendered_turns += num_turns
