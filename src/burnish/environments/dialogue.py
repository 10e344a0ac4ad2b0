"""Token-exact conversations: what follows a sampled turn is appended to its tokens, which are never encoded again.

A chat template renders whole conversations. Rendered anew after each turn, one may drop earlier reasoning, reformat
tool calls or merge tokens differently, and the policy would be trained on tokens that it did not sample. A `Dialogue`
renders only what comes after a turn (the rest of its end, the environment's answer, the next generation prompt), behind
a stand-in of the turn. `certify` proves, before any weight is loaded, that a template allows that, and tells whether
its own rendering of the same conversation would differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from burnish.data.chat import render_chat, resolve_chat_template, special_texts
from burnish.data.conversations import ChatRow
from burnish.data.formats import Message
from burnish.data.tokens import decode_text, inner_tokenizer, plain_ids
from burnish.data.traces import fit_to_template
from burnish.environments.formats import system_text
from burnish.errors import ConfigError, DataError

__all__ = ["Certificate", "Dialogue", "certify"]

_STAND_IN = "\uf8d6"
"""A private-use character in place of what a turn says."""
_QUESTION: Message = {"role": "user", "content": "What is 2 + 3?"}
_ANSWER = "five 5"


class Dialogue:
    """Renders and encodes the parts of a conversation that the policy does not write.

    Args:
        tokenizer: encodes texts.
        ends: tokens that end a turn.
        chat_template: see `resolve_chat_template`.
        kwargs: variables of the template.
        describes_tools: True if the template describes the tools in the prompt; else a system message does.
        answer_role: "tool" renders messages of tools as such; "user" as messages of the user, for templates without
            tools.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        ends: Sequence[int],
        chat_template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        describes_tools: bool = True,
        answer_role: str = "tool",
    ) -> None:
        self.tokenizer = tokenizer
        self.answer_role = answer_role
        self._describes_tools = describes_tools
        self._template, self._kwargs = chat_template, dict(kwargs or {})
        inner = inner_tokenizer(tokenizer)
        self.stop_at(ends)
        self._controls = re.compile(
            "|".join(map(re.escape, sorted(special_texts(inner), key=len, reverse=True))) or "$^"
        )

    def stop_at(self, ends: Sequence[int]) -> None:
        """Set the tokens that end a turn, once the model's own are known."""
        self.ends = tuple(ends)
        self.stops = {str(inner_tokenizer(self.tokenizer).convert_ids_to_tokens(end)): end for end in ends}

    def opening(self, messages: Sequence[Message], schemas: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Encode a conversation up to the policy's first turn."""
        messages, tools = self.offering(messages, schemas)
        return ChatRow(self.tokenizer, {"tools": tools}, 0, self._template, self._kwargs).prompt(messages)

    def offering(
        self, messages: Sequence[Message], schemas: Sequence[dict[str, Any]]
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Return a prompt that offers tools, and what the template is given of them."""
        if not schemas or self._describes_tools:
            return list(messages), list(schemas) or None
        text, first = system_text(schemas), messages[0]
        if first["role"] != "system":
            return [{"role": "system", "content": text}, *messages], None
        if text in first["content"]:
            return list(messages), None
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]], None

    def reply(
        self, turn: Message, answers: Sequence[Message], schemas: Sequence[dict[str, Any]] = (), *, stop: int | None
    ) -> list[int]:
        """Encode what follows a sampled turn, up to the next turn.

        Where the template rejects the calls of a turn (one without the identifier that it wants, a second one), the
        answers are shown as messages of the user: what a policy writes must not end its episode without a reward.

        Args:
            turn: the turn as a message: which tools it calls decides how answers are rendered.
            answers: messages of the environment.
            schemas: schemas of the tools in the prompt.
            stop: the token that ended the turn; None if none did, so that one is added.

        Raises:
            DataError: the template does not end the turn with a stop token, or rejects the messages.
        """
        try:
            text, place, name = self.rendered_reply(turn, answers, schemas)
        except DataError:
            if not turn.get("tool_calls"):
                raise
            text, place, name = self.rendered_reply({"role": "assistant", "content": ""}, answers, schemas)
        # Encoded behind the stop token, as in a whole conversation: a tokenizer may treat the start of a text apart.
        ids = plain_ids(self.tokenizer, text[place:])
        if ids[:1] != [self.stops[name]]:
            raise DataError(f"the tokenizer does not read {name!r} as the token that ends a turn.")
        return ids if stop is None else ids[1:]

    def rendered_reply(
        self, turn: Message, answers: Sequence[Message], schemas: Sequence[dict[str, Any]]
    ) -> tuple[str, int, str]:
        """Render a stand-in of a turn, the answers and the next generation prompt.

        Returns:
            The text, where the stop token that ends the turn begins in it, and the text of that token.
        """
        calls = [
            {**call, "function": {**call["function"], "arguments": {"x": _STAND_IN}}}
            for call in turn.get("tool_calls") or ()
        ]
        # Content beside calls is left out: some templates write it behind the answers.
        said = {"content": "", "tool_calls": calls} if calls else {"content": _STAND_IN}
        stand_in = {"role": "assistant", **said}
        # Templates take a tool's answer only after a call that they have rendered.
        role = self.answer_role if calls else "user"
        text = self.render([_QUESTION, stand_in, *(self.as_shown(answer, role) for answer in answers)], schemas)
        begun = text.rfind(_STAND_IN)
        found = [(place, name) for name in self.stops if (place := text.find(name, begun)) >= 0]
        if begun < 0 or not found:
            stops = ", ".join(map(repr, self.stops))
            raise DataError(f"it ends an assistant turn with none of the tokens that end sampling ({stops}).")
        return (text, *min(found))

    def render(
        self, messages: Sequence[Message], schemas: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation by the chat template."""
        tools = (list(schemas) or None) if self._describes_tools else None
        template = resolve_chat_template(self._template, self.tokenizer, tools=tools)
        render = partial(render_chat, self.tokenizer, template=template, tools=tools, kwargs=self._kwargs)
        return render(fit_to_template(render, messages), add_generation_prompt=add_generation_prompt)

    def as_shown(self, message: Message, role: str) -> Message:
        """Return an answer in which no text reads as a control token: it would end the turn, or forge another.

        Args:
            message: an answer of the environment.
            role: as which role messages of tools are shown, "tool" or "user".
        """
        content = message["content"]
        if isinstance(content, str):
            plain = content.replace(_STAND_IN, "")
            content = self._controls.sub(lambda found: f"{found[0][0]} {found[0][1:]}", plain)
        if message["role"] == "tool" and role == "user":
            return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        return {**message, "content": content}


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proven of a template before training.

    Attributes:
        answer_role: role as which messages of tools are rendered.
        stop: text that ends a turn.
        extends: True if the template renders a conversation of several turns just as the policy samples it, so that a
            server that renders it anew shows the model what it was trained on.
        keeps_reasoning: the same for turns that begin with reasoning.
    """

    answer_role: str
    stop: str
    extends: bool
    keeps_reasoning: bool


def certify(
    dialogue: Dialogue, message: Callable[[str], Message], text: str, schemas: Sequence[dict[str, Any]] = ()
) -> Certificate:
    """Prove that the tokens of a template's turns can be extended, and compare them with its own rendering.

    Args:
        dialogue: of the template; its `answer_role` becomes "user" where the template renders no messages of tools.
        message: returns a turn as a message.
        text: a turn, with a tool call if there are tools.
        schemas: schemas of the tools in the prompt.

    Raises:
        ConfigError: they cannot be extended; names the trait of the template.
    """
    turn = message(text)
    calls = turn.get("tool_calls") or ()
    answer: Message = {"role": "user", "content": _ANSWER}
    if calls:
        answer = {"role": "tool", "name": calls[0]["function"]["name"], "content": _ANSWER}
        answer |= {"tool_call_id": calls[0]["id"]} if "id" in calls[0] else {}
    problem = "it leaves out what a tool or an environment answers"
    for role in ("tool", "user") if calls else ("user",):
        dialogue.answer_role = role
        try:
            whole, place, stop = dialogue.rendered_reply(turn, [answer], schemas)
        except DataError as error:
            problem = str(error).rstrip(".")
            continue
        if _ANSWER in whole:
            break
    else:
        raise _uncertified(problem)
    if place > whole.find(_ANSWER):
        raise _uncertified("it does not end an assistant turn before the answer to it")
    prompt = dialogue.opening([_QUESTION], schemas)
    opened, closed = (dialogue.render([_QUESTION], schemas, add_generation_prompt=add) for add in (True, False))
    if opened == closed:  # right where the question itself ends with what opens an answer
        said = dialogue.render([_QUESTION, {"role": "assistant", "content": _ANSWER}], schemas)
        if not said.removeprefix(opened).lstrip().startswith(_ANSWER):
            raise _uncertified("it ignores add_generation_prompt")
    inner = inner_tokenizer(dialogue.tokenizer)
    reply = dialogue.reply(turn, [answer], schemas, stop=dialogue.stops[stop])
    bos = inner.bos_token_id
    if bos is not None and any(pair == (bos, bos) for pair in pairwise([*prompt, *reply])):
        raise _uncertified(f"it writes {inner.bos_token!r} twice in a row")
    if decode_text(inner, reply) != whole[place + len(stop) :]:
        raise _uncertified("its text does not survive the tokenizer: encoded and decoded, it reads differently")

    def extends(said: str) -> bool:
        shown = [_QUESTION, message(said), dialogue.as_shown(answer, dialogue.answer_role)]
        try:
            return dialogue.render(shown, schemas) == opened + said + whole[place:]
        except DataError:
            return False

    reasoned = (f"<think>\nEasy.\n</think>{gap}{text}" for gap in ("\n\n", "\n"))
    return Certificate(dialogue.answer_role, stop, extends(text), any(map(extends, reasoned)))


def _uncertified(trait: str) -> ConfigError:
    return ConfigError(
        f"chat_template: {trait}, so the turns of an episode cannot follow one another token for token; set "
        'chat_template to one that allows it, such as "chatml".'
    )
