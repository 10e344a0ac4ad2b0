"""Activation checkpointing by either of the names that versions of transformers give it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import tiny
from burnish.model.checkpointing import (
    checkpointing_field,
    disable_checkpointing,
    enable_checkpointing,
    is_checkpointed,
)


class Model(torch.nn.Module):
    """Has the methods of some versions, which note their calls."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.calls: list[Any] = []
        for name in names:
            self.has(name)

    def has(self, name: str) -> None:
        setattr(self, f"{name}_enable", lambda kwargs: self.calls.append((name, kwargs)))
        setattr(self, f"{name}_disable", lambda: self.calls.append(name))


OLD, NEW = "gradient_checkpointing", "activation_checkpointing"


@pytest.mark.parametrize(("names", "used"), [((OLD,), OLD), ((OLD, NEW), NEW), ((NEW,), NEW)])
def test_the_newer_name_is_used_where_it_exists(names: tuple[str, ...], used: str) -> None:
    """5.17 has the older one only, and 5.23 both."""
    model = Model(*names)
    enable_checkpointing(model)
    disable_checkpointing(model)
    assert model.calls == [(used, {"use_reentrant": False}), used]
    # A field that is there and off is the one to set.
    assert checkpointing_field(SimpleNamespace(**dict.fromkeys(names, False))) == used


def test_the_installed_version_takes_both_switches_and_has_the_field() -> None:
    model = tiny.model()
    assert not is_checkpointed(model)
    enable_checkpointing(model)
    assert is_checkpointed(model)
    disable_checkpointing(model)
    assert not is_checkpointed(model)
    assert checkpointing_field(TrainingArguments) in vars(TrainingArguments)


def test_only_the_flag_itself_counts() -> None:
    """Remote code may have a function of that name."""
    model = torch.nn.Sequential(torch.nn.Identity())
    model[0].gradient_checkpointing = print  # pyright: ignore[reportAttributeAccessIssue]
    assert not is_checkpointed(model)
    model[0].gradient_checkpointing = True
    assert is_checkpointed(model)
