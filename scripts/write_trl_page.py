"""Write docs/trl_fields.md: every field and argument of TRL's, and where it falls here.

`python scripts/write_trl_page.py` writes the page from tests/trl_fields.json, `--check` only compares. `--collect` writes
that file anew, in an environment that has TRL (`make trl`).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "tests" / "trl_fields.json"
PAGE = ROOT / "docs" / "trl_fields.md"
STAGES = {"SFT": "sft", "Reward": "reward", "DPO": "dpo", "KTO": "kto", "GRPO": "grpo", "RLOO": "rloo"}
"""Trainers at the top of TRL -> stages."""


def collect() -> dict[str, Any]:
    """TRL's version, and of every trainer the fields of its config and the arguments of its constructor."""
    import transformers
    import trl

    inherited = {item.name for item in dataclasses.fields(transformers.TrainingArguments)}
    found: dict[str, Any] = {"version": trl.__version__}
    for name in STAGES:
        fields = [item.name for item in dataclasses.fields(getattr(trl, f"{name}Config"))]
        found[name] = {
            "fields": sorted(set(fields) - inherited),
            "inherited": sorted(set(fields) & inherited),
            "arguments": list(inspect.signature(getattr(trl, f"{name}Trainer").__init__).parameters)[1:],
        }
    return found


def fate_of_field(kind: str, name: str) -> tuple[str, str]:
    """Where a field falls: a word for the summary, and what it means here."""
    from burnish.config import elsewhere, known_fields
    from burnish.config.compat import translated_names
    from burnish.config.stages import met_fields, refused_fields

    if name in met_fields(kind):
        return "met", "accepted with a log line: it is done anyway or has no effect"
    if (reason := refused_fields(kind).get(name)) is not None:
        return "refused", f"an error: {reason}"
    if name in known_fields(kind):
        return "works", "works"
    if name in translated_names(kind):
        return "works", "works: translated to the corresponding field"
    there = elsewhere(kind)[name]
    if there.met:
        return "met", f"accepted with a log line: {there.fix.removesuffix('; remove the field')}"
    return "refused", f"an error unless it has its default: {there.fix}"


def fate_of_argument(trainer: str, name: str) -> tuple[str, str]:
    """Where an argument of a trainer falls."""
    import burnish
    from burnish.config.compat import MOVED_ARGUMENTS, REFUSED_ARGUMENTS

    fix = REFUSED_ARGUMENTS.get(name) or MOVED_ARGUMENTS.get(name)
    takes = name in inspect.signature(getattr(burnish, f"{trainer}Trainer").__init__).parameters
    if takes and name not in REFUSED_ARGUMENTS:
        return "works", "works"
    assert fix is not None, f"{trainer}Trainer({name}=...) is not explained"
    return "refused", f"an error: {fix}"


def page(stored: dict[str, Any]) -> str:
    """The page."""
    lines = [
        f"# Every field and argument of TRL {stored['version']}",
        "",
        "Written by `scripts/write_trl_page.py` from both packages. A field of a config *works*, is *accepted* because its",
        "intent is met anyway, or is an *error* that names the fix. Fields inherited from `transformers.TrainingArguments` are",
        "in the [reference](reference.md), differences in meaning in [trl](trl.md).",
        "",
    ]
    counts: Counter[str] = Counter()
    tables: list[str] = []
    for trainer, kind in STAGES.items():
        rows = {f"`{name}`": fate_of_field(kind, name) for name in stored[trainer]["fields"]}
        arguments = {f"`{name}`": fate_of_argument(trainer, name) for name in stored[trainer]["arguments"]}
        counts.update(word for word, _ in (*rows.values(), *arguments.values()))
        tables += [f"## {trainer}Config", "", "| field | here |", "| --- | --- |"]
        tables += [f"| {name} | {text} |" for name, (_, text) in rows.items()]
        tables += ["", f"## {trainer}Trainer", "", "| argument | here |", "| --- | --- |"]
        tables += [f"| {name} | {text} |" for name, (_, text) in arguments.items()]
        tables.append("")
    total = sum(counts.values())
    lines += [
        f"Of {total} fields and arguments, {counts['works']} work, {counts['met']} are accepted because their intent is met, "
        f"and {counts['refused']} are errors that name the fix.",
        "",
    ]
    return "\n".join([*lines, *tables]).rstrip() + "\n"


def main() -> int:
    """Write the page or the stored names, or with `--check` tell whether the page is out of date."""
    if "--collect" in sys.argv:
        STORED.write_text(json.dumps(collect(), indent=1) + "\n", encoding="utf-8")
        return 0
    text = page(json.loads(STORED.read_text(encoding="utf-8")))
    stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text
    if stale and "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif stale:
        print(f"{PAGE.name} is out of date: python scripts/write_trl_page.py")
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
