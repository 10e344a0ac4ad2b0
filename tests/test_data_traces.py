"""Nothing of a conversation is left out in silence, and tool calls are written once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from burnish.data import (
    DEFAULT_CHAT_TEMPLATE,
    answer_group,
    preference_group,
    prompt_group,
    reward_group,
    sft_group,
    unpaired_group,
)
from burnish.errors import DataError
from test_data import CHATML, LLAMA3, PHI3, STRIPPING, TOOLS, byte_level, decode, runs

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "city": "Zürich"}}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "What is two and two?"}
ANSWER = {"role": "assistant", "content": "4"}

BLIND = {"ours": DEFAULT_CHAT_TEMPLATE, "chatml": CHATML, "llama3": LLAMA3, "phi3": PHI3, "stripping": STRIPPING}
"""Templates that read role and content alone."""


def with_template(template: str) -> Any:
    made = byte_level(bos=False)
    made.chat_template = template
    return made


FIVE = [{"role": "assistant", "content": "5"}]

ENCODERS: dict[str, Callable[[list[Any], list[Any]], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "messages": lambda prompt, said: (sft_group, {"messages": [*prompt, *said]}),
    "completion": lambda prompt, said: (sft_group, {"prompt": prompt, "completion": said}),
    "pair": lambda prompt, said: (preference_group, {"prompt": prompt, "chosen": said, "rejected": FIVE}),
    "label": lambda prompt, said: (unpaired_group, {"prompt": prompt, "completion": said, "label": True}),
    "reward pair": lambda prompt, said: (reward_group, {"prompt": prompt, "chosen": said, "rejected": FIVE}),
    "reward list": lambda prompt, said: (reward_group, {"prompt": prompt, "completions": [said, FIVE]}),
    "answer": lambda prompt, said: (answer_group, {"prompt": prompt, "completion": said}),
    "prompt": lambda prompt, said: (prompt_group, {"prompt": [*prompt, *said, ASKED]}),
}  # fmt: skip


@pytest.mark.parametrize("how", ENCODERS)
@pytest.mark.parametrize("template", BLIND)
def test_a_call_that_the_template_does_not_write_is_refused(template: str, how: str) -> None:
    encode, row = ENCODERS[how]([ASKED], [CALLED])
    with pytest.raises(DataError, match=r"row 7: the chat template leaves out the key 'tool_calls' of message 1"):
        encode(row, with_template(BLIND[template]), index=7)


@pytest.mark.parametrize("how", ENCODERS)
@pytest.mark.parametrize("template", BLIND)
def test_tools_that_the_template_does_not_show_are_refused(template: str, how: str) -> None:
    encode, row = ENCODERS[how]([ASKED], [ANSWER])
    with pytest.raises(DataError, match="row 7: the chat template leaves out tools"):
        encode({**row, "tools": [TOOL]}, with_template(BLIND[template]), index=7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reasoning_content", "two, four"),
        ("reasoning", "two, four"),
        ("thinking", "two, four"),
        ("name", "Ada"),
        ("images", ["a.png"]),
        ("weight", 0),
        ("train", False),
        ("anything", {"a": 1}),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_any_key_that_the_template_does_not_read_is_refused(role: str, key: str, value: Any) -> None:
    messages = [dict(ASKED), dict(ANSWER)]
    messages[role == "assistant"][key] = value
    with pytest.raises(DataError, match=rf"leaves out the key '{key}' of message \d \({role}\).*chat_template"):
        sft_group({"messages": messages}, with_template(CHATML))
    reading = CHATML.replace("m.content", f"m.content + (m.{key} | string if m.{key} is defined else '')")
    tokenizer = with_template(reading)
    assert str(value) in decode(tokenizer, sft_group({"messages": messages}, tokenizer).completions[0].token_ids)


def test_content_that_the_template_leaves_out_is_refused() -> None:
    """Some templates write content or calls, never both."""
    either = TOOLS.replace("{% if m.content %}", "{% if m.content and not m.tool_calls %}")
    with pytest.raises(DataError, match="leaves out the key 'content' of message 1"):
        sft_group({"messages": [ASKED, {**CALLED, "content": "I add."}]}, with_template(either))
    no_system = "{% for m in messages if m.role != 'system' %}" + CHATML.partition("%}")[2]
    with pytest.raises(DataError, match=r"'content' of message 0 \(system\)"):
        sft_group({"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWER]}, with_template(no_system))


def test_calls_of_which_only_a_part_shows_are_refused() -> None:
    names_only = TOOLS.replace(" + c.function.arguments | tojson", "")
    with pytest.raises(DataError, match=r"tool_calls\[0\].arguments"):
        sft_group({"messages": [ASKED, CALLED]}, with_template(names_only))
    first_only = TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    other = {"function": {"name": "sub", "arguments": {"a": 1}}}
    with pytest.raises(DataError, match=r"tool_calls\[1\]"):
        sft_group({"messages": [ASKED, {**CALLED, "tool_calls": [CALL, other]}]}, with_template(first_only))


def test_reasoning_that_later_turns_strip_has_a_trace() -> None:
    reading = STRIPPING.replace("m.content.split", "('<think>' + m.thinking + '</think>' + m.content).split")
    thought = {**ANSWER, "thinking": "two, four"}
    messages = [ASKED, thought, ASKED, thought]
    tokenizer = with_template(reading)
    shown = decode(tokenizer, sft_group({"messages": messages}, tokenizer).completions[0].token_ids)
    assert shown.count("two, four") == 1


def test_what_ties_a_result_to_its_call_need_not_show() -> None:
    result = {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "4"}
    group = sft_group({"messages": [ASKED, CALLED, result, ANSWER]}, with_template(TOOLS), assistant_only_loss=True)
    call, answer = runs(with_template(TOOLS), group.completions[0])
    assert call == '<call>add{"a": 2, "city": "Zürich"}</call><|im_end|>'
    assert answer == "4<|im_end|>"


WRITERS = {
    "tojson": "c.function.arguments | tojson",
    "concatenation": "c.function.arguments",
    "interpolation": "'' ~ c.function.arguments",
    "either": "(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)",
}


@pytest.mark.parametrize("given", ["object", "text", "ascii"])
@pytest.mark.parametrize("writer", WRITERS)
def test_arguments_are_written_once_and_as_json(writer: str, given: str) -> None:
    arguments: Any = CALL["function"]["arguments"]  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    if given != "object":
        arguments = json.dumps(arguments, ensure_ascii=given == "ascii")
    template = TOOLS.replace("c.function.arguments | tojson", WRITERS[writer])
    message = {**CALLED, "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    tokenizer = with_template(template)
    group = sft_group({"prompt": [ASKED], "completion": [message]}, tokenizer)
    text = decode(tokenizer, group.completions[0].token_ids)
    written = text.removeprefix("<call>add").removesuffix("</call><|im_end|>")
    assert json.loads(written) == {"a": 2, "city": "Zürich"}


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", 5, "2" * 5000])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    with pytest.raises(DataError, match="row 0: messages: tool_calls"):
        sft_group({"messages": [ASKED, message]}, with_template(TOOLS))


@pytest.mark.parametrize(
    "content",
    ["m.content or ''", "(m['content'] if m['content'] is not none else '')", "m.content | trim", "m.content"],
)
def test_a_call_without_content_renders_under_every_idiom(content: str) -> None:
    template = TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ '' + " + content + " }}")
    tokenizer = with_template(template)
    group = sft_group({"prompt": [ASKED], "completion": [CALLED]}, tokenizer)
    assert decode(tokenizer, group.completions[0].token_ids).startswith("<call>add{")


def test_a_call_is_not_an_empty_completion() -> None:
    group = reward_group(
        {"prompt": [ASKED], "chosen": [CALLED], "rejected": [ANSWER], "tools": [TOOL]}, with_template(TOOLS)
    )
    assert "add" in group.completions[0].text
