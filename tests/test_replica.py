"""Replicas: every rank begins with the first's weights and buffers, or hears that it holds another model."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import tiny
from burnish.errors import CheckFailed
from burnish.training.replica import Replica
from test_trainers import sft


def model(rank: int = 0) -> Any:
    torch.manual_seed(rank)
    made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    made[1].running_mean.fill_(1.0 + rank)
    return made


def run(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    replica: Any = Replica(model(rank))
    torch.save(replica.module.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture
def alone() -> Generator[None]:
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_begin_with_what_the_first_holds(tmp_path: Path) -> None:
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(run, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in model().state_dict().items():
            assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("alone")
def test_every_tensor_comes_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: sent.append(tensor.data_ptr()))
    inner = model().eval()
    rows = torch.randn(4, 3)
    assert torch.equal(Replica(inner)(rows), inner(rows))
    assert sent == [tensor.data_ptr() for tensor in (*inner.parameters(), *inner.buffers())]


@pytest.mark.usefixtures("alone")
def test_other_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(found: list[Any], own: dict[str, Any]) -> None:
        found[:] = [own, {**own, "weight": ((4, 2), "torch.float32")}]

    monkeypatch.setattr(distributed, "all_gather_object", gathered)
    with pytest.raises(CheckFailed, match=r"weight is \(\(2, 2\), .* on rank 0 and \(\(4, 2\), .* on rank 1"):
        Replica(nn.Linear(2, 2))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_masters_average_is_a_replica(tmp_path: Path, dtype: torch.dtype) -> None:
    trainer = sft(tmp_path, tiny.model(dtype=dtype), bf16=dtype is torch.bfloat16)
    trainer.ranks.count = 2
    trainer.create_optimizer()
    if dtype is torch.float32:
        assert trainer.model_wrapped is trainer.model, "accelerate wraps it in DDP"
        return
    wrapped = trainer.model_wrapped
    assert isinstance(wrapped, Replica)
    assert wrapped.module is trainer.model
    trainer.create_optimizer()
    # What transformers does next, and leaves as it is.
    assert trainer._wrap_model(trainer.model_wrapped) is wrapped
