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
from burnish.objectives.kl import kl_k3

__all__ = ["MovingReference", "Reference", "check_reference", "check_untrained", "refuse_shared_weights"]

logger = logging.getLogger(__name__)

_FILE = "reference.pt"
"""What a checkpoint holds of a reference that moves."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A policy that does not train.

    Attributes:
        model: a frozen model, or None where the policy's own base scores.
        is_initial_policy: whether it must equal the policy before the first update.
        start: what every trained weight was, by name, where the policy's adapters (or biases) as they were given are
            part of the reference; None where the adapters are switched off.
        released: whether its weights have left memory, because all it will be asked is known.
    """

    model: torch.nn.Module | None
    is_initial_policy: bool
    start: dict[str, torch.Tensor] | None = None
    released: bool = False

    @classmethod
    def of(cls, policy: Any, ref_model: Any = None) -> Reference:
        """The reference of a policy.

        Without adapters it is a frozen copy. New adapters that change nothing yet are switched off instead, which is
        the base bit for bit; adapters that have been trained before, or with which other weights train (biases), are
        remembered as they are now.

        Args:
            policy: the model that will train, as it is now.
            ref_model: a model to use instead.
        """
        if ref_model is not None:
            if causal_lm(ref_model) is causal_lm(policy):
                raise ModelError("ref_model is the model itself, which trains: leave it out, a frozen copy is made.")
            refuse_shared_weights(policy, ref_model, "ref_model")
            _warn_of_sizes(policy, ref_model)
            prepare_for_scoring(ref_model)
            # Not frozen: it may be the model of another trainer, and no gradient ever reaches it here.
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
        """The model to score with, in evaluation mode."""
        assert not self.released
        model = policy if self.model is None else self.model
        with self._switched(policy), eval_mode(model):
            yield model

    def _switched(self, policy: Any) -> AbstractContextManager[Any]:
        if self.model is not None:
            return nullcontext()
        return without_adapters(policy) if self.start is None else _weights_of(policy, self.start)

    def save(self, folder: Path) -> None:
        """Write the weights of a reference that moves into a checkpoint."""
        assert self.model is not None
        torch.save({name: weights.detach() for name, weights in self.model.named_parameters()}, folder / _FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Continue with the weights that `save` wrote.

        Raises:
            ConfigError: the checkpoint has none.
        """
        assert self.model is not None
        if not (folder / _FILE).is_file():
            raise ConfigError(
                f"resume_from_checkpoint = {str(folder)!r}: {_FILE} is missing, so where the reference of "
                "sync_ref_model has moved to is unknown. Resume from another checkpoint."
            )
        saved = torch.load(folder / _FILE, map_location="cpu", weights_only=True, mmap=True)
        for name, weights in self.model.named_parameters():
            weights.copy_(saved[name])

    def given_models(self) -> dict[str, torch.nn.Module]:
        """The reference where it is a model of its own, and no copy of the policy."""
        return {} if self.model is None or self.is_initial_policy else {"ref_model": self.model}

    def fingerprint(self, policy: Any) -> str:
        """SHA-256 over the names, shapes and values of every weight that scores."""
        own = self.model is not None or self.start is not None
        with self.active(policy) as model:
            return weights_fingerprint(causal_lm(model), counts=lambda name: own or not _leaves(policy, name))


def _leaves(policy: Any, name: str) -> bool:
    """Whether a weight leaves the forward when adapters are switched off."""
    return any(part in name for part in (policy.base_model.prefix, "modules_to_save.", "trainable_tokens_"))


def _trains_adapters_only(policy: Any) -> bool:
    """Whether every trained weight leaves the forward when adapters are switched off."""
    return all(_leaves(policy, name) for name, p in policy.named_parameters() if p.requires_grad)


@torch.no_grad()
def _adapters_change_nothing(policy: Any) -> bool:
    """Whether a short row has the same logits with and without adapters, bit for bit."""
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
    """Other values in some of a model's parameters; its own come back at the end."""
    parameters = dict(policy.named_parameters())
    if changed := [name for name, value in values.items() if parameters[name].shape != value.shape]:
        raise ModelError(
            f"{changed[0]}: {tuple(parameters[changed[0]].shape)} is not the shape {tuple(values[changed[0]].shape)} "
            "that the reference remembers: the model was sharded since. Pass ref_model."
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
    r"""TR-DPO (2404.09656): every few steps the reference moves towards the policy.

    .. math:: \pi_{ref} \leftarrow \alpha\,\pi + (1 - \alpha)\,\pi_{ref}

    Args:
        model: the reference's weights.
        alpha: share of the policy, in (0, 1].
        every: optimizer steps between moves.
        moved: called after each move.
    """

    def __init__(self, model: torch.nn.Module, alpha: float, every: int, *, moved: Callable[[], object]) -> None:
        self._model, self._alpha, self._every, self._moved = model, alpha, every, moved

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Move, when it is time."""
        if state.global_step % self._every:
            return
        for own, trained in zip(self._model.parameters(), causal_lm(model).parameters(), strict=True):
            own.lerp_(trained.detach().to(own.dtype), self._alpha)
        self._moved()


def check_reference(ref_model: Any) -> None:
    """Refuse a reference that is no model, before any weight is read.

    Raises:
        ModelError: naming it.
    """
    if ref_model is not None and not isinstance(causal_lm(ref_model), PreTrainedModel):
        raise ModelError(
            f"ref_model = {ref_model!r:.60}: pass a model of transformers in memory, such as "
            "AutoModelForCausalLM.from_pretrained(...)."
        )


def refuse_shared_weights(policy: torch.nn.Module, other: torch.nn.Module, name: str) -> None:
    """Refuse a model that would change with the policy, because it holds weights that train.

    Raises:
        ModelError: naming one of them.
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
            "ref_model has %d embeddings and the model %d: its log-probabilities mean something only under the same "
            "tokenizer.",
            other,
            own,
        )


def check_untrained(logprobs_N: torch.Tensor, reference_N: torch.Tensor, *, bound: float) -> None:
    """Refuse a reference that is meant to be the policy before its first update, and is another model.

    Raises:
        CheckFailed: they differ by more than `bound` nats a token.
    """
    apart = float(kl_k3(logprobs_N, reference_N).mean())
    if not apart <= bound:
        raise CheckFailed(
            f"before the first update the reference differs from the policy by {apart:.3g} nats a token "
            f"(bound {bound:g}), so the KL term pulls towards another model. Pass the intended "
            "ref_model, or the unmodified policy."
        )
