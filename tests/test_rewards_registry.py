"""Rubrics from configuration tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.cli.config import load_run_file
from burnish.errors import ConfigError
from burnish.rewards import CRITERIA, rubric_from_config
from burnish.types import Completion, Group


def shout(completions: list[str], bonus: float = 0.0, **kwargs: Any) -> list[float]:
    return [float(c.isupper()) + bonus for c in completions]


def test_a_rubric_from_tables() -> None:
    rubric = rubric_from_config(
        [
            {"kind": "numeric", "weight": 2, "absolute_tolerance": 0.5},
            {"kind": "format", "tags": ["answer"], "name": "tags"},
            {"kind": "python", "function": f"{__name__}:shout", "options": {"bonus": 10.0}, "isolate": False},
        ]
    )
    assert rubric.names == ("numeric", "tags", "shout")
    completion = Completion([1], text="<answer>5.5</answer>")
    [[score]] = rubric.score([Group([1], [completion], {"prompt": "p", "answer": "5"})])
    assert score.criteria == {"numeric": 1.0, "tags": 1.0, "shout": 10.0}
    assert score.total == 13.0
    assert rubric.criteria[2].isolate is False


def test_every_kind_builds() -> None:
    needed: dict[str, dict[str, Any]] = {
        "python": {"function": "math:prod"},
        "soft_overlong": {"max_completion_length": 8, "cache": 2},
        "judge": {"rubric": "r", "model": "m", "base_url": "http://localhost/v1"},
        "language": {"language": "en"},
        "length": {"most": 8},
        "regex": {"pattern": "a"},
    }
    for kind in CRITERIA:
        assert len(rubric_from_config([{"kind": kind, **needed.get(kind, {})}]).criteria) == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"kind": "maht"}, r"rubric\[0\]\.kind = 'maht': did you mean 'math'\? Use one of: choice, citation"),
        ({"weight": 1}, "kind = None"),
        ({"kind": "math", "timeout": 3}, r"rubric\[0\]\.timeout = 3 .* did you mean 'timeout_seconds'"),
        ({"kind": "math", "pool": 3}, "pool = 3 is not an option"),
        ({"kind": "math", "timeout_seconds": "3"}, "timeout_seconds = '3': use a number"),
        ({"kind": "math", "timeout_seconds": -1}, "timeout_seconds = -1"),
        ({"kind": "exact", "sources": "tag"}, "sources = 'tag': use a list of strings"),
        ({"kind": "exact", "sources": ["tags"]}, "use names out of tag, boxed"),
        ({"kind": "exact", "ignore_case": 1}, "ignore_case = 1: use true or false"),
        ({"kind": "exact", "weight": "2"}, "weight = '2'"),
        ({"kind": "exact", "weight": float("inf")}, "weight = inf"),
        ({"kind": "exact", "isolate": "no"}, "isolate = 'no'"),
        ({"kind": "soft_overlong", "cache": 2}, "max_completion_length is missing"),
        ({"kind": "soft_overlong", "cache": 2.5, "max_completion_length": 9}, "cache = 2.5: use an integer"),
        ({"kind": "python", "function": "nowhere"}, "write 'module:name'"),
        ({"kind": "python", "function": "no.such.module:f"}, "cannot be imported"),
        ({"kind": "python", "function": "math:no_such"}, r"function = 'math:no_such': math has no 'no_such'; it has "),
        ({"kind": "python", "function": "math:sqr"}, r"math has no 'sqr'; did you mean 'sqrt'\?"),
        ({"kind": "python", "function": "rewards.py"}, "write 'module:name'.* or 'rewards.py:name'"),
        ({"kind": "python", "function": ":f"}, "write 'module:name'"),
        ({"kind": "python", "function": "missing.py:f"}, "there is no file .*missing.py; paths are relative to the f"),
        ({"kind": "python", "function": "a\0b.py:f"}, "NUL"),
        ({"kind": "python", "function": "x" * 300 + ".py:f"}, "a name in it has 303 bytes"),
        ({"kind": "python", "function": "math:sqrt", "folder": "x"}, "folder = 'x' is not an option of kind 'python'"),
        ({"kind": "python", "function": "math:pi"}, "name a function or another callable"),
        ({"kind": "python", "function": "math:prod", "options": 1}, "options = 1: use a table"),
    ],
)
def test_errors_name_key_value_and_fix(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rubric_from_config([entry])


def test_names_are_unique() -> None:
    with pytest.raises(ConfigError, match="share the name 'exact'"):
        rubric_from_config([{"kind": "exact"}, {"kind": "exact"}])


def test_a_function_of_a_file_beside_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "judging.py").write_text(
        "import judging_parts\ndef judge(completions, **_):\n    return judging_parts.lengths(completions)\n"
    )
    (tmp_path / "judging_parts.py").write_text("def lengths(texts):\n    return [float(len(t)) for t in texts]\n")
    entries = [{"kind": "python", "function": function} for function in ("judging.py:judge", "./judging.py:judge")]
    rubric, again = (rubric_from_config([entry], folder=tmp_path) for entry in entries)
    assert rubric.names == ("judge",)
    assert rubric.criteria[0].function is again.criteria[0].function  # the module is run once
    [[score]] = rubric.score([Group([1], [Completion([1], text="abc")], {"prompt": "p"})])
    assert score.total == 3.0
    other = tmp_path / "other"
    other.mkdir()
    (other / "judging.py").write_bytes((tmp_path / "judging.py").read_bytes())
    moved = rubric_from_config([{"kind": "python", "function": f"{other / 'judging.py'}:judge"}])
    assert moved.criteria[0].function is not rubric.criteria[0].function  # another file of that name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", r"SyntaxError in line 1 of .*odd_\d+\.py: invalid syntax; correct it"),
        ("\nimport nowhere_at_all\n", r"imported: ModuleNotFoundError: No module named 'nowhere_at_all' \(line 2"),
        ("\n\n1 / 0\n", r"imported: ZeroDivisionError: division by zero \(line 3 of .*odd_\d+\.py\); correct"),
        ("raise SystemExit(0)\n", r"cannot be imported: SystemExit: 0 \(line 1"),
        ("def g(): ...\n", r"has no 'f'; it has g\."),
        ("f = 1\n", "is int: name a function or another callable"),
        ("def __getattr__(name): raise KeyError(name)\n", "cannot be imported: KeyError: 'f'"),
        ("\0", "null bytes"),
        ("# -*- coding: nope -*-\n", "SyntaxError"),
    ],
)
def test_errors_of_a_file_name_the_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / f"odd_{len(text)}{sum(map(ord, text))}.py"
    file.write_text(text)
    function = f"{file.name}:f"
    for _ in range(2):  # a module that failed is not taken for one that is there
        with pytest.raises(ConfigError, match=rf"rubric\[0\]: function = '{function}'.*{words}"):
            rubric_from_config([{"kind": "python", "function": function}], folder=tmp_path)


def test_a_module_beside_the_run_file_is_named_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine_alone.py").write_text("def f(): ...\n")
    with pytest.raises(ConfigError, match=r"beside the run file: write 'mine_alone\.py:NAME' for it"):
        rubric_from_config([{"kind": "python", "function": "mine_alone:f"}], folder=tmp_path)


def test_an_import_that_a_module_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking.py").write_text("import nowhere_at_all\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"No module named 'nowhere_at_all' \(line 1 of .*lacking\.py\)"):
        rubric_from_config([{"kind": "python", "function": "lacking:f"}])
    with pytest.raises(ConfigError, match=r"SyntaxError in line 1 of .*wrong\.py"):
        rubric_from_config([{"kind": "python", "function": "wrong:f"}])


def test_a_run_file_names_functions_relative_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "own.py").write_text("def score(completions, **_): return [0.0] * len(completions)\n")
    file = tmp_path / "runs" / "run.toml"
    file.write_text(
        'model = "m"\ndata.train.path = "t.jsonl"\n[[rubric]]\nkind = "python"\nfunction = "own.py:score"\n'
    )
    monkeypatch.chdir(tmp_path)
    run = load_run_file("runs/run.toml", [], "grpo")
    assert run.rubric is not None
    assert run.rubric.names == ("score",)
    with pytest.raises(ConfigError, match=r"rubric\[0\]: function = 'none.py:f': there is no file .*runs/none.py"):
        load_run_file("runs/run.toml", ["--rubric.0.function=none.py:f"], "grpo")
