"""False accepts and false rejects of three graders of mathematics on the labelled cases of tests/math_cases.json.

Usage: python benchmarks/math_verifier.py

The graders are burnish's `math_answer`, math-verify alone (`verify(parse(gold), parse(answer))` with both sides in
dollar signs) and `accuracy_reward` of TRL, which runs in .venv-trl and is given answers in a box, since it reads
nothing else. A grader that raises, times out or gives None accepts nothing; those are counted apart. Intervals are
Wilson's, at 95%.
"""

from __future__ import annotations

import json
import math
import platform
import select
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES, RESULTS = ROOT / "tests" / "math_cases.json", ROOT / "benchmarks" / "results" / "math_verifier.json"
TRL = r"""
from trl.rewards import accuracy_reward
def grade(gold, answer):
    answer = answer if "\\boxed" in answer else "\\boxed{" + answer + "}"
    gold = gold if "$" in gold else "$" + gold + "$"
    return accuracy_reward([[{"role": "assistant", "content": answer}]], [gold])[0]
"""
MATH_VERIFY = r"""
from math_verify import parse, verify
def grade(gold, answer):
    gold, answer = (t if "$" in t or "\\boxed" in t else "$" + t + "$" for t in (gold, answer))
    return float(verify(parse(gold), parse(answer)))
"""
LOOP = r"""
for line in sys.stdin:
    try:
        value = grade(*json.loads(line))
    except Exception as error:
        value = type(error).__name__
    print(json.dumps(value), flush=True)
"""
QUIET = "import json, logging, sys, warnings\nwarnings.simplefilter('ignore'); logging.disable(logging.CRITICAL)\n"
LIMIT_SECONDS = 20.0
"""Beyond the time limits of math-verify, which cannot interrupt a power of integers."""


def wilson(count: int, total: int) -> list[float]:
    """95% interval of a proportion."""
    if not total:
        return [0.0, 1.0]
    z, p = 1.959964, count / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return [round(max(0.0, (middle - half) / (1 + z * z / total)), 5), round((middle + half) / (1 + z * z / total), 5)]


def by_burnish(cases: list[dict[str, Any]]) -> list[Any]:
    from burnish.rewards import WorkerPool, math_answer

    pool = WorkerPool(num_workers=2)
    verifier = math_answer(sources=("text",), pool=pool)
    values = verifier(["p"] * len(cases), [c["answer"] for c in cases], answer=[c["gold"] for c in cases])
    pool.close()
    return [type(value).__name__ if isinstance(value, Exception) else value for value in values]


def by_process(python: Path | str, code: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Grade in a process of another interpreter, which is replaced where a case takes too long."""
    values: list[Any] = []
    while len(values) < len(cases):
        with subprocess.Popen(
            [python, "-W", "ignore", "-c", QUIET + code + LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            # The first answer waits for imports.
            limit = 300.0
            for case in cases[len(values) :]:
                process.stdin.write(json.dumps([case["gold"], case["answer"]]).encode() + b"\n")
                process.stdin.flush()
                if not select.select([process.stdout], [], [], limit)[0] or not (line := process.stdout.readline()):
                    values.append("TimeoutError")
                    process.kill()
                    break
                values.append(json.loads(line))
                limit = LIMIT_SECONDS
            else:
                process.stdin.close()
    return values


def rates(cases: list[dict[str, Any]], values: list[Any]) -> dict[str, Any]:
    """Counts and intervals of one grader."""
    pairs = list(zip(cases, values, strict=True))
    wrong = [v for c, v in pairs if not c["equal"]]
    right = [v for c, v in pairs if c["equal"]]
    accepted, rejected = sum(v == 1.0 for v in wrong), sum(v != 1.0 for v in right)
    return {
        "false_accepts": accepted,
        "wrong_answers": len(wrong),
        "false_accept_interval": wilson(accepted, len(wrong)),
        "false_rejects": rejected,
        "right_answers": len(right),
        "false_reject_interval": wilson(rejected, len(right)),
        "failed": sum(v is None or isinstance(v, str) for v in values),
    }


def main() -> None:
    cases: list[dict[str, Any]] = json.loads(CASES.read_text())["cases"]
    trl = ROOT / ".venv-trl" / "bin" / "python"
    version = "from importlib import metadata; print(*map(metadata.version, ('trl', 'math-verify')))"
    theirs = subprocess.run([trl, "-c", version], capture_output=True, text=True, check=True).stdout.split()
    values = {
        "burnish": by_burnish(cases),
        "math-verify": by_process(sys.executable, MATH_VERIFY, cases),
        "trl accuracy_reward": by_process(trl, TRL, cases),
    }
    kinds = list(dict.fromkeys(case["kind"] for case in cases))
    result = {
        "python": platform.python_version(),
        "versions": {
            "math-verify": metadata.version("math-verify"),
            "sympy": metadata.version("sympy"),
            "trl": theirs[0],
            "math-verify of trl": theirs[1],
        },
        "cases": len(cases),
        "all": {name: rates(cases, found) for name, found in values.items()},
        "kinds": {
            kind: {
                name: rates(
                    *zip(*[(c, v) for c, v in zip(cases, found, strict=True) if c["kind"] == kind], strict=True)
                )
                for name, found in values.items()
            }
            for kind in kinds
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def show(result: dict[str, Any]) -> None:
    """Print rates of all cases, then counts by kind."""
    for name, row in result["all"].items():
        accept = f"{row['false_accepts']:4} of {row['wrong_answers']} {row['false_accept_interval']}"
        reject = f"{row['false_rejects']:4} of {row['right_answers']} {row['false_reject_interval']}"
        print(f"{name:20} false accepts {accept}  false rejects {reject}  failed {row['failed']}")
    print(f"\n{'kind':16}" + "".join(f"{name:>24}" for name in result["all"]))
    for kind, rows in result["kinds"].items():
        shown = (
            f"{r['false_accepts']}/{r['wrong_answers']} {r['false_rejects']}/{r['right_answers']}"
            for r in rows.values()
        )
        print(f"{kind:16}" + "".join(f"{text:>24}" for text in shown))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    main()
