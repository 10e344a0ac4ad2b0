"""Every shipped file passes the checks that a run makes before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.cli.config import load_pipeline_file, load_run_file
from burnish.data import load_rows
from burnish.rewards import check_gold
from burnish.rewards.answers import extract_answer

OWN_DATA = Path(__file__).parent.parent / "examples" / "own_data.toml"  # trained in test_own_data.py
CALCULATOR = OWN_DATA.parent / "calculator.toml"
EXAMPLES = sorted(path for path in OWN_DATA.parent.glob("*.toml") if path not in (OWN_DATA, CALCULATOR))


def test_there_are_three_task_families() -> None:
    tasks = {load_pipeline_file(path, []).data.eval["task"] for path in EXAMPLES}  # type: ignore[index]
    assert len(tasks) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    file = load_pipeline_file(path, [])
    assert file.data.eval is not None
    assert file.data.eval["size"] >= 200
    assert file.stages["grpo"]["max_steps"] == 100


OFFLINE = sorted((Path(__file__).parent.parent / "examples" / "offline").glob("*.toml"))


@pytest.mark.parametrize("path", OFFLINE, ids=lambda path: path.stem)
def test_offline_example(path: Path) -> None:
    """Its own answers pass its rubric, and its demonstrations encode what they say."""
    file = load_pipeline_file(path, [])
    assert file.data.eval is not None
    held_out = load_rows(file.data.eval)
    assert not check_gold(file.rubric, held_out)
    for row in held_out:
        (message,) = row["completion"]
        answer = extract_answer(message["content"], sources=("tag", "last_number"))
        assert answer is not None
        assert float(answer) == float(row["answer"])


PREFERENCE = sorted((Path(__file__).parent.parent / "examples" / "preference").glob("*.toml"))


@pytest.mark.parametrize("path", PREFERENCE, ids=lambda path: path.stem)
def test_preference_example(path: Path) -> None:
    file = load_run_file(path, [], path.stem.partition("_")[2])  # type: ignore[arg-type]
    assert file.model.startswith("outputs/")


VLLM = sorted((Path(__file__).parent.parent / "examples" / "vllm").glob("*.toml"))


@pytest.mark.parametrize("path", VLLM, ids=lambda path: path.stem)
def test_vllm_example(path: Path) -> None:
    file = load_run_file(path, [], "grpo")
    assert (file.peft is not None) == (path.stem == "lora")
