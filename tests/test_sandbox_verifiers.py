"""SQL by its result, blocks of code as a source of answers, and the sandbox's verifiers in a rubric."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from burnish.errors import ConfigError, RewardError
from burnish.rewards import (
    Criterion,
    Limits,
    Rubric,
    Sandbox,
    check_gold,
    code_answer,
    extract_answer,
    rubric_from_config,
    sql_answer,
)
from burnish.rewards.sandbox.sql import is_ordered
from burnish.types import Completion, Group

SCHEMA = """
CREATE TABLE t (a INTEGER, b TEXT, c REAL);
INSERT INTO t VALUES (1, 'x', 0.1), (2, 'y', 0.2), (2, 'y', 0.2), (NULL, 'z', 1e300);
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    box = Sandbox(num_workers=1)
    try:
        assert box.level
    except ConfigError as error:
        pytest.skip(str(error))
    yield box
    box.close()


def block(text: str) -> str:
    return f"So:\n```sql\n{text}\n```\n"


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("SELECT a, b FROM t", "select a, b from t order by b desc;", 1.0),
        ("SELECT a, b FROM t", "SELECT DISTINCT a, b FROM t", 0.0),  # a multiset
        ("SELECT a, b FROM t", "SELECT b, a FROM t", 0.0),
        ("SELECT a FROM t ORDER BY b", "SELECT a FROM t ORDER BY b DESC", 0.0),
        ("SELECT a FROM t ORDER BY b", "SELECT a AS other FROM t ORDER BY b", 1.0),
        ("SELECT SUM(c) FROM t WHERE a < 3", "SELECT 0.5", 1.0),
        ("SELECT COUNT(*) FROM t", "SELECT 4.0", 1.0),
        ("SELECT a FROM t WHERE b = 'none'", "DELETE FROM t", 0.0),  # an empty result must be one
        ("SELECT a FROM t WHERE b = 'none'", "SELECT 1 WHERE 0", 1.0),
        ("SELECT 1", "DROP TABLE t; SELECT 1", 0.0),
        ("SELECT 1", "SELEC 1", 0.0),
        ("SELECT 1", "ATTACH '/etc/passwd' AS p", 0.0),
        ("SELECT 1", "SELECT load_extension('x')", 0.0),
        ("SELECT 1", "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n", 0.0),
        ("SELECT 1", "SELECT zeroblob(999999999) || randomblob(999999999)", 0.0),
        ("SELECT 1", "SELECT writefile('x', 'y')", 0.0),
    ],
)
def test_sql(box: Sandbox, gold: str, answer: str, expected: float) -> None:
    verify = sql_answer(sandbox=box, timeout_seconds=1.5, memory_mib=256)
    assert verify(["p"], [block(answer)], query=[gold], schema=[SCHEMA]) == [expected]


def test_a_gold_query_that_fails_is_no_fault_of_the_answer(box: Sandbox) -> None:
    for gold in ("SELECT nope FROM t", "DELETE FROM t"):
        [value] = sql_answer(sandbox=box)(["p"], [block("SELECT 1")], query=[gold], schema=[SCHEMA])
        assert isinstance(value, RewardError)
        assert "the gold query in column 'query' failed" in str(value)
    rows = [{"query": "SELECT a FROM t ORDER BY b", "schema": SCHEMA}, {"query": "SELECT x", "schema": SCHEMA}]
    [failure] = check_gold(Rubric([Criterion("sql", sql_answer(sandbox=box))]), rows)
    assert failure.index == 1


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT a FROM t ORDER  BY a", True),
        ("select a from t order\nby a limit 3", True),
        ("SELECT RANK() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'order by' FROM t -- order by", False),
        ("SELECT * FROM (SELECT a FROM t ORDER BY a)", False),
    ],
)
def test_order_of_a_query(query: str, expected: bool) -> None:
    assert is_ordered(query) is expected


def test_blocks_of_code() -> None:
    text = "a\n```python\nx = 1\n```\nthen\n  ```\n  y = 2\n  ```\n```python\nunclosed"
    assert extract_answer(text, sources=["block"]) == "y = 2"
    assert extract_answer("```\n```", sources=["block"]) is None
    assert extract_answer("``` inline ```", sources=["block"]) is None


def test_solutions_pass_their_own_tests(box: Sandbox) -> None:
    rows = [
        {"tests": json.dumps(["assert f(1) == 2"]), "code": "def f(x):\n    return x + 1"},
        {"tests": ["assert f(1) == 3"], "code": "def f(x):\n    return x + 1"},
        {"tests": [{"input": "1", "output": "2"}], "code": "print(int(input()) + 1)"},
        {"tests": ["assert f(1) == 3"], "code": None},
    ]
    verify = code_answer(sandbox=box, solution_column="code")
    assert [f.index for f in check_gold(Rubric([Criterion("code", verify)]), rows)] == [1]


def test_in_a_rubric_from_a_file() -> None:
    rubric = rubric_from_config([{"kind": "code", "partial_credit": True, "timeout_seconds": 2, "isolation": "none"}])
    group = Group([1], [Completion([1], text="```\nf = abs\n```")], {"prompt": "p", "tests": ["assert f(-1) == 1"]})
    if sys.platform == "win32":
        pytest.skip("runs need fork")
    [[score]] = rubric.score([group])
    assert score.total == 1.0
    for option in ({"isolation": "jail"}, {"failures": "x"}, {"memory_mib": 0}, {"timeout_seconds": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            rubric_from_config([{"kind": "code", **option}])
    with pytest.raises(ConfigError, match="sandbox"):
        rubric_from_config([{"kind": "code", "sandbox": 1}])


def test_limits_are_checked() -> None:
    for bad in ({"wall_seconds": 0}, {"memory_bytes": -1}, {"processes": True}, {"wall_seconds": float("inf")}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Limits(**bad)
