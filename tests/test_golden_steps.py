"""Three steps of every trainer give the numbers that are stored: a change of structure changes none of them.

What is meant to change them records them anew, and says so:

    PYTHONPATH=src python tests/golden_steps.py store
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import golden_steps

TOLERANCE = 1e-9
STORED: dict[str, Any] = json.loads(golden_steps.STORED.read_text())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them, in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_case_is_stored() -> None:
    assert set(STORED) == {*golden_steps.CASES, *(f"{name}@2" for name in golden_steps.RANKS)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", golden_steps.CASES)
def test_three_steps(name: str, tmp_path: Path, one_thread: None) -> None:
    found = json.loads(json.dumps(golden_steps.run(name, tmp_path, "float64")))
    assert golden_steps.differences(STORED[name], found, TOLERANCE) == []


@pytest.mark.slow
def test_three_steps_on_two_ranks(tmp_path: Path) -> None:
    words = [golden_steps.__file__, "record", str(tmp_path / "ranks.json"), "--dtype", "float64", "--ranks", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert set(found) == {name for name in STORED if "@" in name}
    for name, case in found.items():
        assert golden_steps.differences(STORED[name], case, TOLERANCE) == []


def test_a_difference_is_named() -> None:
    log, weights = {"loss": 1.0}, {"model.safetensors": {"sha256": "a", "sums": [1.0, 2.0]}}
    one = {"logs": [log], "weights": weights}
    assert golden_steps.differences(one, one, None) == []
    other = {"logs": [{"loss": 1.0 + 1e-6}], "weights": {"model.safetensors": {"sha256": "b", "sums": [1.0, 2.1]}}}
    assert [line.split(":")[0] for line in golden_steps.differences(one, other, None)] == [
        "log 0, loss",
        "model.safetensors",
    ]
    assert len(golden_steps.differences(one, other, TOLERANCE)) == 2
    assert len(golden_steps.differences(one, {"logs": [], "weights": {}}, TOLERANCE)) == 2
