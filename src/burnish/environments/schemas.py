"""JSON schemas of parameters from their types, and descriptions from Google-style docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from burnish.errors import ConfigError

__all__ = ["describe_type", "parse_docstring"]


class _Quiet(GenerateJsonSchema):
    # The default of a nested model that JSON cannot hold is left out; the model does without it.
    ignored_warning_kinds = {"non-serializable-default", "skipped-choice"}  # noqa: RUF012


def describe_type(hint: Any, where: str, definitions: dict[str, Any]) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    """Return a validator and a JSON schema of a type.

    Args:
        hint: annotation of a parameter.
        where: function and parameter, for messages.
        definitions: receives the schemas that refer to themselves, which cannot be written in place.

    Raises:
        ConfigError: a type that has no JSON schema.
    """
    try:
        try:
            validator = TypeAdapter[Any](hint, config=ConfigDict(allow_inf_nan=False))
        except PydanticUserError as error:
            if error.code != "type-adapter-config-unused":  # models and dataclasses have a configuration of their own
                raise
            validator = TypeAdapter[Any](hint)
        schema = validator.json_schema(schema_generator=_Quiet, ref_template="#/$defs/{model}")
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{where}, whose type has no JSON schema ({reason}): use str, int, float, bool, list, dict, Literal, an "
            "Enum, a dataclass or a pydantic model."
        ) from error
    return validator, _plain(schema, schema.pop("$defs", {}), (), definitions)


def _plain(
    schema: Mapping[str, Any], known: Mapping[str, Any], inside: tuple[str, ...], definitions: dict[str, Any]
) -> dict[str, Any]:
    """Simplify a schema to what chat templates render: no titles or references, `nullable` for an optional type."""
    schema = dict(schema)
    if reference := schema.pop("$ref", None):
        name = str(reference).rsplit("/", 1)[-1]
        if name in inside:
            definitions.setdefault(name, {})  # filled where the outermost use is written
            return {"$ref": reference, **schema}
        made = _plain({**known[name], **schema}, known, (*inside, name), definitions)
        if name in definitions:
            definitions[name] = made
        return made
    if isinstance(schema.get("title"), str):
        del schema["title"]
    for key, nothing in (("default", None), ("additionalProperties", True)):
        if schema.get(key, ...) is nothing:
            del schema[key]

    def inner(part: Any) -> Any:
        return (
            _plain(cast("Mapping[str, Any]", part), known, inside, definitions) if isinstance(part, Mapping) else part
        )

    for key in ("properties", "patternProperties"):
        if key in schema:
            schema[key] = {name: inner(part) for name, part in schema[key].items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            schema[key] = inner(schema[key])
    for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
        if key in schema:
            schema[key] = [inner(part) for part in schema[key]]
    options: list[dict[str, Any]] = schema.get("anyOf", [])
    if {"type": "null"} in options:
        schema["nullable"] = True
        options = [option for option in options if option != {"type": "null"}]
    if len(options) == 1:
        del schema["anyOf"]
        return {**options[0], **schema}
    if options and all(option.keys() == {"type"} and isinstance(option["type"], str) for option in options):
        del schema["anyOf"]
        return {"type": [option["type"] for option in options], **schema}
    return {**schema, "anyOf": options} if options else schema


_SECTION = re.compile(
    r"(Args|Arguments|Attributes|Examples?|Keyword Args|Notes?|Parameters|Params|Raises|References|Returns?|See Also|"
    r"Todo|Warnings?|Warns|Yields?)\s*:\s*"
)
_PARAMETER = re.compile(r"\*{0,2}(\w+)\s*(?:\(.*?\))?\s*:\s*(.*)")


def parse_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the description and the descriptions of parameters in a Google-style docstring."""
    lines = (inspect.getdoc(function) or "").splitlines()
    section, indent, name = "", 0, ""
    description: list[str] = []
    parameters: dict[str, str] = {}
    for line in lines:
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if not depth and (header := _SECTION.fullmatch(line)):
            section, indent, name = header[1], 0, ""
        elif not section:
            description.append(line)
        elif section not in ("Args", "Arguments", "Keyword Args", "Parameters", "Params") or not text or not depth:
            continue
        else:
            indent = indent or depth
            if depth <= indent and (entry := _PARAMETER.fullmatch(text)):
                name = entry[1]
                parameters[name] = entry[2]
            elif name:
                parameters[name] = f"{parameters[name]} {text}".strip()
    return "\n".join(description).strip(), parameters
