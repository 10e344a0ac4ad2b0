"""Rubrics from configuration tables."""

from __future__ import annotations

from typing import Any

import pytest

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
    }
    for kind in CRITERIA:
        assert len(rubric_from_config([{"kind": kind, **needed.get(kind, {})}]).criteria) == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"kind": "maht"}, r"rubric\[0\]\.kind = 'maht': did you mean 'math'\? Use one of: exact, format"),
        ({"weight": 1}, "kind = None"),
        ({"kind": "math", "timeout": 3}, r"rubric\[0\]\.timeout = 3 .* did you mean 'timeout_seconds'"),
        ({"kind": "math", "pool": 3}, "pool = 3 is no option"),
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
        ({"kind": "python", "function": "math:no_such"}, "cannot be imported"),
        ({"kind": "python", "function": "math:pi"}, "name something that can be called"),
        ({"kind": "python", "function": "math:prod", "options": 1}, "options = 1: use a table"),
    ],
)
def test_errors_name_key_value_and_fix(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rubric_from_config([entry])


def test_names_are_unique() -> None:
    with pytest.raises(ConfigError, match="share the name 'exact'"):
        rubric_from_config([{"kind": "exact"}, {"kind": "exact"}])
