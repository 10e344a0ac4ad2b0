"""Write docs/reference.md and docs/run_file.schema.json from the configuration: `python scripts/write_reference.py`.

With `--check` nothing is written; the status is 1 where a file differs from what would be.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from burnish.config import STAGES, FieldInfo, known_fields
from burnish.config.declare import GROUPS, declared
from burnish.config.lora import known_lora_fields
from burnish.config.quantization import QUANTIZATION_FIELDS
from burnish.config.sections import EvaluationSection, ModelInit, PairsSection, ReportSection
from burnish.config.stages import PIPELINE_STAGES, met_fields, refused_fields
from burnish.config.validation import bounds, schema_of
from burnish.data.sources import SOURCE_KEYS
from burnish.environments.registry import ENVIRONMENTS, NOT_IN_FILES
from burnish.rewards.registry import CRITERIA

DOCS = Path(__file__).resolve().parent.parent / "docs"

SECTIONS: dict[str, tuple[Mapping[str, FieldInfo], str]] = {
    "evaluation": (declared(EvaluationSection), "pass@k on `data.eval`: in a pipeline, and of `burnish eval`."),
    "pairs": (declared(PairsSection), "Preference pairs and best-of-n rows, of `burnish pairs` and in a pipeline."),
    "report": (declared(ReportSection), "The page that a pipeline ends with."),
    "model_init": (declared(ModelInit), "Arguments of `from_pretrained`. None of them has to be set."),
    "model_init.quantization_config": (QUANTIZATION_FIELDS, "Arguments of transformers' `BitsAndBytesConfig`."),
    "peft": (known_lora_fields(), "Train LoRA adapters: the fields of `peft.LoraConfig`."),
}

COMMON_OPTIONS = {
    "kind": "str",
    "name": "str",
    "weight": "float",
    "schedule": "list of [progress, factor]",
    "requires": "list of names, or a table of least values",
    "normalize": "'group' | 'center'",
    "per_group": "bool",
    "memoize": "bool",
    "overlap": "bool",
    "isolate": "bool",
    "timeout_seconds": "float",
}
"""What every criterion of a rubric takes."""


def cell(text: object) -> str:
    """Text for a cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", "\\n")


def table(header: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """A table in Markdown."""
    names = header.split(", ")
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]


def described(info: FieldInfo) -> str:
    """The help of a field, with the values it may have."""
    values = bounds(info.hint)
    said = info.fix or (values if values.startswith("use ") else "")
    return f"{info.help} {said[:1].upper()}{said[1:]}{'.' if said else ''}".strip()


def stage_fields() -> list[str]:
    """Every field of ours, by group; a default that stages do not share is given for each."""
    lines: list[str] = []
    infos = {kind: known_fields(kind) for kind in STAGES}
    for group in GROUPS:
        rows: list[list[object]] = []
        names = dict.fromkeys(n for kind in STAGES for n, i in infos[kind].items() if i.own and i.group is group)
        for name in names:
            kinds = [kind for kind in STAGES if name in infos[kind] and infos[kind][name].own]
            first = infos[kinds[0]][name]
            defaults = {repr(infos[kind][name].default): kind for kind in reversed(kinds)}
            default = (
                f"`{first.default!r}`"
                if len(defaults) == 1
                else ", ".join(f"{kind} `{infos[kind][name].default!r}`" for kind in kinds)
            )
            of = "all" if len(kinds) == len(STAGES) else ", ".join(kinds)
            rows.append([f"`{name}`", f"`{first.type}`", default, of, described(first)])
        lines += [f"### {group.title}", "", *table("field, type, default, stages, meaning", rows)]
    return lines


def inherited_fields() -> list[str]:
    """Every field of transformers.TrainingArguments, and what becomes of it."""
    rows: list[list[object]] = []
    for name, info in known_fields("sft").items():
        if info.own:
            continue
        refused = [kind for kind in STAGES if name in refused_fields(kind)]
        met = [kind for kind in STAGES if name in met_fields(kind)]
        fate = f"refused: {refused_fields(refused[0])[name]}" if refused else ""
        fate = "accepted, and changes nothing" if met else fate
        where = refused or met
        of = "" if len(where) in (0, len(STAGES)) else f" ({', '.join(where)})"
        rows.append([f"`{name}`", f"`{info.type.replace('_Opaque', 'object')}`", f"{fate}{of}"])
    return table("field, type, here", rows)


def rubric() -> list[str]:
    """The kinds of criteria with their options."""
    rows: list[list[object]] = []
    for kind, factory in CRITERIA.items():
        options = [
            f"`{name}: {parameter.annotation}"
            + ("`" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}`")
            for name, parameter in inspect.signature(factory).parameters.items()
            if name not in ("folder", "pool", "sandbox")
        ]
        rows.append([f"`{kind}`", (inspect.getdoc(factory) or "").partition("\n\n")[0], ", ".join(options)])
    common = ", ".join(f"`{name}: {type_}`" for name, type_ in COMMON_OPTIONS.items())
    return [
        f"Every `[[rubric]]` table has {common}, and the options of its kind.",
        "",
        *table("kind, meaning, options", rows),
    ]


def environments() -> list[str]:
    """The kinds of environments with their options."""
    rows: list[list[object]] = []
    for kind, make in ENVIRONMENTS.items():
        options = [
            f"`{name}: {parameter.annotation}"
            + ("`" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}`")
            for name, parameter in inspect.signature(make).parameters.items()
            if name not in NOT_IN_FILES
        ]
        rows.append([f"`{kind}`", (inspect.getdoc(make) or "").partition("\n\n")[0], ", ".join(options)])
    return [
        "`[environment]` has a `kind` and the options of that kind; of several `[[environment]]` each also has a `name`, "
        "by which the column `environment` of the rows chooses. See [tools and environments](environments.md).",
        "",
        *table("kind, meaning, options", rows),
    ]


def page() -> str:
    """The reference of run files."""
    lines = [
        "# Every key of a run file",
        "",
        "Written by `scripts/write_reference.py` from the configuration; `burnish STAGE --help` prints the same fields.",
        "`docs/run_file.schema.json` is the JSON schema, for editors that complete and check TOML or YAML.",
        "",
        "A file of one stage has its fields in `[training]`; a pipeline has one table for each of its stages:",
        f"{', '.join(f'`[{name}]`' for name in PIPELINE_STAGES)}. Both have `model` (a folder, a .gguf file, a hub name "
        "or an installed package) and the tables below; a pipeline also has `output_dir`.",
        "",
        "## Stages",
        "",
        *stage_fields(),
        "### From transformers.TrainingArguments",
        "",
        *inherited_fields(),
        "## [data]",
        "",
        "`train`, `eval` and, in a pipeline, `sft` are sources: a path, or a table with one of `path`, `source` and "
        "`mix`. `system_prompt` and `prompt_template` apply to every source that does not set them. See [data](data.md).",
        "",
        *table(
            "a source with, takes",
            [[f"`{kind}`", ", ".join(f"`{k}`" for k in sorted(keys))] for kind, keys in SOURCE_KEYS.items()],
        ),
        "## [[rubric]]",
        "",
        *rubric(),
        "## [environment]",
        "",
        *environments(),
    ]
    for name, (infos, text) in SECTIONS.items():
        rows = [
            [f"`{n}`", f"`{i.type.replace('_Opaque', 'object')}`", f"`{i.default!r}`", described(i)]
            for n, i in infos.items()
        ]
        lines += [f"## [{name}]", "", text, "", *table("key, type, default, meaning", rows)]
    return "\n".join(lines).rstrip() + "\n"


def schema() -> dict[str, Any]:
    """The JSON schema of run files, of one stage and of pipelines; a field that stages share is defined once."""
    fields: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    for kind in STAGES:
        refused = refused_fields(kind)
        stages[kind] = schema_of({name: info for name, info in known_fields(kind).items() if name not in refused})
        for name, field in stages[kind]["properties"].items():
            key = name if fields.setdefault(name, field) == field else f"{kind}.{name}"
            fields.setdefault(key, field)
            stages[kind]["properties"][name] = {"$ref": f"#/$defs/{key}"}
    source: dict[str, Any] = {
        "anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {k: {} for keys in SOURCE_KEYS.values() for k in keys},
                "additionalProperties": False,
            },
        ]
    }
    kinds = {"kind": {"enum": list(ENVIRONMENTS)}}
    environment: dict[str, Any] = {"type": "object", "required": ["kind"], "properties": kinds}
    sections = {name: schema_of(infos) for name, (infos, _) in SECTIONS.items() if "." not in name}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": fields,
        "title": "burnish run file",
        "type": "object",
        "additionalProperties": False,
        "required": ["model"],
        "properties": {
            "model": {"anyOf": [{"type": "string"}, {"type": "object"}]},
            "output_dir": {"type": "string"},
            "data": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "train": source, "eval": source, "sft": source,
                    "system_prompt": {"type": "string"}, "prompt_template": {"type": "string"},
                },
            },
            "rubric": {
                "type": "array",
                "items": {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": list(CRITERIA)}}},
            },
            "environment": {"anyOf": [environment, {"type": "array", "items": environment}]},
            "training": {"anyOf": [{"$ref": f"#/properties/{kind}"} for kind in STAGES]},
            **stages,
            **sections,
        },
    }  # fmt: skip


def main() -> int:
    """Write the files, or with `--check` tell which of them are out of date."""
    wanted = {
        DOCS / "reference.md": page(),
        DOCS / "run_file.schema.json": json.dumps(schema(), indent=1, sort_keys=True) + "\n",
    }
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        print("\n".join(f"{path.name} is out of date: python scripts/write_reference.py" for path in stale))
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
