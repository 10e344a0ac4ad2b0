"""The reference policy: adapters off, or a frozen copy of the model as it was given."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from burnish.errors import CheckFailed, ConfigError, ModelError
from burnish.model.adapters import without_adapters
from burnish.model.fingerprint import weights_fingerprint
from burnish.model.scoring import causal_lm, eval_mode, prepare_for_scoring
from burnish.model.traced import is_traced
from burnish.objectives.kl import kl_k3

__all__ = ["MovingReference", "Reference", "check_reference", "check_untrained", "refuse_shared_weights"]

logger = logging.getLogger(__name__)

_FILE = "reference.pt"
"""File of a synced reference in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A policy that does not train.

    Attributes:
        model: a separate model, or None to score with the policy's base.
        is_initial_policy: whether it must equal the policy before the first update.
        start: initial value of every trained weight, by name, where the policy's given adapters (or biases) are part
            of the reference; None where adapters are switched off.
        released: whether its weights have been freed, because its scores are precomputed.
    """

    model: torch.nn.Module | None
    is_initial_policy: bool
    start: dict[str, torch.Tensor] | None = None
    released: bool = False

    @classmethod
    def of(cls, policy: Any, ref_model: Any = None) -> Reference:
        """Create the reference of a policy.

        Without adapters it is a frozen copy. New adapters that change nothing yet are switched off instead, which
        gives the base bit for bit; for adapters that were trained before, or with other weights (biases) that train,
        the current values are stored.

        Args:
            policy: the policy before training.
            ref_model: a model to use instead.
        """
        if ref_model is not None:
            if causal_lm(ref_model) is causal_lm(policy):
                raise ModelError("ref_model is the model itself, which trains: remove it, and a frozen copy is made.")
            refuse_shared_weights(policy, ref_model, "ref_model")
            _warn_of_sizes(policy, ref_model)
            prepare_for_scoring(ref_model)
            # Not frozen: another trainer may train it, and it gets no gradients here.
            return cls(ref_model, is_initial_policy=False)
        if not (hasattr(policy, "peft_config") and hasattr(policy, "disable_adapter")):
            return cls(copy.deepcopy(policy).requires_grad_(False).eval(), is_initial_policy=True)
        if _trains_adapters_only(policy) and _adapters_change_nothing(policy):
            return cls(None, is_initial_policy=True)
        trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
        logger.info("the reference is the policy with its %d trained weights as they are now", len(trained))
        return cls(None, is_initial_policy=True, start=trained)

    @contextmanager
    def active(self, policy: Any) -> Generator[torch.nn.Module]:
        """Yield the model to score with, in evaluation mode."""
        assert not self.released
        model = policy if self.model is None else self.model
        with self._switched(policy), eval_mode(model):
            yield model

    def _switched(self, policy: Any) -> AbstractContextManager[Any]:
        if self.model is not None:
            return nullcontext()
        return without_adapters(policy) if self.start is None else _weights_of(policy, self.start)

    def save(self, folder: Path) -> None:
        """Save the weights of a synced reference into a checkpoint."""
        assert self.model is not None
        torch.save({name: weights.detach() for name, weights in self.model.named_parameters()}, folder / _FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote.

        Raises:
            ConfigError: the checkpoint has no reference.
        """
        assert self.model is not None
        if not (folder / _FILE).is_file():
            raise ConfigError(
                f"resume_from_checkpoint = {str(folder)!r}: {_FILE} is missing, so the synced reference of "
                "sync_ref_model cannot be restored. Resume from another checkpoint."
            )
        saved = torch.load(folder / _FILE, map_location="cpu", weights_only=True, mmap=True)
        for name, weights in self.model.named_parameters():
            weights.copy_(saved[name])

    def given_models(self) -> dict[str, torch.nn.Module]:
        """Return the reference if it was given as a separate model."""
        return {} if self.model is None or self.is_initial_policy else {"ref_model": self.model}

    def fingerprint(self, policy: Any) -> str:
        """Return the SHA-256 of the names, shapes and values of the reference's weights."""
        own = self.model is not None or self.start is not None
        with self.active(policy) as model:
            return weights_fingerprint(causal_lm(model), counts=lambda name: own or not _leaves(policy, name))


def _leaves(policy: Any, name: str) -> bool:
    """Return whether a weight is unused when adapters are switched off."""
    return any(part in name for part in (policy.base_model.prefix, "modules_to_save.", "trainable_tokens_"))


def _trains_adapters_only(policy: Any) -> bool:
    """Return whether every trained weight is unused when adapters are switched off."""
    return all(_leaves(policy, name) for name, p in policy.named_parameters() if p.requires_grad)


@torch.no_grad()
def _adapters_change_nothing(policy: Any) -> bool:
    """Return whether a short row has the same logits with and without adapters, bit for bit; in a trace, yes."""
    if is_traced(policy):
        return True
    embedding = policy.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    ids = (torch.arange(16, device=embedding.weight.device) * 7919 + 11)[None] % vocabulary
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with eval_mode(policy):
        on = policy(**inputs).logits
        with without_adapters(policy):
            return torch.equal(on, policy(**inputs).logits)


@contextmanager
def _weights_of(policy: torch.nn.Module, values: dict[str, torch.Tensor]) -> Generator[None]:
    """Replace some of a model's parameters inside."""
    parameters = dict(policy.named_parameters())
    if changed := [name for name, value in values.items() if parameters[name].shape != value.shape]:
        raise ModelError(
            f"{changed[0]}: {tuple(parameters[changed[0]].shape)} is not the shape {tuple(values[changed[0]].shape)} "
            "of the reference, as the model has been sharded since. Pass ref_model."
        )
    own = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value


class MovingReference(TrainerCallback):
    r"""Sync the reference with the policy every few steps: TR-DPO (2404.09656).

    .. math:: \pi_{ref} \leftarrow \alpha\,\pi + (1 - \alpha)\,\pi_{ref}

    Args:
        model: the reference's weights.
        alpha: weight of the policy, in (0, 1].
        every: optimizer steps between syncs.
        moved: called after each sync.
    """

    def __init__(self, model: torch.nn.Module, alpha: float, every: int, *, moved: Callable[[], object]) -> None:
        self._model, self._alpha, self._every, self._moved = model, alpha, every, moved

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Sync the reference if it is due."""
        if state.global_step % self._every:
            return
        for own, trained in zip(self._model.parameters(), causal_lm(model).parameters(), strict=True):
            own.lerp_(trained.detach().to(own.dtype), self._alpha)
        self._moved()


def check_reference(ref_model: Any) -> None:
    """Refuse a reference that is not a model, before any weight is read.

    Raises:
        ModelError: with its value.
    """
    if ref_model is not None and not isinstance(causal_lm(ref_model), PreTrainedModel):
        raise ModelError(
            f"ref_model = {ref_model!r:.60}: pass a model of transformers in memory, such as "
            "AutoModelForCausalLM.from_pretrained(...)."
        )


def refuse_shared_weights(policy: torch.nn.Module, other: torch.nn.Module, name: str) -> None:
    """Refuse a model that shares trained weights with the policy.

    Raises:
        ModelError: with the name of one of them.
    """
    own = {id(parameter) for parameter in other.parameters()}
    shared = [weight for weight, p in policy.named_parameters() if p.requires_grad and id(p) in own]
    if shared:
        raise ModelError(
            f"{name} = {type(other).__name__}: {len(shared)} of its weights ({shared[0]}) are the policy's, which "
            "train, so it would change with every step. Pass a copy (copy.deepcopy), or the folder of a saved model."
        )


def _warn_of_sizes(policy: Any, ref_model: Any) -> None:
    own, other = (causal_lm(model).get_input_embeddings().weight.shape[0] for model in (policy, ref_model))
    if own != other:
        logger.warning(
            "ref_model has %d embeddings and the model %d: its log-probabilities are only valid with the same "
            "tokenizer.",
            other,
            own,
        )


def check_untrained(logprobs_N: torch.Tensor, reference_N: torch.Tensor, *, bound: float) -> None:
    """Refuse a reference that differs from the policy before the first update.

    Raises:
        CheckFailed: they differ by more than `bound` nats a token.
    """
    divergence = float(kl_k3(logprobs_N, reference_N).mean())
    if not divergence <= bound:
        raise CheckFailed(
            f"before the first update the reference differs from the policy by {divergence:.3g} nats per token "
            f"(bound {bound:g}), so the KL term pulls towards another model. Pass the intended "
            "ref_model, or the unmodified policy."
        )
