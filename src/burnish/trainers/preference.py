"""Learning from comparisons under a reference: DPO and its family on pairs."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from burnish.data import encode_rows, finite_rows, preference_group
from burnish.errors import CheckFailed, ConfigError, DataError, user_code
from burnish.model.packing import pack
from burnish.model.positions import check_lengths
from burnish.model.scoring import causal_lm, eval_mode, score
from burnish.objectives.aggregate import sequence_sums
from burnish.objectives.preference import (
    PREFERENCE_LOSSES,
    Pairs,
    PreferenceLoss,
    PreferenceOptions,
    pair_metrics,
    pairs_of,
)
from burnish.trainers.configs import DPOConfig
from burnish.training.arguments import refuse_arguments, resolve_args, with_quantization
from burnish.training.base import GroupTrainer
from burnish.training.checks import check_vocabulary, resolve_tokenizer
from burnish.training.held_out import encode_sets, named_sets
from burnish.training.reference import MovingReference, Reference, check_reference
from burnish.training.reference_sums import ReferenceSums
from burnish.types import Completion, Group, PackedBatch

__all__ = ["DPOTrainer", "ReferenceTrainer"]

logger = logging.getLogger(__name__)

_OTHER_ROWS = "other rows"
"""Key of what the reference says of rows that only evaluate() was given."""


class ReferenceTrainer(GroupTrainer):
    """What DPO and KTO share: whole groups, log-probabilities of sequences under policy and reference."""

    args: Any
    whole_groups = True
    encoder: ClassVar[Callable[..., Group]]
    columns: ClassVar[str]
    config_class: ClassVar[type[Any]]

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: Any = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        refuse_arguments(data_collator=data_collator)
        self.metrics_of_rewards = compute_metrics
        args = with_quantization(resolve_args(args, self.config_class), model, quantization_config)
        check_reference(ref_model)
        if train_dataset is None:
            raise DataError(f"train_dataset = None: pass rows with {self.columns}.")
        needs_reference = self.needs_reference(args)
        if ref_model is not None and not needs_reference:
            raise ConfigError(f"loss_type = {args.loss_type!r} reads no reference: remove ref_model.")
        self.args = args
        self.tokenizer = resolve_tokenizer(model, processing_class, args)
        super().__init__(
            model,
            args,
            processing_class=self.tokenizer,
            train_dataset=self.encode(train_dataset, "train_dataset"),
            eval_dataset=encode_sets(eval_dataset, self.encode),
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference = Reference.of(self.model, ref_model) if needs_reference else None
        if ref_model is not None:
            name = "ref_model on train_dataset"
            check_vocabulary(ref_model, self.train_dataset, name)
            check_lengths(causal_lm(ref_model), self.train_dataset, name, "set max_length")
        self._known = {name: ReferenceSums() for name in ("train", *named_sets(self.eval_dataset))}
        self._evaluated = _OTHER_ROWS
        """The key of the data set that is being evaluated."""
        if args.sync_ref_model:
            if self.reference is None or self.reference.model is None:
                raise ConfigError("sync_ref_model = True: adapters switched off cannot move; pass ref_model.")
            self.add_callback(
                MovingReference(
                    self.reference.model,
                    args.ref_model_mixup_alpha,
                    args.ref_model_sync_steps,
                    moved=lambda: [known.clear() for known in self._known.values()],
                )
            )
        self.set_up()

    def set_up(self) -> None:
        """Hook: what the loss keeps between steps."""

    @property
    def uses_dropout(self) -> bool:
        """Only where it is asked for."""
        return not self.args.disable_dropout

    @classmethod
    def needs_reference(cls, args: Any) -> bool:
        """Whether the configured loss reads a reference."""
        return True

    def encode(self, dataset: Any, name: str) -> list[Group]:
        """Groups of rows."""
        return self._encoded(type(self).encoder, finite_rows(dataset, name), name)

    def _encoded(self, encoder: Callable[..., Group], rows: Iterable[Any], name: str) -> list[Group]:
        return encode_rows(
            encoder,
            rows,
            self.tokenizer,
            name=name,
            max_length=self.args.max_length,
        )

    def step_denominator(self, groups: Sequence[Group]) -> float:
        """This rank's groups."""
        return float(len(groups))

    def token_weights(self, batch: PackedBatch) -> torch.Tensor | None:
        """[N] weights of tokens in their sequence's log-probability; None for 1."""
        return None

    def sums(self, batch: PackedBatch, values_N: torch.Tensor) -> torch.Tensor:
        """[S] weighted sums of per-token log-probabilities."""
        weights_N = self.token_weights(batch)
        weighted_N = values_N if weights_N is None else values_N * weights_N
        return sequence_sums(weighted_N, batch.sequence_index, batch.num_sequences)

    @torch.no_grad()
    def group_sums(self, groups: Sequence[Group], model: torch.nn.Module) -> list[list[float]]:
        """For each group, its completions' log-probabilities under a model, without gradient."""
        found: dict[int, list[float]] = {}
        with eval_mode(model):
            for part in self.split(groups):
                batch = pack(part).to(self.args.device)
                values = iter(self.sums(batch, score(model, batch).logprobs).tolist())
                found |= {id(group): [next(values) for _ in group.completions] for group in part}
        return [found[id(group)] for group in groups]

    def reference_sums(self, groups: Sequence[Group]) -> list[list[float]]:
        """The same under the reference."""
        if self.reference is None:
            return [[0.0] * len(group.completions) for group in groups]
        if self.reference.released:
            raise ConfigError(
                "precompute_ref_log_probs = True: the reference's weights have left memory, and these rows were not "
                "scored; give them to the trainer as eval_dataset."
            )
        with self.reference.active(self.model) as reference:
            return self.group_sums(groups, reference)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As of every trainer; what the reference says of the trainer's own sets is kept, of other rows forgotten."""
        groups = self.held_out(eval_dataset)
        sets = named_sets(self.eval_dataset)
        self._evaluated = next((name for name, own in sets.items() if own is groups), _OTHER_ROWS)
        if self._evaluated == _OTHER_ROWS:
            self._known[_OTHER_ROWS] = ReferenceSums()
        return self._plain_loader(groups)

    def _fill(self, groups: Sequence[Group], split: str) -> None:
        """Know the reference's log-probabilities of these groups; each is computed once."""
        known = self._known[split]
        missing = [group for group in groups if group.index not in known]
        if missing:
            known.add(missing, self.reference_sums(missing))

    def before_training(self) -> None:
        """With `precompute_ref_log_probs` score the data set with the reference, or read the cache."""
        if self.args.precompute_ref_log_probs and self.reference is not None:
            self._precompute()

    def save_own_state(self, folder: Path) -> None:
        """A reference that has moved, and what this rank knows of the reference as it is now."""
        if self.args.sync_ref_model and self.is_world_process_zero():
            assert self.reference is not None
            self.reference.save(folder)
        if not self.args.precompute_ref_log_probs:  # those have a file of their own
            self._known["train"].save(folder / f"reference_sums_{self.accelerator.process_index}.json")

    def load_own_state(self, folder: Path) -> None:
        """Continue with the reference where it was."""
        if self.args.sync_ref_model:
            assert self.reference is not None
            self.reference.load(folder)
            for known in self._known.values():
                known.clear()
        if not self.args.precompute_ref_log_probs:
            self._known["train"].load(folder / f"reference_sums_{self.accelerator.process_index}.json")

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """A reference of its own."""
        return {} if self.reference is None else self.reference.given_models()

    def _precompute(self) -> None:
        assert self.reference is not None
        if self.reference.released:  # by an earlier train(): all that it would be asked is known
            return
        sets = {"train": cast("list[Group]", self.train_dataset), **named_sets(self.eval_dataset)}
        for split, groups in sets.items():
            own = groups[self.accelerator.process_index :: self.accelerator.num_processes]
            self._known[split].load_or_compute(
                Path(self.args.output_dir) / f"reference_log_probs_{_file_name(split)}.json",
                groups,
                own,
                fingerprint=self.reference.fingerprint(self.model),
                options={"ld_alpha": getattr(self.args, "ld_alpha", None)},
                compute=self.reference_sums,
                accelerator=self.accelerator,
            )
        if self.reference.model is not None and not self.asks_reference_anew:
            logger.info("reference log-probabilities are known: its weights leave memory")
            self.reference = dataclasses.replace(self.reference, model=None, released=True)

    @property
    def asks_reference_anew(self) -> bool:
        """Whether steps ask the reference for more than the rows of the data sets."""
        return False

    def prepare_groups(self, groups: Sequence[Group]) -> None:
        """Reference log-probabilities of this step's groups."""
        self._fill(groups, "train")

    def packed(self, groups: Sequence[Group], **sequence: Callable[[Completion], float]) -> PackedBatch:
        """The row with each completion's log-probability under the reference."""
        known = self._known["train"]
        values = {
            id(c): value
            for group in groups
            if group.index in known
            for c, value in zip(group.completions, known[group.index], strict=False)
        }
        return pack(groups, sequence={"reference": lambda c: values.get(id(c), 0.0), **sequence})

    def check_start(self, sums_S: torch.Tensor, batch: PackedBatch) -> None:
        """Before the first update the policy is its own reference."""
        is_start = self.is_untrained and self.state.global_step == 0
        if not is_start or self.reference is None or not self.reference.is_initial_policy:
            return
        apart = float((sums_S - batch.sequence["reference"]).abs().sum()) / max(batch.num_scored_tokens, 1)
        bound = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1
        if not apart <= bound:
            raise CheckFailed(
                f"before the first update the reference differs from the policy by {apart:.3g} nats a token (bound "
                f"{bound:g}): dropout is on, the cache is of another model, or the policy was changed after loading."
            )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss over the whole held-out set at once, so that it depends on no split, and the step's metrics."""
        groups = [group for batch in cast("Iterator[list[Group]]", dataloader) for group in batch]
        self._fill(groups, self._evaluated)
        policy = self.group_sums(groups, self.model)
        reference = [self._known[self._evaluated][group.index] for group in groups]
        records = self.gathered([(g, p, r) for g, p, r in zip(groups, policy, reference, strict=True)])
        found = self.evaluate_records([r[0] for r in records], [r[1] for r in records], [r[2] for r in records])
        prefix = f"{metric_key_prefix}_"
        metrics = {prefix + name.removeprefix(prefix): value for name, value in found.items()}
        empty: Any = None
        return EvalLoopOutput(predictions=empty, label_ids=empty, metrics=metrics, num_samples=len(records))

    def evaluate_records(
        self, groups: Sequence[Group], policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        """Loss and metrics of held-out groups from log-probabilities of their completions."""
        raise NotImplementedError

    def own_metrics(self, rewards: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Metrics of the user's from implicit rewards, over the held-out groups of all ranks."""
        if self.metrics_of_rewards is None:
            return {}
        with user_code("compute_metrics"):
            found = self.metrics_of_rewards(EvalPrediction(predictions=rewards.numpy(), label_ids=labels.numpy()))
        return {name: float(value) for name, value in found.items()}

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Names of the metrics of `evaluate_records`, unless a function of the user's adds some."""
        return None if self.metrics_of_rewards is not None else self.metric_names(groups)

    def metric_names(self, groups: Sequence[Group]) -> Collection[str]:
        """Names of the trainer's own metrics of an evaluation of these groups."""
        raise NotImplementedError


class DPOTrainer(ReferenceTrainer):
    r"""Direct Preference Optimisation (2305.18290) and its family, with the arguments of TRL's trainer.

    .. math:: \mathcal L = \sum_k \frac{w_k}{P} \sum_{p=1}^{P} \ell_k(\text{pair } p)

    over the P pairs of the whole optimizer step, all micro-batches and ranks; the losses are the rows of
    `burnish.objectives.preference.PREFERENCE_LOSSES`. A pair is a group of two: its prompt is computed once. The
    reference's log-probabilities are computed once for each pair, whatever the number of epochs.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        ref_model: the reference; if None, the model as it was given (adapters off, or a frozen copy).
        args: `DPOConfig`.
        train_dataset: rows with `chosen` and `rejected`, with or without `prompt`, plain or conversational.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        compute_metrics: a `transformers.EvalPrediction` of an evaluation -> metrics by name. Its `predictions` are
            [P, 2] implicit rewards, chosen and rejected; its `label_ids` are zeros, the index of the better one.
        data_collator: TRL's; refused.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
        CheckFailed: the reference is not the initial policy, or a gradient is not finite.
    """

    args: DPOConfig
    config_class = DPOConfig
    encoder = staticmethod(preference_group)
    columns = "`chosen` and `rejected`"

    def set_up(self) -> None:
        """The losses and their numbers."""
        self.losses = _weighted_losses(self.args)
        self.options = PreferenceOptions(
            **{field.name: getattr(self.args, field.name) for field in dataclasses.fields(PreferenceOptions)}
        )
        self._chosen_tokens = 1.0
        self._coefficients: dict[int, float] = {}
        self._coupled_loss = 0.0

    @classmethod
    def needs_reference(cls, args: Any) -> bool:
        """Whether one of the configured losses reads a reference."""
        return any(loss.needs_reference for loss, _ in _weighted_losses(args))

    def token_weights(self, batch: PackedBatch) -> torch.Tensor | None:
        """LD-DPO (2409.06411): tokens beyond the pair's shorter completion weigh `ld_alpha`."""
        if self.args.ld_alpha is None:
            return None
        tokens_S = torch.bincount(batch.sequence_index, minlength=batch.num_sequences)
        shorter_S = tokens_S.view(-1, 2).min(1).values.repeat_interleave(2)
        first_S = tokens_S.cumsum(0) - tokens_S
        place_N = torch.arange(batch.num_scored_tokens, device=tokens_S.device) - first_S[batch.sequence_index]
        return torch.where(place_N < shorter_S[batch.sequence_index], 1.0, float(self.args.ld_alpha))

    def prepare_groups(self, groups: Sequence[Group]) -> None:
        """Reference, chosen tokens of the whole step, and the coefficients of losses that couple pairs."""
        super().prepare_groups(groups)
        self._chosen_tokens = self.sum_over_ranks(float(sum(g.completions[0].num_scored_tokens for g in groups)))
        if any(loss.coupled for loss, _ in self.losses):
            self._couple(groups)

    def _couple(self, groups: Sequence[Group]) -> None:
        """Losses that sort pairs need all of them: their gradient by each log-probability, from a pass without one."""
        known = self._known["train"]
        own = [
            (policy, known[group.index], [c.num_scored_tokens for c in group.completions])
            for group, policy in zip(groups, self.group_sums(groups, self.model), strict=True)
        ]
        first = sum(self.gathered([len(groups)])[: self.accelerator.process_index])
        everywhere = self.gathered(own)
        policy_S = torch.tensor([p for p, _, _ in everywhere], dtype=torch.float64).flatten().requires_grad_()
        reference_S = torch.tensor([r for _, r, _ in everywhere], dtype=torch.float64).flatten()
        tokens_S = torch.tensor([t for _, _, t in everywhere], dtype=torch.float64).flatten()
        pairs = pairs_of(policy_S, reference_S, tokens_S)
        total = torch.stack([w * loss.compute(pairs, self.options).mean() for loss, w in self.losses if loss.coupled])
        (gradient_S,) = torch.autograd.grad(total.sum(), policy_S)
        mine = gradient_S.view(-1, 2)[first : first + len(groups)].tolist()
        self._coupled_loss = float(total.detach().sum()) / len(everywhere)
        self._coefficients = {
            id(completion): value
            for group, values in zip(groups, mine, strict=True)
            for completion, value in zip(group.completions, values, strict=True)
        }

    def pack_groups(self, groups: Sequence[Group]) -> PackedBatch:
        """Pairs with the reference's log-probabilities and the coefficients of coupled losses."""
        return self.packed(groups, coefficient=lambda completion: self._coefficients.get(id(completion), 0.0))

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """These pairs' share of the weighted losses."""
        scores = score(model, batch, with_collision=self.args.use_weighting)
        if batch.num_scored_tokens == 0:
            return scores.logprobs.sum()
        sums_S = self.sums(batch, scores.logprobs)
        self.check_start(sums_S.detach(), batch)
        tokens_S = torch.bincount(batch.sequence_index, minlength=batch.num_sequences).to(sums_S.dtype)
        pairs = pairs_of(sums_S, batch.sequence["reference"], tokens_S)
        weights_P = self._weights(batch, scores, tokens_S) if self.args.use_weighting else 1.0
        total = sums_S.new_zeros(())
        for loss, weight in self.losses:
            if not loss.coupled:
                losses_P = loss.compute(pairs, self.options) * weights_P
                total = total + weight * losses_P.sum() / (self._chosen_tokens if loss.per_token else denominator)
        if self._coefficients:
            surrogate = (batch.sequence["coefficient"] * sums_S).sum()
            # The gradient is the surrogate's, the value the pairs' share of the loss.
            total = total + surrogate - surrogate.detach() + self._coupled_loss * pairs.chosen.numel()
        chosen_N = batch.sequence_index % 2 == 0
        self._metrics.add_tokens("mean_token_accuracy", scores.correct[chosen_N].float())
        for name, values in self._pair_metrics(pairs).items():
            self._metrics.add_tokens(name, values)
        return total

    def _weights(self, batch: PackedBatch, scores: Any, tokens_S: torch.Tensor) -> torch.Tensor:
        """WPO (2406.11827): [P] e to the mean over tokens of log p_t - log sum_v p_v^2, of both completions."""
        aligned_N = scores.logprobs.detach() - scores.log_collision
        means_S = sequence_sums(aligned_N, batch.sequence_index, batch.num_sequences) / tokens_S.clamp(min=1)
        return means_S.exp().view(-1, 2).prod(1)

    def _pair_metrics(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        normalised = all(loss.length_normalised for loss, _ in self.losses)
        return pair_metrics(pairs, self.options.beta, normalised=normalised)

    def metric_names(self, groups: Sequence[Group]) -> Collection[str]:
        """Names of the metrics below."""
        of_pairs = ("chosen", "rejected", "margins", "accuracies")
        return ("loss", *(f"rewards/{name}" for name in of_pairs), *(f"logps/{name}" for name in of_pairs[:2]))

    def evaluate_records(
        self, groups: Sequence[Group], policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        """Loss (without WPO's weights) and metrics over all held-out pairs."""
        tokens = [[c.num_scored_tokens for c in group.completions] for group in groups]
        pairs = pairs_of(*(torch.tensor(rows, dtype=torch.float64).flatten() for rows in (policy, reference, tokens)))
        loss = sum(
            weight
            * loss.compute(pairs, self.options).sum()
            / (pairs.chosen_tokens.sum() if loss.per_token else len(groups))
            for loss, weight in self.losses
        )
        found = self._pair_metrics(pairs)
        rewards_P2 = torch.stack([found["rewards/chosen"], found["rewards/rejected"]], dim=1)
        own = self.own_metrics(rewards_P2, torch.zeros(len(groups), dtype=torch.long))
        return {"loss": float(loss), **{name: float(values.mean()) for name, values in found.items()}, **own}


def _file_name(split: str) -> str:
    return re.sub(r"[^\w.-]", "_", split)


def _weighted_losses(args: Any) -> list[tuple[PreferenceLoss, float]]:
    names = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    weights = args.loss_weights if args.loss_weights is not None else [1.0] * len(names)
    return [(PREFERENCE_LOSSES[name], weight) for name, weight in zip(names, weights, strict=True)]
