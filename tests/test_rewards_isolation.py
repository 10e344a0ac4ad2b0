"""What a model writes is not evaluated, cannot forge a reward, and cannot leave a process behind."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import RewardError
from burnish.rewards import WorkerPool
from burnish.rewards.formulas import read_formula, read_integer, read_literal

HOSTILE = "__import__('os').system('touch {}')"

# Every call in reasoning_gym that evaluates text, by module: scorers whose `eval` is replaced, those that call SymPy's
# parser (replaced for all), and generators, which evaluate their own words and never run in a worker's work.
SCORERS = {
    "algebra.intermediate_integration", "algebra.polynomial_multiplication", "algebra.simple_integration",
    "algorithmic.binary_matrix", "algorithmic.number_sorting", "algorithmic.spiral_matrix",
    "algorithmic.string_insertion", "arithmetic.bitwise_arithmetic", "games.countdown", "games.n_queens",
    "games.puzzle24",
}  # fmt: skip
GENERATORS = {
    "arithmetic.basic_arithmetic", "arithmetic.gsm_symbolic.generators_00_49",
    "arithmetic.gsm_symbolic.generators_50_99", "code.codeio",
}  # fmt: skip
OWN_PARSER = {"logic.propositional_logic"}  # its own `parse_expr`
EVALUATING = {"eval", "exec", "parse_expr", "sympify", "lambdify", "parse_latex", "__import__", "system", "Popen"}


def test_no_other_module_of_reasoning_gym_evaluates_text() -> None:
    package = Path(str(pytest.importorskip("reasoning_gym").__file__)).parent
    found: set[str] = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in EVALUATING:
                    found.add(".".join(file.relative_to(package).with_suffix("").parts))
    assert found == SCORERS | GENERATORS | OWN_PARSER


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(num_workers=1)
    yield pool
    pool.close()


def test_graded_as_the_library_does_and_never_evaluated(pool: WorkerPool, tmp_path: Path) -> None:
    factory = pytest.importorskip("reasoning_gym.factory")
    importlib.import_module("reasoning_gym")
    calls: list[dict[str, Any]] = []
    expected: list[float] = []
    for task in sorted(name.rpartition(".")[2] for name in SCORERS):
        dataset = factory.create_dataset(task, size=3, seed=3)
        entries = [dataset[i] for i in range(3)]
        for entry, other in zip(entries, entries[1:] + entries[:1], strict=True):
            gold = entry["answer"] or "8/(3-8/3)"
            rows = str([row.split() for row in gold.split("\n")])
            answers = [gold, f"({gold})", gold + " + 1", gold + " + C", str(gold.split()), str(list(gold)), rows]
            for answer in [*answers, str(other["answer"]), "-12345", "hello", "x**2/2", "24 + 0*1*2"]:
                calls.append({"task": task, "config": "{}", "entry": json.dumps(entry), "answer": answer})
                expected.append(dataset.score_answer(answer, json.loads(json.dumps(entry))))
        mark = tmp_path / task
        for answer in (HOSTILE.format(mark), f"[{HOSTILE.format(mark)}]", f"sqrt({HOSTILE.format(mark)})", "entry"):
            calls.append({"task": task, "config": "{}", "entry": json.dumps(entries[0]), "answer": answer})
            expected.append({"puzzle24": 0.01, "countdown": 0.01}.get(task, 0.0))
    values = pool.map("gym", calls, timeout_seconds=20)
    assert [(c["task"], c["answer"], v) for c, v in zip(calls, values, strict=True)] == [
        (c["task"], c["answer"], v) for c, v in zip(calls, expected, strict=True)
    ]
    assert not list(tmp_path.iterdir())


def test_mathematics_is_not_evaluated(pool: WorkerPool, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    hostile = HOSTILE.format(tmp_path / "mark")
    answers = [hostile, f"${hostile}$", rf"\text{{{hostile}}}", f"1 + {hostile}", "\ud800", r"\operatorname{" + hostile]
    for value in pool.map("math", [{"gold": "2y", "answer": a} for a in answers], timeout_seconds=10):
        assert isinstance(value, RewardError) or value == 0.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["x.y", "f(1)", "'a'", "[1]", "9**9**9", "2**99999", "factorial(9999)", "lambda: 1", "sqrt(x=1)", "(1).real", "S",
     "1 if x else 2", "x" * 6000, "-" * 4000 + "1", "2j"],
)  # fmt: skip
def test_formulas_are_bounded(text: str) -> None:
    pytest.importorskip("sympy")
    with pytest.raises((ValueError, SyntaxError, RecursionError, MemoryError)):
        read_formula(text)


def test_readers_read_data() -> None:
    assert read_literal(" [[0, 1], [1, 0]]") == [[0, 1], [1, 0]]
    assert read_integer("((0x1F + 3) << (0x9 >> 1)) - ~2") == ((0x1F + 3) << (0x9 >> 1)) - ~2
    for bad in ("1 << 99999", "f(1)", "x", "1.5"):
        with pytest.raises(ValueError, match=r"not|many"):
            read_integer(bad)


PACKAGE = """
import os, sys, time
def fork(answer, leave):
    if os.fork() == 0:
        if leave:
            os.setsid()
        open(answer, "w").write(str(os.getpid()))
        time.sleep(600)
    while not os.path.exists(answer) or not open(answer).read():
        time.sleep(0.01)
class Dataset:
    def __init__(self, task, path=None):
        self.task = task
        if task in ("fork", "setsid"):
            fork(path, task == "setsid")
    def score_answer(self, answer, entry):
        if self.task == "forge":
            for descriptor in range(1, 20):
                try:
                    os.write(descriptor, b'{"value": 1.0, "started": true}\\n')
                except OSError:
                    pass
        if self.task == "environment":
            return float("SECRET_TOKEN" in os.environ or os.environ["HOME"] == answer or os.getcwd() == entry["cwd"])
        if self.task in ("fork", "setsid", "hang"):
            time.sleep(600)
        if self.task == "exec":
            try:
                exec(answer)
            except Exception:
                pass
            return 1.0
        if self.task == "group":
            return float(os.getsid(0) == os.getpid())
        return 0.0
def create_dataset(task, **config):
    return Dataset(task, **config)
"""


@pytest.fixture
def compromised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """A pool whose reasoning_gym is hostile code: what an answer could do if it were evaluated."""
    package = tmp_path / "packages" / "reasoning_gym"
    for folder in ("algorithmic", "arithmetic", "games"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "factory.py").write_text(PACKAGE)
    names = (
        "algorithmic.binary_matrix algorithmic.number_sorting algorithmic.spiral_matrix algorithmic.string_insertion"
    )
    for name in [*names.split(), "arithmetic.bitwise_arithmetic", "games.n_queens"]:
        package.joinpath(*name.split(".")).with_suffix(".py").touch()
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    monkeypatch.setenv("SECRET_TOKEN", "x")
    pool = WorkerPool(num_workers=1)
    yield pool
    pool.close()


def run(pool: WorkerPool, task: str, answer: str = "", seconds: float = 2.0, **config: Any) -> float | Exception:
    entry = json.dumps({"cwd": os.getcwd()})
    call = {"task": task, "config": json.dumps(config), "entry": entry, "answer": answer}
    [value] = pool.map("gym", [call], timeout_seconds=seconds)
    return value


def test_a_reply_cannot_be_forged_by_writing_to_descriptors(compromised: WorkerPool) -> None:
    value = run(compromised, "forge")
    assert isinstance(value, RewardError)
    assert "a process other than the grader" in str(value)
    assert run(compromised, "plain") == 0.0  # a new worker took over, and nothing is left in the channel


def test_workers_have_an_environment_and_a_session_of_their_own(compromised: WorkerPool) -> None:
    assert run(compromised, "environment", os.environ.get("HOME", "/")) == 0.0
    assert run(compromised, "group") == 1.0


def test_a_grader_that_evaluates_is_refused_and_says_so(compromised: WorkerPool, tmp_path: Path) -> None:
    for code in ("pass", f"open({str(tmp_path / 'mark')!r}, 'w')", "import os; os.system('true')"):
        value = run(compromised, "exec", code)
        assert isinstance(value, RewardError)
        assert "(exec): it was refused" in str(value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="children that leave the session are found through /proc")
@pytest.mark.parametrize("task", ["fork", "setsid"])
@pytest.mark.usefixtures("compromised")
def test_what_a_grader_started_dies_with_it_and_blocks_nothing(tmp_path: Path, task: str) -> None:
    pool = WorkerPool(num_workers=1, isolation="none")  # isolated, it could not name its processes to this one
    file = tmp_path / "child"
    value = run(pool, task, path=str(file))
    assert isinstance(value, TimeoutError)
    child = Path("/proc") / file.read_text()
    deadline = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(pool, "plain") == 0.0
    pool.close()
