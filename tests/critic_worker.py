"""Updates a tiny critic under whatever launcher started it and saves its weights: run by test_critic.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed

import tiny
from test_critic import critic, made, with_returns


def reduced(value: float, operation: distributed.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor([value], dtype=torch.float64)
    if distributed.is_initialized():
        distributed.all_reduce(tensor, operation)
    return float(tensor)


def main(form: str, dtype: str, folder: Path) -> None:
    """Three steps; the second rank has fewer groups, and in the last step none."""
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    own = critic(
        made(form, dtype=getattr(torch, dtype))[0],
        token_budget=20,
        max_grad_norm=0.5,
        sum_over_ranks=lambda value: reduced(value, distributed.ReduceOp.SUM),
        max_over_ranks=lambda value: reduced(value, distributed.ReduceOp.MAX),
    )
    start = tiny.exact_weights(own.optimizer)
    shares = [rows if world == 1 else ([rows[:3], rows[3:]] if step < 2 else [rows, []])[rank]
              for step, rows in enumerate(map(with_returns, range(3)))]  # fmt: skip
    metrics = [own.update(rows, clip=0.2, vf_coef=0.5) for rows in shares]
    weights = tiny.exact_weights(own.optimizer)
    torch.save({"start": start, "weights": weights, "metrics": metrics}, folder / f"{world}_{rank}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
