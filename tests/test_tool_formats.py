"""Formats of tool calls: what is read, what is a problem, and the round trip through chat templates."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish.data import DEFAULT_CHAT_TEMPLATE
from burnish.data.chat import render_chat
from burnish.environments import TOOL_FORMATS, ToolCall, describes_tools, system_text, tool_format
from burnish.errors import ConfigError

TRL = next(iter((Path(__file__).parent.parent / ".venv-trl").glob("lib/*/site-packages/trl/chat_templates")), None)
BAR, BLOCK = "\uff5c", "\u2581"


def deepseek(name: str) -> str:
    return f"<{BAR}tool{BLOCK}{name.replace(' ', BLOCK)}{BAR}>"


BEGIN, END, ONE, STOP, SEP = (deepseek(n) for n in ("calls begin", "calls end", "call begin", "call end", "sep"))
ARGUMENTS: dict[str, Any] = {"x": 'a "b"\n{c}', "n": [1, {"k": None}]}
DUMPED = json.dumps(ARGUMENTS)

READ: dict[str, list[str]] = {
    "hermes": [
        f'<tool_call>\n{{"name": "f", "arguments": {DUMPED}}}\n</tool_call>',
        f'<tool_call>{{"name": "f", "parameters": {DUMPED}}}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {json.dumps(DUMPED)}}}</tool_call>',
        f'<tool_call>[{{"name": "f", "arguments": {DUMPED}}}]</tool_call>',
        f'<tool_call>{{"type": "function", "function": {{"name": "f", "arguments": {DUMPED}}}}}</tool_call>',
        f'<tool_call>\n{{"name": "f", "arguments": {DUMPED}}}\n<|im_end|>',
        f'<tool_call>\n{{"name": "f", "arguments": {DUMPED}}}',
        '<tool_call>{"name": "f", "arguments": {"x": "a \\"b\\"\n{c}", "n": [1, {"k": null}]}}</tool_call>',
    ],
    "qwen_xml": [
        '<tool_call>\n<function=f>\n<parameter=x>\na "b"\n{c}\n</parameter>\n<parameter=n>\n[1, {"k": null}]\n'
        "</parameter>\n</function>\n</tool_call>",
        '<function=f><parameter=x>a "b"\n{c}</parameter><parameter=n>[1, {"k": null}]</parameter></function>',
    ],
    "llama": [
        f'{{"name": "f", "parameters": {DUMPED}}}',
        f'<|python_tag|>{{"name": "f", "parameters": {DUMPED}}}<|eom_id|>',
        f'{{"type": "function", "name": "f", "parameters": {DUMPED}}}<|eot_id|>',
        f'I look it up.\n{{"name": "f", "arguments": {DUMPED}}}',
    ],
    "mistral": [
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {DUMPED}, "id": "abcdefghi"}}]</s>',
        f"[TOOL_CALLS]f[ARGS]{DUMPED}</s>",
        f"[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{DUMPED}",
        f"[TOOL_CALLS]f{DUMPED}",
    ],
    "deepseek": [
        f"{BEGIN}{ONE}function{SEP}f\n```json\n{DUMPED}\n```{STOP}{END}",
        f"{BEGIN}{ONE}f{SEP}{DUMPED}{STOP}{END}",
        f"{ONE}f{SEP}{DUMPED}{STOP}",
    ],
    "gemma": ['<|tool_call>call:f{n:[1,{k:null}],x:<|"|>a "b"\n{c}<|"|>}<tool_call|>'],
    "gptoss": [
        f" to=functions.f<|channel|>commentary json<|message|>{DUMPED}<|call|>",
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        f"<|constrain|>json<|message|>{DUMPED}<|call|>",
    ],
    "lfm2": [
        """<|tool_call_start|>[f(x='a "b"\\n{c}', n=[1, {"k": null}])]<|tool_call_end|>""",
        """<|tool_call_start|>[f( x = "a \\"b\\"\\n{c}" , n=[1, {"k": null}])]""",
    ],
    "glm": [
        '<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>a "b"\n{c}</arg_value>\n<arg_key>n</arg_key>\n'
        '<arg_value>[1, {"k": null}]</arg_value>\n</tool_call>'
    ],
    "atem": [
        '<atem:function_calls>\n<atem:invoke name="f">\n<atem:parameter name="x">a "b"\n{c}</atem:parameter>\n'
        '<atem:parameter name="n">[1, {"k": null}]</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in READ.items() for text in texts])
def test_what_models_write_is_read(name: str, text: str) -> None:
    (call,) = TOOL_FORMATS[name].parse(text)
    assert (call.name, call.arguments, call.problem) == ("f", ARGUMENTS, None)
    assert call.raw in text
    assert call.id == ("abcdefghi" if "abcdefghi" in text else None)


MALFORMED: list[tuple[str, str, str, str]] = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', "f", "not valid JSON: Expecting ','"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "cu', "f", "not valid JSON: Unterminated string"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}} </tool_call>', "f", "text after it"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "", 'no "name"'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "", 'no "name"'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "f", "must be a JSON object, not a list"),
    ("hermes", '<tool_call>{"name": "f", "arguments": "x=1"}</tool_call>', "f", "not valid JSON"),
    ("hermes", '<tool_call>{"name": "f", "x": 1}</tool_call>', "f", 'no "arguments", but the keys ["x"]'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1, "x": 2}}</tool_call>', "f", "a key stands twice"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "f", "NaN is not a finite number"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "f", "1e999 is not a finite"),
    ("hermes", '<tool_call>["f"]</tool_call>', "", "a call is a JSON object with a name and arguments, not a string"),
    ("hermes", "<tool_call>f(x=1)</tool_call>", "", "not valid JSON"),
    ("hermes", "<tool_call>", "", "not valid JSON"),
    ("hermes", "<tool_call>" + "[" * 100_000, "", "nested too deeply"),
    ("qwen_xml", "<tool_call>\n<function=f>\n<parameter=x>\n1\n", "f", "the value of 'x' has no end tag"),
    ("qwen_xml", "<tool_call><function=f><parameter=x>1</function></tool_call>", "f", "'x' has no end tag"),
    ("qwen_xml", "<tool_call><function=f>x=1</function></tool_call>", "f", "text between its parameters"),
    ("qwen_xml", "<tool_call><function=f>", "f", "is cut"),
    ("qwen_xml", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "", "no name"),
    (
        "qwen_xml",
        "<function=f><parameter=x>1</parameter><parameter=x>2</parameter></function>",
        "f",
        "the parameter 'x' stands twice",
    ),
    ("llama", '{"name": "f", "parameters": {"x": ', "f", "not valid JSON"),
    ("llama", '<|python_tag|>print("hi")<|eom_id|>', "", "not valid JSON"),
    ("llama", '{"parameters": {}}', "", 'no "name"'),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {', "f", "not valid JSON"),
    ("mistral", "[TOOL_CALLS]f[ARGS]x", "f", "not valid JSON"),
    ("deepseek", f"{BEGIN}{ONE}function{SEP}f\n```json\n{{\n```{STOP}{END}", "f", "not valid JSON"),
    ("deepseek", f"{BEGIN}", "", "not valid JSON"),
    ("gemma", "<|tool_call>call:f{x:1", "f", "missing, or the call is cut"),
    ("gemma", '<|tool_call>call:f{x:<|"|>a<tool_call|>', "f", "a string does not end"),
    ("gemma", "<|tool_call>call:f{x:1,x:2}<tool_call|>", "f", "stands twice"),
    ("gemma", "<|tool_call>call:f{x:y z}<tool_call|>", "f", "'y z' is not a value"),
    ("gemma", "<|tool_call>call:f" + "{a:" * 50_000, "f", "nested too deeply"),
    ("gemma", "<|tool_call>call:f{}x<tool_call|>", "f", "text follows the arguments"),
    ("gptoss", " to=functions.f<|channel|>commentary json<|message|>{<|call|>", "f", "not valid JSON"),
    ("gptoss", " to=functions.f<|channel|>comm", "f", "not valid JSON"),
    ("glm", "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1\n</tool_call>", "f", "'x' has no end tag"),
    ("lfm2", "<|tool_call_start|>[f(x='it's')]<|tool_call_end|>", "f", ") is missing"),
    ("lfm2", "<|tool_call_start|>[f(x=1, x=2)]<|tool_call_end|>", "f", "stands twice"),
    ("lfm2", "<|tool_call_start|>[f(x=[1, 'a'])]<|tool_call_end|>", "f", "not valid JSON"),
    ("lfm2", "<|tool_call_start|>[f(x='cu", "f", "a string does not end"),
    ("lfm2", "<|tool_call_start|>[f(1)]<|tool_call_end|>", "f", "a key and = are missing"),
    ("lfm2", "<|tool_call_start|>f(x=1)<|tool_call_end|>", "", "write [name(key=value)]"),
    ("lfm2", "<|tool_call_start|>", "", "write [name(key=value)]"),
    ("atem", '<atem:invoke name="f"><atem:parameter name="x">1', "f", "'x' has no end tag"),
]


@pytest.mark.parametrize(("kind", "text", "name", "problem"), MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_calls_are_calls_with_a_problem(kind: str, text: str, name: str, problem: str) -> None:
    (call,) = TOOL_FORMATS[kind].parse(text)
    assert call.name == name
    assert call.arguments is None
    assert problem in (call.problem or "")


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_malformed_call_does_not_swallow_the_next(name: str) -> None:
    own = TOOL_FORMATS[name]
    good = own.render([ToolCall("g", {"y": "z"})])
    prefix = "<|start|>assistant" if name == "gptoss" else "\n"
    for kind, bad, *_ in MALFORMED:
        # Cut in the middle of a value, no reader can tell where the value was to end.
        if kind == name and len(bad) < 1000 and not (name == "llama" and bad.startswith("{")):
            calls = own.parse(bad + prefix + good)
            assert [call.name for call in calls if call.problem is None] == ["g"], bad
            assert any(call.problem for call in calls), bad


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_several_calls_in_one_turn(name: str) -> None:
    own = TOOL_FORMATS[name]
    calls = [ToolCall("f", {"x": "1 < 2"}), ToolCall("g", {}), ToolCall("f", {"x": "3"})]
    text = own.render(calls)
    schemas = [schema("f", {"x": {"type": "string"}}), schema("g", {})]
    assert [(c.name, c.arguments, c.problem) for c in own.parse(text, schemas)] == [
        (c.name, c.arguments, None) for c in calls
    ]
    assert own.strip(text).strip() in ("", ";", "; ;") or name == "gptoss"


@pytest.mark.parametrize("name", [name for name in TOOL_FORMATS if name not in ("gemma", "gptoss")])
def test_reasoning_holds_no_calls(name: str) -> None:
    own = TOOL_FORMATS[name]
    f, g = (own.render([ToolCall(n, {"x": "y"})]) for n in "fg")
    for text, names in (
        (f"<think>\n{f}\n</think>\n{g}", "g"),
        (f"I could\n{f}\n</think>\n{g}", "g"),  # the generation prompt opened it
        (f"<think>\n{f}", ""),
        (f"{f}\n<think>\n{g}", "f"),
        (f"<think>a</think>\n{f}\n<think>\n{g}\n</think>\n{g}", "fg"),
        (f"<think>{f[: len(f) // 2]}</think>\n{g}", "g"),
    ):
        assert "".join(call.name for call in own.parse(text)) == names, text
    inside = own.render([ToolCall("f", {"x": "a <think> b"}), ToolCall("f", {"x": "a </think> b"})])
    assert [call.arguments for call in own.parse(inside)] == [{"x": "a <think> b"}, {"x": "a </think> b"}]
    inside = own.render([ToolCall("f", {"x": "a </think> b"})])
    assert [call.arguments for call in own.parse(inside)] == [{"x": "a </think> b"}]


def test_gemma_and_harmony_reason_in_channels() -> None:
    call = TOOL_FORMATS["gemma"].render([ToolCall("f", {"x": "y"})])
    text = f"<|channel>thought\n{call}<channel|>{call}Done."
    assert len(TOOL_FORMATS["gemma"].parse(text)) == 1
    assert TOOL_FORMATS["gemma"].strip(text) == f"<|channel>thought\n{call}<channel|>Done."
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    harmony = TOOL_FORMATS["gptoss"]
    text += f"<|start|>assistant{harmony.render([ToolCall('f', {})])}"
    assert harmony.strip(text) == "I look."
    for text, content in (("<|channel|>final<|message|>Done.<|return|>", "Done."), ("plain", "plain")):
        assert harmony.strip(text) == content


def test_strip_keeps_what_is_no_call() -> None:
    own = TOOL_FORMATS["hermes"]
    call = own.render([ToolCall("f", {})])
    assert own.strip(f"<think>{call}</think>\nI look.\n{call}\n") == f"<think>{call}</think>\nI look."
    assert own.strip(text := "  no call \n") == text
    assert TOOL_FORMATS["llama"].parse('Answer:\n{"name": "Ann", "age": 3}\n{"x": 1}') == []
    assert TOOL_FORMATS["llama"].parse('As in `{"name": "f", "parameters": {}}`.') == []


def schema(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"Do {name}.", "parameters": parameters}}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("042", {"type": "string"}, "042"),
        ("042", {"type": "integer"}, "042"),  # no JSON; the tool's own type reads it
        ("42", {"type": "integer"}, 42),
        ("42", {"type": "string"}, "42"),
        ("42", {"type": ["string", "integer"]}, 42),
        ("42", {"anyOf": [{"type": "string"}, {"type": "array"}]}, "42"),
        ("null", {"type": "string", "nullable": True}, None),
        ("None", {"type": "string", "nullable": True}, None),
        ("null", {"type": "string"}, "null"),
        ("True", {"type": "boolean"}, True),
        ("true", {"type": "string"}, "true"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1}', {"type": "string"}, '{"a": 1}'),
        ("42", {}, 42),
        ("free text", {}, "free text"),
        (" padded ", {"type": "string"}, " padded "),
        ("3.5", {"type": "integer"}, 3.5),
    ],
)
def test_text_is_read_by_the_types_of_the_schema(text: str, kind: dict[str, Any], value: Any) -> None:
    (call,) = TOOL_FORMATS["qwen_xml"].parse(
        f"<function=f><parameter=x>{text}</parameter></function>", [schema("f", {"x": kind})]
    )
    assert call.arguments == {"x": value}
    assert call.arguments is not None
    assert type(call.arguments["x"]) is type(value)


PIECES = (
    [text for texts in READ.values() for text in texts]
    + [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "</function>",
        "<parameter=x>",
        "</parameter>",
    ]
    + [
        "[TOOL_CALLS]",
        "[ARGS]",
        BEGIN,
        ONE,
        SEP,
        STOP,
        END,
        "<|tool_call>call:f",
        "<|tool_call_start|>[f(",
        "x='",
        '<|"|>',
        "<tool_call|>",
    ]
    + [" to=functions.f", "<|channel|>", "<|message|>", "<|call|>", "<|start|>assistant", "<|python_tag|>"]
    + [
        "<arg_key>x</arg_key>",
        "<arg_value>",
        '<atem:invoke name="f">',
        "{",
        "}",
        "[",
        "]",
        '"',
        ":",
        ",",
        "\n",
        "é\ud83d",
    ]
)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_no_text_makes_a_format_raise(name: str) -> None:
    own, generator = TOOL_FORMATS[name], random.Random(name)
    for _ in range(1500):
        parts = generator.choices(PIECES, k=generator.randint(1, 6))
        text = "".join(part[: generator.randint(1, len(part))] if generator.random() < 0.3 else part for part in parts)
        calls = own.parse(text)
        assert all((call.problem is None) == (call.arguments is not None) for call in calls)
        assert all(call.raw in text and (call.name or call.problem) for call in calls)
        assert len(own.strip(text)) <= len(text)
        own.message(text)


def random_value(generator: random.Random, depth: int, text: bool) -> Any:
    letters = "aZ 0\"'\\\n\t{}[]:,;<>/|=&éß東🙂\u2028"
    kind = generator.randint(0, 6 if depth else 4)
    if kind == 0 or (text and depth == 2):
        return "".join(generator.choices(letters, k=generator.randint(0, 12)))
    if kind < 5:
        return generator.choice([0, -7, 10**20, 0.1, -1e-9, 2.5e30, True, False, None])
    if kind == 5:
        return [random_value(generator, depth - 1, False) for _ in range(generator.randint(0, 3))]
    keys = [generator.choice("abc") + str(i) for i in range(generator.randint(0, 3))]
    return {key: random_value(generator, depth - 1, False) for key in keys}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_what_a_format_writes_it_reads(name: str) -> None:
    own, generator = TOOL_FORMATS[name], random.Random(f"write {name}")
    for _ in range(500):
        calls: list[ToolCall] = []
        schemas: list[dict[str, Any]] = []
        for i in range(generator.randint(1, 3)):
            keys = [f"k{j}" for j in range(generator.randint(0, 3))]
            arguments = {key: random_value(generator, 2, generator.random() < 0.5) for key in keys}
            calls.append(ToolCall(f"tool_{i}", arguments))
            kinds = {key: {"type": "string"} if isinstance(value, str) else {} for key, value in arguments.items()}
            schemas.append(schema(f"tool_{i}", kinds))
        said = generator.choice(["", "I look it up.\n", "<think>\nHm.\n</think>\n\n"])
        text = own.render(calls) if name == "gptoss" else said + own.render(calls)
        found = own.parse(text, schemas)
        assert [(c.name, c.arguments, c.problem) for c in found] == [(c.name, c.arguments, None) for c in calls], text


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_hostile_texts_take_linear_time(name: str) -> None:
    own = TOOL_FORMATS[name]
    began = time.monotonic()
    for piece in ("\n", " ", ";", "{", "<", "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", '{"name": "f"', ONE):
        own.parse(piece * (100_000 // len(piece)))
    assert time.monotonic() - began < 30  # seconds, where a quadratic reader takes hours


OWN = """{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for c in m.tool_calls or [] %}CALL{% endfor %}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def with_calls(written: str) -> str:
    return OWN.replace("CALL", written).replace("{{ bos_token }}", "")


MISTRAL = with_calls(
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '[TOOL_CALLS] [{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}]'
)
LLAMA = with_calls('{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}')
TEXT = with_calls(
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments + "" }}}</tool_call>'
)
UNREAD = with_calls("@{{ c.function.name }}({{ c.function.arguments | tojson }})")
LOSSY = with_calls('<tool_call>{"name": "{{ c.function.name }}", "arguments": {"text": "x"}}</tool_call>')


def test_a_format_is_found_by_a_round_trip(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.tokenizer()
    assert tool_format(tokenizer, MISTRAL).name == "mistral"
    assert tool_format(tokenizer, LLAMA).name == "llama"
    found = tool_format(tokenizer, TEXT)
    assert (found.name, found.encodes_arguments) == ("hermes", True)
    assert not caplog.records
    bare = tool_format(tokenizer, DEFAULT_CHAT_TEMPLATE)
    assert (bare.name, bare.in_template) == ("hermes", False)
    assert "renders no tool calls" in caplog.text


@pytest.mark.parametrize("template", [UNREAD, LOSSY])
def test_a_template_that_no_format_reads_is_an_error(template: str) -> None:
    with pytest.raises(
        ConfigError, match=r"which no format reads back exactly.*Set tool_format to one of hermes, qwen"
    ):
        tool_format(tiny.tokenizer(), template)
    assert tool_format(tiny.tokenizer(), template, "hermes").in_template is False


def test_a_choice_wins_and_a_contradiction_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert tool_format(tiny.tokenizer(), LLAMA, "llama").in_template
    assert tool_format(tiny.tokenizer(), DEFAULT_CHAT_TEMPLATE, "llama").name == "llama"
    assert not caplog.records
    chosen = tool_format(tiny.tokenizer(), LLAMA, "hermes")
    assert (chosen.name, chosen.in_template) == ("hermes", False)
    assert "the chat template renders calls as 'llama'" in caplog.text
    with pytest.raises(ConfigError, match=r"tool_format = 'json': use one of hermes, qwen_xml"):
        tool_format(tiny.tokenizer(), LLAMA, "json")


@pytest.mark.parametrize("template", [MISTRAL, LLAMA, TEXT, DEFAULT_CHAT_TEMPLATE])
def test_a_message_renders_as_it_was_written(template: str) -> None:
    tokenizer = tiny.tokenizer()
    own = tool_format(tokenizer, template)
    text = own.render([ToolCall("f", ARGUMENTS, id="abcdefghi")])
    message = own.message(text)
    assert ("tool_calls" in message) == own.in_template
    user = {"role": "user", "content": "Go."}
    rendered = render_chat(tokenizer, [user, message], template=template)
    prompt = render_chat(tokenizer, [user], template=template, add_generation_prompt=True)
    (call,) = own.parse(rendered[len(prompt) :])
    assert (call.name, call.arguments) == ("f", ARGUMENTS)
    assert own.message("just text") == {"role": "assistant", "content": "just text"}
    malformed = "[TOOL_CALLS] [" if own.name == "mistral" else '<|python_tag|>{"name": <tool_call>{'
    assert own.message(malformed) == {"role": "assistant", "content": malformed}


def test_the_tokenizer_s_own_parser_is_used_where_no_format_reads() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<assistant>",
        "fields": {
            "tool_calls": {
                "open_pattern": r"@(?P<name>\w+)\(",
                "close_pattern": r"\)\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": r"<eos>|$", "content": "text"},
        },
    }
    found = tool_format(tokenizer, UNREAD)
    assert found.name == "tokenizer"
    (call,) = found.parse(text := 'I look. @f({"x": 1})')
    assert (call.name, call.arguments) == ("f", {"x": 1})
    assert found.strip(text).strip() == "I look."
    assert found.parse("no call") == []
    (call,) = found.parse("@f({)")
    assert call.problem
    assert tool_format(tokenizer, LLAMA).name == "llama"
    with pytest.raises(ConfigError, match="can only be read"):
        found.render([call])


TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


def test_describing_tools() -> None:
    tokenizer = tiny.tokenizer()
    schemas = [schema("f", {"some_name": {"type": "string"}}), schema("other_tool", {})]
    assert describes_tools(tokenizer, TOOLS + OWN, schemas)
    assert not describes_tools(tokenizer, OWN, schemas)
    assert not describes_tools(tokenizer, OWN, [schema("user", {})])  # a word that stands there without tools
    names = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    assert not describes_tools(tokenizer, names + OWN, schemas)  # without parameters
    assert not describes_tools(tokenizer, "{{ tools[0] | tojson if tools }}" + OWN, schemas)  # only the first
    assert not describes_tools(tokenizer, "{% if tools %}{{ raise_exception('no') }}{% endif %}" + OWN, schemas)


def test_the_system_text_names_tools_and_a_call_that_the_format_reads() -> None:
    schemas = [schema("f", {"x": {"type": "string"}}), schema("g", {})]
    text = system_text(schemas)
    for one in schemas:
        assert json.dumps(one["function"]) in text
    (example,) = TOOL_FORMATS["hermes"].parse(text)
    assert example.problem is None


TABLE: dict[str, Sequence[str]] = {
    "atem": ["muse_glimmer"],
    "deepseek": ["deepseekv3"],
    "gemma": ["diffusion_gemma", "gemma4"],
    "glm": ["glm4moe"],
    "gptoss": ["gptoss"],
    "hermes": ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"],
    "llama": ["llama3_1", "llama3_2"],
    "qwen_xml": ["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3_5_nothink",
                 "qwen3_5_think", "qwen3_6", "qwen3_8"],
    "lfm2": ["lfm2_2_5_vl", "lfm2_v2"],
    "no format": ["lfm2_2_5"],  # which does not escape quotes in strings
}  # fmt: skip
"""Format -> TRL's templates, without `_training` and the number of a revision; the others render no calls."""


def family(stem: str) -> str:
    stem = stem.removesuffix("_training")
    for revision in ("_v2", "_v3", "_v4", "_v5"):
        if stem.startswith(("gemma4", "lfm2_2_5")):
            stem = stem.removesuffix(revision)
    return stem


@pytest.mark.skipif(TRL is None, reason="TRL's environment is not there: make trl")
def test_the_format_of_each_of_trl_s_templates(record_property: Any) -> None:
    assert TRL is not None
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<bos>"
    expected = {name: kind for kind, names in TABLE.items() for name in names}
    schemas = [schema("get_weather", {"city": {"type": "string", "description": "the city"}})]
    found: dict[str, str] = {}
    for path in sorted(TRL.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        try:
            own = tool_format(tokenizer, template)
            kind = own.name if own.in_template else "no calls"
        except ConfigError:
            own, kind = None, "no format"
        found[path.stem] = kind
        assert kind == expected.get(family(path.stem), "no calls"), path.stem
        if own is None or not own.in_template:
            continue
        assert own.encodes_arguments == (path.stem == "deepseekv3")
        assert describes_tools(tokenizer, template, schemas) == (own.name != "deepseek"), path.stem
        # A turn of text and a call, through a message, the template and back.
        written = own.render([ToolCall("get_weather", {"city": "Zürich"})])
        message = own.message(written, schemas)
        rendered = render_chat(tokenizer, [{"role": "user", "content": "Go."}, message], template=template)
        assert [(c.name, c.arguments) for c in own.parse(rendered.split("Go.")[-1], schemas)] == [
            ("get_weather", {"city": "Zürich"})
        ], path.stem
    assert set(map(family, found)) >= set(expected)
    for name, kind in found.items():
        record_property(name, kind)
