"""Runs per second and latency of the sandbox: trivial programs, and answers judged by tests, at every isolation.

Usage: python benchmarks/sandbox.py [--runs 400]

Writes `results/sandbox.json`. The baseline starts an interpreter for each program, without any isolation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from burnish.errors import BurnishError
from burnish.rewards import Sandbox, WorkerPool
from burnish.rewards.sandbox.levels import LEVELS

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
ANSWER = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(0, 0) == 0"]


def timed(box: Sandbox, act: Callable[[], object], runs: int) -> dict[str, float]:
    """Run `act` on all workers, and return the rate and the latencies in milliseconds."""

    def once(_: int) -> float:
        start = time.perf_counter()
        act()
        return (time.perf_counter() - start) * 1e3

    for result in box.map(once, range(2 * box.num_workers)):
        if isinstance(result, Exception):
            raise result
    start = time.perf_counter()
    found = [float(value) for value in box.map(once, range(runs)) if not isinstance(value, Exception)]
    seconds = time.perf_counter() - start
    # Latencies include the wait for a worker, of which there are as many as threads.
    return {
        "runs_per_second": round(runs / seconds, 1),
        "median_ms": round(median(found), 2),
        "p95_ms": round(quantiles(found, n=20)[-1], 2),
    }


def measure(level: str, workers: int, runs: int) -> dict[str, Any]:
    """Measure one level."""
    start = time.perf_counter()
    box = Sandbox(num_workers=workers, isolation=level)
    isolation = box.isolation
    started = time.perf_counter() - start

    def program() -> None:
        assert box.run(PROGRAM, "1 2").stdout == "3\n"

    def judged() -> None:
        assert box.judge(ANSWER, TESTS).results == [1, 1, 1]

    row = {
        "isolation": isolation, "workers": workers, "trial_and_start_seconds": round(started, 3),
        "program": timed(box, program, runs), "tests": timed(box, judged, runs),
    }  # fmt: skip
    box.close()
    return row


def baseline(runs: int) -> dict[str, float]:
    """Start one interpreter per program, one at a time."""
    found: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-c", PROGRAM], input=b"1 2", capture_output=True, check=True)
        found.append((time.perf_counter() - start) * 1e3)
    return {"runs_per_second": round(1e3 * runs / sum(found), 1), "median_ms": round(median(found), 2)}


def worker_start(isolation: str) -> dict[str, float]:
    """Seconds until a grader's worker has answered for the first time, and then again."""
    pool, seconds = WorkerPool(num_workers=1, isolation=isolation), []
    assert pool.level
    for answer in ("y+y", "3y-y"):
        start = time.perf_counter()
        assert pool.map("math", [{"gold": "2y", "answer": answer}], timeout_seconds=60) == [1.0]
        seconds.append(round(time.perf_counter() - start, 3))
    pool.close()
    return {"first_seconds": seconds[0], "second_seconds": seconds[1]}


def main() -> None:
    """Measure every level that works here, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    options = parser.parse_args()
    cpu = next((x.partition(": ")[2] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    results: dict[str, Any] = {
        "cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
        "commit": commit.stdout.strip(), "load": os.getloadavg()[0], "superuser": os.geteuid() == 0,
        "interpreter_per_program": baseline(max(20, options.runs // 10)), "levels": [], "math_worker": {},
    }  # fmt: skip
    for level in LEVELS:
        for workers in sorted({1, os.cpu_count() or 1}):
            try:
                results["levels"].append(measure(level, workers, options.runs))
            except BurnishError as error:
                print(f"{level}: {error}")
                break
            print(json.dumps(results["levels"][-1]), flush=True)
    for isolation in ("auto", "none"):
        results["math_worker"][isolation] = worker_start(isolation)
    (ROOT / "benchmarks" / "results" / "sandbox.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: results[key] for key in ("interpreter_per_program", "math_worker")}))


if __name__ == "__main__":
    main()
