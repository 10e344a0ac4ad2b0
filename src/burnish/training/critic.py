"""The critic of PPO: values of rollouts, and an optimizer step on their returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from burnish.errors import CheckFailed
from burnish.model.adapters import saving_adapters
from burnish.model.checkpointing import enable_checkpointing
from burnish.model.classifier import reward_scores
from burnish.model.finite import check_finite
from burnish.model.masters import MasterWeights, average_gradients
from burnish.model.offload import offloading
from burnish.model.packing import pack, partition, split_by_tokens, unpack, zero_weight_group
from burnish.model.recomputation import tile_mlps
from burnish.model.scoring import continuing, eval_mode
from burnish.objectives.value import clipped_value_loss, explained_variance, moments
from burnish.training.checkpoint import writing_checkpoint
from burnish.training.step import scored_tokens
from burnish.types import Group, PackedBatch

__all__ = ["Critic"]

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def _alone(value: float) -> float:
    """Reduce a number over a single rank."""
    return value


class Critic:
    """A value model with its own optimizer, updated next to the policy.

    Policy and critic take turns: `values` and `update` leave no activations and no gradients behind, so a step needs
    the memory of the larger of the two updates and not of both. No wrapper synchronises the critic's gradients; it
    averages them over the ranks itself.

    Args:
        model: a model of `burnish.model.critic`; parameters that require a gradient are trained. It is moved to
            `device` and stays in evaluation mode between updates.
        learning_rate: peak learning rate.
        device: device of the model.
        make_optimizer: makes the optimizer from parameter groups; None for AdamW.
        weight_decay: weight decay of matrices; vectors are not decayed.
        max_grad_norm: largest norm of the gradient; 0 or None for no clipping.
        token_budget: most tokens of one forward and backward, prompts counted once per group; None for no limit.
        keeps_prompts: compute the prompt of a group that is cut once, where it is long enough.
        exact: fp32 values of parameters that the loader rounded.
        checkpointing: recompute activations in the backward pass.
        offloads: keep what the backward pass needs in host memory.
        mlp_tiles: parts of its tokens that a gated MLP computes one after another.
        pad_token_id: any token, for empty batches.
        sum_over_ranks: sums a number over all ranks.
        max_over_ranks: takes the maximum of a number over all ranks.
    """

    def __init__(
        self,
        model: Any,
        *,
        learning_rate: float,
        device: torch.device | str = "cpu",
        make_optimizer: MakeOptimizer | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
        keeps_prompts: bool = False,
        exact: dict[torch.nn.Parameter, torch.Tensor] | None = None,
        checkpointing: bool = False,
        offloads: bool = False,
        mlp_tiles: int = 1,
        pad_token_id: int = 0,
        sum_over_ranks: Callable[[float], float] = _alone,
        max_over_ranks: Callable[[float], float] = _alone,
    ) -> None:
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm or math.inf
        self.token_budget, self._keeps_prompts = token_budget, keeps_prompts
        self._sum, self._max = sum_over_ranks, max_over_ranks
        self._ranks = round(sum_over_ranks(1.0))
        self._filler = [_nothing(pad_token_id)]
        self._offloads = offloads
        if checkpointing:
            enable_checkpointing(model)
        tile_mlps(model, mlp_tiles)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = self._make_optimizer(make_optimizer or torch.optim.AdamW, weight_decay, exact or {})

    def _make_optimizer(
        self, make: MakeOptimizer, weight_decay: float, exact: dict[torch.nn.Parameter, torch.Tensor]
    ) -> torch.optim.Optimizer:
        groups = [
            {
                "params": [p for p in self._trained.values() if (p.ndim > 1) == decayed],
                "lr": self.learning_rate,
                "weight_decay": weight_decay * decayed,
            }
            for decayed in (True, False)
        ]
        if all(p.dtype.itemsize >= 4 for p in self._trained.values()):
            return make([group for group in groups if group["params"]])
        return MasterWeights(groups, make, exact)

    @torch.no_grad()
    def values(self, groups: Sequence[Group]) -> None:
        """Write the value of the state before each token into the stream `values` (0 at tokens that are not scored).

        Args:
            groups: this rank's groups; may be empty.

        Raises:
            CheckFailed: a value is not finite.
        """
        with eval_mode(self.model):
            for part in self._parts(groups, 1):
                batch = pack(part).to(self.device)
                with continuing(self.model, batch, reward_scores):
                    values = reward_scores(self.model, batch).tolist()
                if not all(map(math.isfinite, values)):
                    raise CheckFailed("the critic's values are not finite: look for a NaN in value_model.")
                completions = [completion for group in part for completion in group.completions]
                for completion, own in zip(completions, unpack(part, values), strict=True):
                    completion.token["values"] = own

    def update(
        self,
        groups: Sequence[Group],
        *,
        clip: float | None,
        vf_coef: float = 1.0,
        lr_factor: float = 1.0,
        num_batches: int = 1,
    ) -> dict[str, float]:
        r"""Take one optimizer step on the values and returns of this step's completions.

        .. math:: \frac{c_{vf}}{N} \sum_t \tfrac12 \max\big( (V_t - R_t)^2,
            (\mathrm{clip}(V_t, V_{old,t} - c, V_{old,t} + c) - R_t)^2 \big)

        with N the scored tokens of all ranks, so that the gradient is independent of every split.

        Args:
            groups: this rank's groups, with the streams `values` and `returns`; may be empty.
            clip: c, the clip range of values around the old ones; None for no clipping.
            vf_coef: weight of the loss. With a separate optimizer it only affects gradient clipping (and optimizers
                that do not normalise the gradient).
            lr_factor: learning rate of this step over the peak learning rate.
            num_batches: split the step into at least so many parts, as gradient accumulation does for the policy.

        Returns:
            Metrics over all tokens of all ranks, the same on every rank: `value/loss` (without vf_coef),
            `value/clip_ratio` (fraction of tokens without a gradient), `value/explained_variance` and `value/mean`
            (both of the old values, which the advantages were computed from), `value/grad_norm` (before clipping).

        Raises:
            CheckFailed: the gradient is not finite; the step is not taken.
        """
        count = self._sum(float(sum(scored_tokens(group) for group in groups)))
        scale = vf_coef * self._ranks / max(count, 1.0)
        sums = torch.zeros(9, dtype=torch.float64)
        self.model.train()
        try:
            for part in self._parts(groups, num_batches):
                sums += self._backward(pack(part).to(self.device), clip=clip, scale=scale)
            grad_norm = self._step(lr_factor)
        finally:
            self.model.eval()
            self.optimizer.zero_grad(set_to_none=True)
        loss, clipped, total, *rest = (self._sum(value) for value in sums.tolist())
        errors, returns = torch.tensor(rest, dtype=torch.float64).split(3)
        return {
            "value/loss": loss / max(count, 1.0),
            "value/clip_ratio": clipped / max(count, 1.0),
            "value/explained_variance": explained_variance(errors, returns),
            "value/mean": total / max(count, 1.0),
            "value/grad_norm": grad_norm,
        }

    def _parts(self, groups: Sequence[Group], num_batches: int) -> list[list[Group]]:
        """Split groups by the budget, into as many parts on every rank: a sharded model's forward is a collective."""
        batches = [batch for batch in partition(groups, num_batches) if batch]
        keeps = self._keeps_prompts
        parts = [part for batch in batches for part in split_by_tokens(batch, self.token_budget, keep_prompts=keeps)]
        return parts + [self._filler] * (int(self._max(len(parts))) - len(parts))

    def _backward(self, batch: PackedBatch, *, clip: float | None, scale: float) -> torch.Tensor:
        """Accumulate a part's gradient; return [9] sums: loss, clipped, old values, moments of errors and returns."""
        old_N, returns_N = batch.token["values"], batch.token["returns"]
        offload = offloading(self.model) if self._offloads else nullcontext()
        with offload, continuing(self.model, batch, reward_scores):
            values_N = reward_scores(self.model, batch)
            losses_N, clipped_N = clipped_value_loss(values_N, old_N, returns_N, clip=clip)
            (losses_N.sum() * scale).backward()
        first = torch.stack([x.detach().double().sum() for x in (losses_N, clipped_N, old_N)])
        return torch.cat((first, moments(returns_N - old_N), moments(returns_N))).cpu()

    def _step(self, lr_factor: float) -> float:
        norm = float(self._clip_gradients())
        if not math.isfinite(norm):
            raise CheckFailed(
                f"the gradient norm of the critic is {norm}; its step is not taken. Look for NaN rewards or values; a "
                "lower learning rate of the critic, or cliprange_value, helps where its loss diverged."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * lr_factor
        self.optimizer.step()
        return norm

    def _clip_gradients(self) -> torch.Tensor:
        """Average the gradients over ranks and clip them; return their norm before clipping."""
        if isinstance(self.optimizer, MasterWeights):
            if self._ranks > 1:
                self.optimizer.all_reduce_gradients()
            return self.optimizer.clip_gradients(self.max_grad_norm)
        trained = list(self._trained.values())
        if self._ranks > 1:
            average_gradients(trained)
        return torch.nn.utils.clip_grad_norm_(trained, self.max_grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """Return the trained weights by name, and the optimizer's state with its masters.

        Tensors are not copied; the state is equal on all ranks, so one of them saves it.
        """
        return {
            "weights": {name: p.detach() for name, p in self._trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckFailed: the state is of another critic.
        """
        weights: Mapping[str, torch.Tensor] = state["weights"]
        if {n: p.shape for n, p in self._trained.items()} != {n: w.shape for n, w in weights.items()}:
            raise CheckFailed(
                f"the checkpoint's critic trains {len(weights)} tensors and this one {len(self._trained)}, of other "
                "names or shapes: resume with the configuration that wrote it."
            )
        for name, parameter in self._trained.items():
            parameter.copy_(weights[name])
        self.optimizer.load_state_dict(dict(state["optimizer"]))

    def save(self, folder: str | Path) -> None:
        """Save the model: a sequence classifier for transformers, or adapters and score for peft.

        Raises:
            CheckFailed: a weight is not finite; nothing is written.
        """
        check_finite(self.model, "the critic")
        with writing_checkpoint(folder, "the critic"), saving_adapters(self.model, folder):
            self.model.save_pretrained(folder)

    def memory_bytes(self, policy: torch.nn.Module | None = None) -> dict[str, int]:
        """Return the bytes of the critic by component, without activations.

        Args:
            policy: the model that may share weights with it.

        Returns:
            `weights` (its own), `shared_weights` (counted with the policy), `masters` (what they take beside the
            weights) and `optimizer` (as they are now: optimizers make their states in the first step), and
            `gradients` (during `update` only; bf16 ones take twice the bytes after a second backward).
        """
        shared = set() if policy is None else {id(p) for p in policy.parameters()}
        own = [p for p in self.model.parameters() if id(p) not in shared]
        common = [p for p in self.model.parameters() if id(p) in shared]
        masters = self.optimizer.rests if isinstance(self.optimizer, MasterWeights) else []
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        named = {"weights": own, "shared_weights": common, "masters": masters, "optimizer": states}
        named["gradients"] = list(self._trained.values())
        return {name: _num_bytes(tensors) for name, tensors in named.items()}


def _nothing(token_id: int) -> Group:
    """Return a group with a zero loss and gradient."""
    group = zero_weight_group(token_id)
    group.completions[0].token = {"values": [0.0], "returns": [0.0]}
    return group


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
