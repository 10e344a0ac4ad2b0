"""The reference policy: adapters off, or a frozen copy of the model as it was given."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from burnish.errors import ModelError
from burnish.model.scoring import causal_lm, eval_mode, prepare_for_scoring

logger = logging.getLogger(__name__)

__all__ = ["MovingReference", "Reference", "check_reference"]


@dataclass(frozen=True, slots=True)
class Reference:
    """A policy that does not train.

    Attributes:
        model: a frozen model, or None where the policy with its adapters off is the reference.
        is_initial_policy: whether it must equal the policy before the first update.
        released: whether its weights have left memory, because all it will be asked is known.
    """

    model: torch.nn.Module | None
    is_initial_policy: bool
    released: bool = False

    @classmethod
    def of(cls, policy: Any, ref_model: Any = None) -> Reference:
        """The reference of a policy.

        Args:
            policy: the model that will train, as it is now.
            ref_model: a model to use instead.

        Raises:
            ModelError: adapters that train biases, which stay changed when the adapters are off.
        """
        if ref_model is not None:
            if causal_lm(ref_model) is causal_lm(policy):
                raise ModelError("ref_model is the model itself, which trains: leave it out, a frozen copy is made.")
            _warn_of_sizes(policy, ref_model)
            prepare_for_scoring(ref_model)
            return cls(_frozen(ref_model), is_initial_policy=False)
        configs = getattr(policy, "peft_config", None)
        if configs is None or not hasattr(policy, "disable_adapter"):
            return cls(_frozen(copy.deepcopy(policy)), is_initial_policy=True)
        for name, config in configs.items():
            bias = getattr(config, "bias", "none")
            if bias != "none":
                raise ModelError(
                    f"peft_config.bias = {bias!r} (adapter {name!r}): trained biases stay changed with adapters off, "
                    "so the base is no reference. Use bias='none', or pass ref_model."
                )
        return cls(None, is_initial_policy=True)

    @contextmanager
    def active(self, policy: Any) -> Generator[torch.nn.Module]:
        """The model to score with, in evaluation mode."""
        assert not self.released
        model = policy if self.model is None else self.model
        with policy.disable_adapter() if self.model is None else nullcontext(), eval_mode(model):
            yield model

    def fingerprint(self, policy: Any) -> str:
        """SHA-256 over the names, shapes and values of every weight that scores."""
        digest = hashlib.sha256()
        with self.active(policy) as model:
            for name, weight in sorted(causal_lm(model).state_dict().items()):
                if self.model is not None or "lora_" not in name:
                    digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
                    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


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


def _warn_of_sizes(policy: Any, ref_model: Any) -> None:
    own, other = (causal_lm(model).get_input_embeddings().weight.shape[0] for model in (policy, ref_model))
    if own != other:
        logger.warning(
            "ref_model has %d embeddings and the model %d: its log-probabilities mean something only under the same "
            "tokenizer.",
            other,
            own,
        )


def _frozen(model: Any) -> Any:
    return model.requires_grad_(False).eval()
