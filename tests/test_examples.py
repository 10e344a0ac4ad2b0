"""Every shipped file passes the checks that a run makes before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.cli.config import load_pipeline_file, load_run_file

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))


def test_there_are_three_task_families() -> None:
    tasks = {load_pipeline_file(path, []).data.eval["task"] for path in EXAMPLES}  # type: ignore[index]
    assert len(tasks) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    file = load_pipeline_file(path, [])
    assert file.data.eval is not None
    assert file.data.eval["size"] >= 200
    assert file.grpo is not None
    assert file.grpo["max_steps"] == 100


PREFERENCE = sorted((Path(__file__).parent.parent / "examples" / "preference").glob("*.toml"))


@pytest.mark.parametrize("path", PREFERENCE, ids=lambda path: path.stem)
def test_preference_example(path: Path) -> None:
    file = load_run_file(path, [], path.stem.partition("_")[2])  # type: ignore[arg-type]
    assert file.model.startswith("outputs/")
