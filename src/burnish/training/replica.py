"""Data parallelism of a model whose gradients its optimizer averages: DDP without the buckets that would do it."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn

from burnish.errors import CheckFailed

__all__ = ["Replica"]


class Replica(nn.Module):
    """A model that each rank holds whole, with the parameters and buffers of the first.

    It does what `DistributedDataParallel` does where every pass runs under `no_sync`, and allocates nothing: DDP's
    reducer makes buckets of the size of all gradients, used or not.

    Args:
        module: the model, prepared for the device; every rank must call it.

    Raises:
        CheckFailed: the ranks hold different models.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        _check_equal({name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()})
        for tensor in tensors.values():
            distributed.broadcast(tensor.data, src=0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.module(*args, **kwargs)


def _check_equal(own: dict[str, tuple[tuple[int, ...], str]]) -> None:
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    for rank, other in enumerate(found):
        if differing := [name for name in {**own, **other} if own.get(name) != other.get(name)]:
            name = differing[0]
            raise CheckFailed(
                f"{name} is {own.get(name)} on rank {distributed.get_rank()} and {other.get(name)} on rank {rank}: "
                "the ranks hold different models. Start them with the same model and settings."
            )
