"""Data set row formats: their detection and validation, and hints for rows that fit none.

Kinds and columns are those of TRL: `text`, `messages` or `conversations`; `prompt` + `completion`; `prompt`; `chosen` +
`rejected` with or without `prompt`; `prompt` + `completion` + `label`. A value is a string (plain) or a list of
messages (conversational), with `role` and `content` or, as ShareGPT writes them, with `from` and `value`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias, cast

from burnish.data.columns import meant_columns, rename_tip
from burnish.data.instructions import ADDS, ANSWERS, instruction_columns
from burnish.data.parsing import check_text, parse_json, short
from burnish.errors import ConfigError, DataError

__all__ = [
    "Format",
    "Kind",
    "Message",
    "as_row",
    "check_roles",
    "detect_format",
    "hint",
    "messages_of",
    "refuse_mixed",
    "row_template_kwargs",
    "row_tools",
    "split_turns",
    "unpair",
    "with_system",
]

Message: TypeAlias = dict[str, Any]


class Kind(StrEnum):
    """Kind of data in a row."""

    LANGUAGE_MODELING = "language_modeling"
    PROMPT_COMPLETION = "prompt_completion"
    PROMPT_ONLY = "prompt_only"
    PREFERENCE = "preference"
    UNPAIRED = "unpaired"


@dataclass(frozen=True, slots=True)
class Format:
    """Format of a row.

    Attributes:
        kind: kind of data.
        conversational: True where the values are lists of messages, False where they are strings.
        columns: the columns that hold text or tokens, prompt first.
        tokenized: True where the values are lists of token ids (see `burnish.data.tokenized`).
    """

    kind: Kind
    conversational: bool
    columns: tuple[str, ...]
    tokenized: bool = False


# Most specific first: a row with a label is unpaired even though it also has a prompt and a completion.
_FAMILIES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.UNPAIRED, ("prompt", "completion", "label")),
    (Kind.PREFERENCE, ("chosen", "rejected")),
    (Kind.PROMPT_COMPLETION, ("prompt", "completion")),
    (Kind.LANGUAGE_MODELING, ("messages",)),
    (Kind.LANGUAGE_MODELING, ("text",)),
    (Kind.LANGUAGE_MODELING, ("conversations",)),
    (Kind.PROMPT_ONLY, ("prompt",)),
    (Kind.UNPAIRED, ("prompt_ids", "completion_ids", "label")),
    (Kind.PREFERENCE, ("prompt_ids", "chosen_ids", "rejected_ids")),
    (Kind.LANGUAGE_MODELING, ("input_ids",)),
)

_STAGES: dict[str, tuple[Kind, ...]] = {
    "preference": (Kind.PREFERENCE,),
    "prompt": (Kind.PROMPT_ONLY,),
    "sft": (Kind.PROMPT_COMPLETION, Kind.LANGUAGE_MODELING),
    "unpaired": (Kind.UNPAIRED,),
}


_ROLES = frozenset({"assistant", "developer", "system", "tool", "user"})
"""Roles that every template accepts; others must occur in the template."""

_CHAT_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")

_SHAREGPT_ROLES = {
    "function_response": "tool",
    "gpt": "assistant",
    "human": "user",
    "observation": "tool",
}
"""ShareGPT role -> role, where the names differ."""

_HINTS = (
    ("conversations", "name conversations after what this stage needs"),
    ("chosen_input_ids", "rename chosen_input_ids to chosen_ids, and the others alike"),
    ("input_ids", "input_ids are rows of SFT; name tokens after what this stage needs, or give text"),
    ("instruction", "make instruction the prompt and its answer the completion"),
)
"""Columns of other libraries' data sets, with the fix to suggest."""


def hint(row: Mapping[str, Any], families: Iterable[Sequence[str]], *, also: Iterable[str] = ()) -> str:
    """Suggest a fix for a row that fits no format.

    Args:
        row: columns by name.
        families: sets of columns of which one is needed.
        also: optional columns.
    """
    if names := meant_columns(row, families, also=also):
        lost = [name for name in ADDS if row.get(name) and name not in names and "prompt" in names.values()]
        return rename_tip(names) + (f"; {lost[0]} is not part of the prompt then: write both into one" if lost else "")
    for name in ANSWERS:
        if isinstance(row.get(name), int | float) and instruction_columns({**row, name: str(row[name])}):
            return f"{name} = {row[name]!r} is a number, not text; write it in quotes"
    return next((fix for name, fix in _HINTS if row.get(name) is not None), "rename columns, or drop the row")


def as_row(value: Any, index: int) -> Mapping[str, Any]:
    """Check a row, and convert ShareGPT's messages in it to `role` and `content`.

    Raises:
        DataError: not columns by name, or columns that burnish does not support.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"row {index} is {short(value)}: each row must be columns by name, such as {{'text': '...'}}.")
    row = cast("Mapping[str, Any]", value)
    for name in ("image", "images"):
        if row.get(name) is not None:
            raise DataError(f"row {index} has {name}: burnish trains on text; drop the column, or the row.")
    for name, content in row.items():
        check_text(content, f"row {index}", name)
    chats = [name for name in _CHAT_COLUMNS if isinstance(row.get(name), list)]
    shared = {name: _with_roles(row[name]) for name in chats if any(map(_names_speaker, row[name]))}
    return {**row, **shared} if shared else row


def detect_format(row: Mapping[str, Any], *, stage: str | None = None, index: int = 0) -> Format:
    """Detect and check the format of a row.

    Args:
        row: columns by name; a column that is None counts as missing (Arrow fills with None).
        stage: "sft", "preference", "unpaired" or "prompt": only its formats are accepted, and other columns are left
            for rewards and metrics; None selects the most specific format.
        index: index of the row, for messages.

    Raises:
        DataError: columns missing, ambiguous, of mixed type, or empty.
        ConfigError: no such stage.
    """
    if stage is not None and stage not in _STAGES:
        raise ConfigError(f"stage = {stage!r}: use one of {', '.join(sorted(_STAGES))}.")
    row = as_row(row, index)
    present = {name for name, value in row.items() if value is not None}
    allowed = [family for family in _FAMILIES if stage is None or family[0] in _STAGES[stage]]
    families = [family for family in allowed if present.issuperset(family[1])]
    if not families:
        needed = " | ".join(" + ".join(columns) for _, columns in allowed)
        who = "burnish" if stage is None else f"stage {stage!r}"
        also = ("prompt",) if any(kind is Kind.PREFERENCE for kind, _ in allowed) else ()
        fix = hint(row, [columns for _, columns in allowed], also=also)
        raise DataError(f"row {index} has the columns {sorted(map(str, present))}; {who} needs {needed}: {fix}.")
    kind, columns = families[0]
    rivals = [other for _, other in families[1:] if not set(other) <= set(columns)]
    if stage is None:  # a prompt beside messages does not make a row ambiguous
        rivals = [other for other in rivals if other != ("prompt",)]
    if rivals:
        choices = " or ".join(" + ".join(c) for c in (columns, *rivals))
        raise DataError(f"row {index} fits more than one format ({choices}): drop the columns that you do not mean.")
    texts = tuple(name for name in columns if name != "label")
    tokenized = _is_tokenized(texts)
    refuse_mixed(present, [name for _, names in allowed for name in names], tokenized=tokenized, index=index)
    if kind is Kind.PREFERENCE and "prompt" in present:
        texts = ("prompt", *texts)
    elif columns == ("chosen", "rejected"):
        _refuse_lost_prompt(row, index)
    found = {} if tokenized else {name: _is_conversation(row[name], name, index) for name in texts}
    if len(set(found.values())) > 1:
        shapes = ", ".join(f"{name} is {'messages' if chat else 'a string'}" for name, chat in found.items())
        raise DataError(f"row {index} mixes plain and conversational columns ({shapes}): use one kind for all of them.")
    if kind is Kind.UNPAIRED and row["label"] not in (True, False):
        raise DataError(f"row {index}: label = {short(row['label'])}: use true (good) or false (bad).")
    return Format(kind, any(found.values()), texts, tokenized)


def _refuse_lost_prompt(row: Mapping[str, Any], index: int) -> None:
    """Refuse a pair without a prompt if another column looks like the prompt and is not part of the chosen answer.

    Raises:
        DataError: names the line that renames the column.
    """
    meant = meant_columns(row, [("prompt", "chosen", "rejected")])
    for name in meant:
        asked = row[name]
        if isinstance(asked, str) and asked.strip() not in _texts_of(row["chosen"]):
            raise DataError(
                f"row {index} has chosen + rejected without a prompt, and a column {name!r} that chosen does not "
                f"contain, so the model would not see the prompt: {rename_tip(meant)}, or drop the column."
            )


def _texts_of(value: Any) -> str:
    """Join all texts within a value, such as a list of messages, by line breaks."""
    if isinstance(value, Mapping):
        value = list(cast("Mapping[str, Any]", value).values())
    if isinstance(value, list):
        return "\n".join(map(_texts_of, cast("list[Any]", value)))
    return value if isinstance(value, str) else ""


def refuse_mixed(present: Collection[str], columns: Iterable[str], *, tokenized: bool, index: int) -> None:
    """Refuse rows with both token ids and texts, of which only one would be used.

    Args:
        present: columns of the row that are not None.
        columns: columns that the stage uses.
        tokenized: True where the row is read as tokens.
        index: index of the row.

    Raises:
        DataError: names the columns of the other kind.
    """
    others = sorted({name for name in columns if name in present and name != "label"})
    others = [name for name in others if _is_tokenized([name]) is not tokenized]
    if others:
        kinds = ("token ids", "text") if tokenized else ("text", "token ids")
        raise DataError(
            f"row {index} mixes {kinds[0]} with {kinds[1]} in {', '.join(others)}: drop the columns that you do not "
            "mean."
        )


def _is_tokenized(columns: Sequence[str]) -> bool:
    return all(name.endswith("_ids") for name in columns)


def _is_conversation(value: Any, name: str, index: int) -> bool:
    if isinstance(value, str):
        if not value and name in ("text", "prompt"):
            raise DataError(f"row {index}: {name} is empty: drop the row.")
        if name in ("messages", "conversations"):
            raise DataError(
                f"row {index}: {name} = {short(value)}, a string: use a list of messages "
                '[{"role": "user", "content": "..."}], or name the column text.'
            )
        return False
    if not isinstance(value, list) or not value:
        raise DataError(
            f"row {index}: {name} = {short(value)}: use a string, or a non-empty list of messages "
            '[{"role": "user", "content": "..."}].'
        )
    if name == "text":
        raise DataError(f"row {index}: text = {short(value)}, a list: use a string, or name the column messages.")
    for message in cast("list[Any]", value):
        _check_message(message, name, index)
    return True


def _check_message(value: Any, name: str, index: int) -> None:
    message = cast("Mapping[str, Any]", value)
    if not isinstance(value, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
        raise DataError(
            f"row {index}: {name} holds {short(value)}, which is not a message: each needs a role and a content "
            '({"role": "user", "content": "..."}), or a from and a value.'
        )
    content = message.get("content")
    if content is None and not any(message.get(key) for key in _INSTEAD_OF_CONTENT):
        raise DataError(
            f"row {index}: {name} holds {short(value)}, a message without content: give it a string, or drop the row."
        )
    blocks = cast("list[Any]", content) if isinstance(content, list) else []
    texts: list[Any] = [block.get("text") if isinstance(block, Mapping) else None for block in blocks]
    if not (content is None or isinstance(content, str | list)) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"row {index}: {name} holds {short(value)}, whose content is not text: use a string, or blocks "
            '{"type": "text", "text": "..."}.'
        )
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, cast("list[Any]", calls)))):
        raise DataError(
            f"row {index}: {name}: tool_calls = {short(calls)}: use a list of calls "
            '{"function": {"name": "...", "arguments": {...}}}, with arguments as an object or its JSON.'
        )


_INSTEAD_OF_CONTENT = ("reasoning", "reasoning_content", "thinking", "tool_calls")
"""Keys of messages that may replace the content."""


def _is_call(call: Any) -> bool:
    if not isinstance(call, Mapping):
        return False
    function: Any = cast("Mapping[str, Any]", call).get("function", call)
    if not isinstance(function, Mapping) or not isinstance(cast("Mapping[str, Any]", function).get("name"), str):
        return False
    arguments: Any = cast("Mapping[str, Any]", function).get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}", "arguments")
        except DataError:
            return False
    return arguments is None or isinstance(arguments, Mapping)


def check_roles(messages: Sequence[Message], template: str) -> None:
    """Refuse misspelled and unknown roles, which templates render in arbitrary ways.

    Raises:
        DataError: a role that is neither standard nor named in the template.
    """
    for message in messages:
        role = message["role"]
        if role not in _ROLES and role not in template:
            raise DataError(
                f"role = {role!r}: neither one of {', '.join(sorted(_ROLES))} nor named in the chat template; rename "
                "it."
            )


def row_tools(row: Mapping[str, Any], index: int = 0) -> list[dict[str, Any]] | None:
    """Parse the `tools` column: JSON schemas as a list, or that list as a JSON string; None if there are none.

    Raises:
        DataError: not a list of schemas.
    """
    tools = _parsed(row.get("tools"), "tools", index)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise DataError(f"row {index}: tools = {short(tools)}: use a list of JSON schemas.")
    schemas = [_parsed(tool, "tools", index) for tool in cast("list[Any]", tools)]
    if not all(isinstance(schema, dict) for schema in schemas):
        raise DataError(f"row {index}: tools = {short(tools)}: each tool must be a JSON schema (an object).")
    return [_without_none(schema) for schema in schemas]


def row_template_kwargs(row: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
    """Parse the `chat_template_kwargs` column: this row's variables of the chat template.

    Raises:
        DataError: not a mapping.
    """
    kwargs = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs", index)
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise DataError(f"row {index}: chat_template_kwargs = {short(kwargs)}: use a mapping of template variables.")
    return {str(k): v for k, v in cast("Mapping[Any, Any]", kwargs).items() if v is not None}


def _parsed(value: Any, name: str, index: int) -> Any:
    if not isinstance(value, str):
        return value
    return parse_json(value, f"row {index}: {name} = {short(value)}")


def _without_none(value: Any) -> Any:
    """Drop keys that are None: Arrow pads all structs of a column to the same keys, and templates would print them."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in cast("Mapping[Any, Any]", value).items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in cast("list[Any]", value)]
    return value


def messages_of(value: Any) -> list[Message]:
    """Copy a conversational column into messages with `role`, without the keys that Arrow filled with None."""
    return [_without_none(message) for message in _with_roles(value)]


def _names_speaker(message: Any) -> bool:
    """Return True for a ShareGPT message, with the speaker in `from`; Arrow may fill `role` with None."""
    if not isinstance(message, Mapping):
        return False
    given = cast("Mapping[str, Any]", message)
    return given.get("role") is None and isinstance(given.get("from"), str)


def _with_roles(messages: Any) -> list[Any]:
    """Convert ShareGPT messages; others stay unchanged."""
    found: list[Any] = []
    for message in messages:
        if _names_speaker(message):
            speaker = str(message["from"])
            content = message["value"] if message.get("value") is not None else message.get("content")
            rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
            message = {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": content, **rest}
        found.append(message)
    return found


def with_system(prompt: Any, system_prompt: str, where: str) -> list[Message]:
    """Prepend a system message to a prompt and return it as messages.

    Raises:
        DataError: the prompt has a system message; names `where`.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of(prompt)
    if messages[0]["role"] == "system":
        raise DataError(f"{where} has a system message and system_prompt is set too: unset one of them.")
    return [{"role": "system", "content": system_prompt}, *messages]


def split_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a `messages` or `conversations` row into one `prompt` + `completion` row per assistant turn.

    Each turn is then trained exactly as it is served, even with templates that strip earlier reasoning.

    Raises:
        DataError: neither column holds messages.
    """
    name = next((name for name in ("messages", "conversations") if isinstance(row.get(name), list)), None)
    if name is None:
        raise DataError(f"split_turns needs a messages or conversations column; the row has {sorted(row)}.")
    messages = messages_of(row[name])
    rest = {k: v for k, v in row.items() if k != name}
    return [
        {**rest, "prompt": messages[:i], "completion": [message]}
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i > 0
    ]


def unpair(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a `prompt` + `chosen` + `rejected` row into two rows with a `label`: True (chosen) and False (rejected).

    Raises:
        DataError: a column is missing.
    """
    missing = {"prompt", "chosen", "rejected"} - row.keys()
    if missing:
        raise DataError(f"unpair needs prompt, chosen and rejected; the row lacks {sorted(missing)}.")
    rest = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
    return [
        {**rest, "completion": row["chosen"], "label": True},
        {**rest, "completion": row["rejected"], "label": False},
    ]
