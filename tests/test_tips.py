"""Tips that are written as TOML parse as TOML: each is found in the source and read as a file would read it."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import burnish
from burnish.config.tips import as_toml, toml_line
from burnish.errors import BurnishError

SOURCE = Path(burnish.__file__).parent
_ADVICE = r"\b(?:add|and|begin the file with|for instance|give|instead of|or|set|such as|use|with|write)\s+`?"
_HEADER = r"(?:\[\[?[\w.]+\]\]?\s*)?"
TIP = re.compile(rf"{_ADVICE}(?P<line>{_HEADER}[\w.]+ = .*)|(?P<table>\{{ ?\w+ = [^{{}}]*\}})", re.DOTALL)
"""A line of a file after words of advice, or an inline table anywhere."""

_REPORT = re.compile(r"[\w.]+ = \w+: ")
"""A value as Python writes it and what is wrong with it: no advice."""


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Texts of the source but for docstrings; what an f-string fills in counts as 1, which is good TOML."""
    tree = ast.parse(source)
    skipped = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.Expr) for part in ast.walk(node.value)
        if isinstance(node.value, ast.Constant)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for value in node.values for part in ast.walk(value)}
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "1" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def tips(text: str) -> Iterator[str]:
    """Every tip with what follows it; one sentence may give several."""
    start = 0
    while found := TIP.search(text, start):
        name = "line" if found["line"] is not None else "table"
        start = found.start(name) + 1
        if _REPORT.match(found[name]):
            continue
        yield found[name] if name == "line" else f"table = {found[name]}"


def parses(tip: str) -> bool:
    """Whether the tip, up to where its sentence goes on, is one key of a file and its value."""
    for end in range(len(tip), 0, -1):
        if end < len(tip) and re.match(r"[\w\"'\]}]", tip[end]) and re.match(r"\w", tip[end - 1]):
            continue  # within a word
        try:
            return len(tomllib.loads(tip[:end])) == 1 and "=" in tip[:end]
        except tomllib.TOMLDecodeError:
            continue
    return False


FOUND = [
    (f"{file.relative_to(SOURCE)}:{line}", tip)
    for file in sorted(SOURCE.rglob("*.py"))
    for line, text in messages(file.read_text(encoding="utf-8"))
    for tip in tips(text)
]


def test_every_tip_parses() -> None:
    assert len(FOUND) > 25
    wrong = [f"{place}: {tip[:100]}" for place, tip in FOUND if not parses(tip)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('rubric is missing; add [[rubric]] kind = "exact".', False),
        ('add [[rubric]]\nkind = "exact"', True),
        ('begin the file with `rubric = [{ kind = "exact" }]`.', True),
        ("set mask = False.", False),
        ("set mask = false.", True),
        ("set weights = [1.0, alpha]; or not", False),
        ("or set chat_template = a file", False),
        ('give loss = ["a", "b"] and weights = [1.0, 2.0], one per loss', True),
        ("use a table, such as {top_p = 0.9}.", True),
        ("use a source such as {path = ...}.", False),
    ],
)
def test_the_search_finds_what_it_should(text: str, good: bool) -> None:
    found = list(tips(text))
    assert found
    assert all(map(parses, found)) is good


@pytest.mark.parametrize(
    "value", ["x", 'a"b\\', "line\nbreak", "\x7f", "🙂", True, False, 3, -0.5, 1e-6, [1, 2], ["a", [True]], [],
              {"a b": "c", "d": {"e": [1]}}],
)  # fmt: skip
def test_values_come_back_from_their_line(value: object) -> None:
    assert tomllib.loads(toml_line("some.name", value)) == {"some.name": value}  # pyright: ignore[reportArgumentType]
    assert tomllib.loads(f"x = {as_toml(value)}") == {"x": value}  # pyright: ignore[reportArgumentType]


def test_errors_of_a_missing_table_can_be_pasted(tmp_path: Path) -> None:
    """As printed: the line goes to the beginning of the file, and the next error asks for something else."""
    from burnish.cli.config import load_run_file

    file, asked = tmp_path / "run.toml", list[str]()
    file.write_text('model = "m"\n')
    for _ in range(2):
        with pytest.raises(BurnishError) as caught:
            load_run_file(file, [], "grpo")
        asked += re.findall(r"begin the file with `(.*)`", str(caught.value))
        file.write_text(f'{chr(10).join(asked)}\nmodel = "m"\n')
    assert len(asked) == 2
    assert load_run_file(file, [], "grpo").rubric is not None
