"""Two ranks take the step that one rank takes: denominators are global, groups may lie on both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.runs.files import read_json_lines

WORKER = Path(__file__).parent / "rank_worker.py"


def start(folder: Path, stage: str, per_device: int, dtype: str, ranks: int, resume: str = "") -> Any:
    """Run the worker to its end, however it ends."""
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [str(WORKER), stage, str(folder), str(per_device), dtype, *([resume] if resume else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*(launcher if ranks > 1 else [sys.executable]), *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def run(folder: Path, stage: str, per_device: int, dtype: str, ranks: int, resume: str = "") -> dict[str, Any]:
    done = start(folder, stage, per_device, dtype, ranks, resume)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# 6 completions a rank: the second of three groups of 4 lies on both ranks.
@pytest.mark.parametrize(
    ("stage", "per_device"),
    [
        ("sft", 4), ("stream", 4), ("reward", 3), ("dpo", 3), ("kto", 3), ("grpo", 6), ("dapo", 6), ("dynamic", 6),
        ("ppo", 6), ("episodes", 6), ("pieces", 3),
    ],
)  # fmt: skip
def test_one_rank_is_two_ranks(tmp_path: Path, stage: str, per_device: int, dtype: str) -> None:
    one = run(tmp_path / "one", stage, 2 * per_device, dtype, 1)
    two = run(tmp_path / "two", stage, per_device, dtype, 2)
    # Masters average their own gradients, and DDP's buckets would not be used.
    assert two["wrapper"] == ("DistributedDataParallel" if dtype == "float32" else "Replica")
    # What two ranks may get wrong is the update, so that is the yardstick. bf16 weights make the rounding of a gradient
    # depend on the batch it is computed in; masters see its average.
    steps = [(b - a).double().norm() for a, b in zip(one["start"], one["weights"], strict=True)]
    gaps = [(b - a).double().norm() for a, b in zip(one["weights"], two["weights"], strict=True)]
    for left, right in zip(one["start"], two["start"], strict=True):
        assert torch.equal(left, right)
    ratio = float(torch.stack(gaps).norm() / torch.stack(steps).norm())
    assert 0 <= ratio < (1e-4 if dtype == "float32" else 0.05), ratio
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    for left, right in zip(one["weights"], two["weights"], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)
    for left, right in zip(one["logs"], two["logs"], strict=True):
        assert left == pytest.approx(right, abs=1e-4 if dtype == "float32" else 5e-2)
    # Each rank samples a part of a round; the transcripts hold all of it, in one order, with the same samples.
    names = ("step", "prompt_index", "sample", "prompt", "completion")
    rows = [
        [[record[name] for name in names] for record in read_json_lines(tmp_path / ranks / "transcripts.jsonl")]
        for ranks in ("one", "two")
    ]
    assert rows[0] == rows[1]
    assert bool(rows[0]) == (stage in ("grpo", "dapo", "dynamic", "ppo", "episodes", "pieces"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Four steps of GRPO on two ranks, two to a rollout, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    return folder, run(folder, "grpo+", 6, "float32", 2)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])
def test_two_ranks_resume_to_the_bit(tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]], step: int) -> None:
    """Samples in flight (steps 1 and 3) stay with the rank that holds them; records have no gap and no double."""
    folder, expected = uninterrupted
    mine = tmp_path / "run"
    shutil.copytree(folder, mine)
    (mine / "result.pt").unlink()
    found = run(mine, "grpo+", 6, "float32", 2, str(mine / f"checkpoint-{step}"))
    for left, right in zip(expected["weights"], found["weights"], strict=True):
        assert torch.equal(left, right)
    rows = [[_without_time(r) for r in read_json_lines(place / "transcripts.jsonl")] for place in (folder, mine)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 48


def _without_time(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "time"}


@pytest.mark.slow
def test_one_rank_goes_on_only_where_no_sample_is_in_flight(
    tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = uninterrupted
    shutil.copytree(folder, tmp_path / "refused")
    done = start(tmp_path / "refused", "grpo+", 12, "float32", 1, str(tmp_path / "refused" / "checkpoint-3"))
    assert done.returncode != 0
    assert "2 processes have samples in flight and 1 would continue" in done.stderr
    shutil.copytree(folder, tmp_path / "taken")
    run(tmp_path / "taken", "grpo+", 12, "float32", 1, str(tmp_path / "taken" / "checkpoint-2"))
    # What a step of the two trains on depends on the ranks; what the next rollout samples does not.
    names = ("step", "prompt_index", "sample", "completion", "reward")
    rows = [
        [[record[name] for name in names] for record in read_json_lines(place / "transcripts.jsonl")]
        for place in (folder, tmp_path / "taken")
    ]
    assert rows[0] == rows[1]
    assert {row[0] for row in rows[0]} == {1, 3}
