"""Rows that never end are refused before the first is read, wherever all of them would be."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from burnish.errors import ConfigError
from test_nonsense import build, good, plain

STAGES = ("sft", "dpo", "kto", "reward", "online_dpo", "grpo")


def endless(stage: str, form: str) -> Any:
    def rows() -> Any:
        raise AssertionError("a row was asked for")
        yield plain(stage)

    return {"generator": rows, "data set": lambda: IterableDataset.from_generator(rows), "count": lambda: map(plain, itertools.repeat(stage))}[form]()  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("form", ["generator", "data set", "count"])
@pytest.mark.parametrize("field", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("stage", STAGES)
def test_rows_without_a_length_are_not_read(tmp_path: Path, stage: str, field: str, form: str) -> None:
    if (stage, field) == ("sft", "train_dataset"):
        pytest.skip("read as it comes")
    train = endless(stage, form) if field == "train_dataset" else good(stage)
    more = {} if field == "train_dataset" else {field: endless(stage, form)}
    with pytest.raises(
        ConfigError, match=f"^{field} = .* has no length, and reading it whole may never end: pass a list"
    ):
        build(stage, tmp_path, train, **more)
