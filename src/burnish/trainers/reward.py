"""Reward modelling: pairs, ranked lists and judged steps."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from burnish.data import encode_rows, errors_of, finite_rows, reward_group, reward_kind
from burnish.errors import ConfigError, DataError
from burnish.model.classifier import (
    classifier_adapters,
    group_places,
    load_reward_model,
    pack_reads,
    prepare_for_rewards,
    reward_scores,
)
from burnish.model.scoring import causal_lm, eval_mode
from burnish.objectives.reward_modelling import (
    bradley_terry,
    calibration_bins,
    calibration_error,
    centering,
    plackett_luce,
    step_cross_entropy,
)
from burnish.trainers.configs import RewardConfig
from burnish.training.arguments import refuse_arguments, resolve_args, with_quantization
from burnish.training.base import GroupTrainer
from burnish.training.checks import refuse_router_loss, resolve_tokenizer
from burnish.training.held_out import encode_sets
from burnish.types import Group, PackedBatch

__all__ = ["RewardStats", "RewardTrainer", "comparisons"]

logger = logging.getLogger(__name__)


class RewardTrainer(GroupTrainer):
    r"""Reward modelling with the arguments of TRL's trainer; each prompt is computed once, whatever hangs on it.

    .. math::
        \text{pairs: } & -\log\sigma(r_w - r_l - m) + c\,(r_w + r_l)^2 \\
        \text{ranked lists: } & -\sum_i \Big[ r_i - \log\sum_{j \ge i} e^{r_j} \Big] + c\,\Big(\sum_i r_i\Big)^2 \\
        \text{steps: } & -y \log\sigma(r) - (1 - y) \log\sigma(-r)

    each as the mean over the pairs, lists or steps of the whole optimizer step. The model is a sequence classifier with
    one label. Its score is read where transformers reads it, at the last token that is not the padding token, and for
    steps at the last token of each, so `AutoModelForSequenceClassification` gives a saved model's scores.

    `eval_calibration_error` (10 bins) and `eval_brier_score` judge sigma(r_i - r_j) as the probability that the better
    of two completions wins, each pair taken in both orders; of steps sigma(r).

    Args:
        model: path, hub name, package that carries a model, or a model in memory; a causal language model gets a new
            score layer, drawn from `seed`.
        args: `RewardConfig`.
        train_dataset: rows with `chosen` and `rejected` (and `prompt`, `margin`), with `prompt` and `completions` (the
            best first), or with `prompt`, `completions` (steps) and `labels`; one kind in a data set.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        optimizer_cls_and_kwargs: a class and its arguments instead of the configured optimizer.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters, and the score layer, instead of the weights; task_type SEQ_CLS.
        data_collator, compute_metrics, preprocess_logits_for_metrics: TRL's; refused.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
    """

    args: RewardConfig
    config_class = RewardConfig
    whole_groups = True

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: RewardConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        refuse_arguments(
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        args = with_quantization(resolve_args(args, RewardConfig), model, quantization_config)
        if train_dataset is None:
            raise DataError("train_dataset = None: pass rows with chosen and rejected, or with prompt and completions.")
        self.args = cast("RewardConfig", args)
        self.tokenizer = resolve_tokenizer(model, processing_class, args)
        self._set_pad_token()
        super().__init__(
            model,
            args,
            processing_class=self.tokenizer,
            train_dataset=self.encode(train_dataset, "train_dataset"),
            eval_dataset=encode_sets(eval_dataset, self.encode),
            peft_config=None if peft_config is None else classifier_adapters(peft_config),
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._stats = RewardStats()

    def _set_pad_token(self) -> None:
        pad = self.args.pad_token
        if pad is not None:
            if pad not in self.tokenizer.get_vocab():
                raise ConfigError(f"pad_token = {pad!r}: not in the vocabulary of the tokenizer; use a token that is.")
            self.tokenizer.pad_token = pad
        if self.tokenizer.pad_token_id is not None and self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            logger.warning(
                "pad_token is EOS (%r): transformers reads a score at the last token that is no padding, so scores are "
                "read before EOS. Set pad_token to another token to read them at EOS.",
                self.tokenizer.pad_token,
            )

    def load(self, model: Any, args: Any) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
        """A sequence classifier whose configuration names the padding token."""
        loaded, exact = load_reward_model(model, bf16=args.bf16, seed=args.seed, init_kwargs=args.model_init_kwargs)
        causal_lm(loaded).config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return loaded, exact

    def prepare_model(self, model: torch.nn.Module) -> None:
        """Scores on packed rows."""
        refuse_router_loss(model)
        prepare_for_rewards(model)

    @property
    def uses_dropout(self) -> bool:
        """Only where it is asked for."""
        return not self.args.disable_dropout

    def encode(self, dataset: Any, name: str) -> list[Group]:
        """Groups of rows."""
        args = self.args
        rows = list(finite_rows(dataset, name))
        with errors_of(name):
            _check_one_kind(rows, centred=bool(args.center_rewards_coefficient))
        groups = encode_rows(
            reward_group,
            rows,
            self.tokenizer,
            name=name,
            pad_token_id=self.tokenizer.pad_token_id,
            step_separator=args.step_separator,
        )
        limit = args.max_length
        kept = [group for group in groups if limit is None or _longest(group) <= limit]
        if len(kept) < len(groups):
            logger.warning(
                "%s: %d of %d rows are longer than max_length = %s and left out.",
                name, len(groups) - len(kept), len(groups), limit,
            )  # fmt: skip
        if not kept:
            raise DataError(f"{name}: every row is longer than max_length = {limit}; raise it.")
        return kept

    def pack_groups(self, groups: list[Group]) -> PackedBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One packed row; `labels` [N] of steps, `margins` [S] of completions."""
        labels = [float(label) for group in groups for label in _labels(group)]
        margins = [float(group.row.get("margin") or 0.0) for group in groups for _ in group.completions]
        batch = pack_reads(groups)
        if labels:
            batch.token["labels"] = torch.tensor(labels)
        batch.sequence["margins"] = torch.tensor(margins)
        return batch

    def step_denominator(self, groups: Any) -> float:
        """Pairs, lists or steps."""
        return float(sum(len(_labels(group)) or 1 for group in groups))

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """This batch's share of the mean loss."""
        scores_N = reward_scores(model, batch)
        self._stats.add(scores_N, batch)
        return self._losses(scores_N, batch).sum() / denominator

    def _losses(self, scores_N: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """One loss for each step, or each pair or list."""
        if not scores_N.numel():
            return scores_N
        if "labels" in batch.token:
            return step_cross_entropy(scores_N, batch.token["labels"])
        coefficient = self.args.center_rewards_coefficient or 0.0
        losses: list[torch.Tensor] = []
        for places_PG in comparisons(batch):
            scores_PG = scores_N[places_PG]
            if scores_PG.shape[1] == 2:
                margin_P = batch.sequence["margins"][places_PG[:, 0]]
                likelihood_P = bradley_terry(scores_PG[:, 0], scores_PG[:, 1], margin_P)
            else:
                likelihood_P = plackett_luce(scores_PG)
            losses.append(likelihood_P + centering(scores_PG, coefficient=coefficient))
        return torch.cat(losses)

    def step_metrics(self) -> dict[str, float]:
        """Metrics of all completions trained on since the last log."""
        metrics = super().step_metrics() | self._stats.summary(self)
        self._stats = RewardStats()
        return metrics

    def metrics_state(self) -> dict[str, Any]:
        """Metrics and scores since the last log."""
        return super().metrics_state() | {"scores": self._stats.state_dict()}

    def load_metrics_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `metrics_state` gave."""
        super().load_metrics_state(state)
        self._stats.load_state_dict(state["scores"])

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str]:
        """Names of the metrics below; steps have no margin."""
        margin = () if any(map(_labels, groups)) else ("margin",)
        of_rewards = ("min_reward", "mean_reward", "max_reward", "accuracy", *margin)
        return ("loss", *of_rewards, "calibration_error", "brier_score")

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss and every metric over all rows of all ranks."""
        stats, loss, terms, rows = RewardStats(), 0.0, 0, 0
        with torch.no_grad(), eval_mode(self.model):
            for groups in dataloader:
                for part in self.split(groups):
                    batch = self.pack_groups(part).to(self.args.device)
                    scores_N = reward_scores(self.model, batch)
                    stats.add(scores_N, batch)
                    losses = self._losses(scores_N, batch)
                    loss, terms, rows = loss + float(losses.sum()), terms + losses.numel(), rows + len(part)
        metrics = {"loss": self.sum_over_ranks(loss) / max(self.sum_over_ranks(terms), 1.0)}
        metrics |= stats.summary(self) | stats.calibration(self)
        empty: Any = None
        return EvalLoopOutput(
            predictions=empty,
            label_ids=empty,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=int(self.sum_over_ranks(rows)),
        )


def comparisons(batch: PackedBatch) -> list[torch.Tensor]:
    """The completions of each pair or list, as [P, G] places among the scores, one tensor for each G."""
    by_size: dict[int, list[list[int]]] = {}
    for places in group_places(batch):
        by_size.setdefault(len(places), []).append(list(places))
    return [torch.tensor(rows, device=batch.input_ids.device) for _, rows in sorted(by_size.items())]


class RewardStats:
    """What a set of scores says: how high they are, how often they are right, how well they are calibrated."""

    def __init__(self) -> None:
        self._scores: list[torch.Tensor] = []
        self._ahead: list[torch.Tensor] = []
        self._outcomes: list[torch.Tensor] = []
        self._steps = False

    def add(self, scores_N: torch.Tensor, batch: PackedBatch) -> None:
        """Scores of one batch; a list counts with all of its pairs."""
        scores_N = scores_N.detach()
        if not scores_N.numel():
            return
        self._scores.append(scores_N.double().cpu())
        if "labels" in batch.token:
            self._steps = True
            self._ahead.append(self._scores[-1])
            self._outcomes.append(batch.token["labels"].double().cpu())
            return
        for places_PG in comparisons(batch):
            better, worse = torch.triu_indices(places_PG.shape[1], places_PG.shape[1], 1)
            scores_PG = scores_N[places_PG].double().cpu()
            self._ahead.append((scores_PG[:, better] - scores_PG[:, worse]).flatten())
            self._outcomes.append(torch.ones_like(self._ahead[-1]))

    def state_dict(self) -> dict[str, Any]:
        """Everything added so far, as JSON."""
        scores, ahead, outcomes = (values.tolist() for values in self._all())
        return {"scores": scores, "ahead": ahead, "outcomes": outcomes, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        names = ("scores", "ahead", "outcomes")
        own = (torch.tensor(state[name], dtype=torch.float64) for name in names)
        self._scores, self._ahead, self._outcomes = ([values] for values in own)
        self._steps = state["steps"]

    def _all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        none = [torch.zeros(0, dtype=torch.float64)]
        scores, ahead, outcomes = (torch.cat(none + parts) for parts in (self._scores, self._ahead, self._outcomes))
        return scores, ahead, outcomes

    def summary(self, trainer: GroupTrainer) -> dict[str, float]:
        """TRL's metrics over all ranks: a pair is right where the better completion has the higher score."""
        scores_N, ahead_M, outcomes_M = self._all()
        count, pairs = (max(trainer.sum_over_ranks(float(x.numel())), 1.0) for x in (scores_N, ahead_M))
        least = -float(scores_N.min()) if len(scores_N) else float("-inf")
        most = float(scores_N.max()) if len(scores_N) else float("-inf")
        metrics = {
            "min_reward": -trainer.max_over_ranks(least),
            "mean_reward": trainer.sum_over_ranks(float(scores_N.sum())) / count,
            "max_reward": trainer.max_over_ranks(most),
            "accuracy": trainer.sum_over_ranks(float(((ahead_M > 0) == (outcomes_M > 0)).sum())) / pairs,
        }
        margin = trainer.sum_over_ranks(float(ahead_M.sum())) / pairs
        return metrics if self._of_steps(trainer) else {**metrics, "margin": margin}

    def _of_steps(self, trainer: GroupTrainer) -> bool:
        """Whether any rank has seen steps: one without rows must take part in the same sums."""
        return trainer.max_over_ranks(float(self._steps)) > 0

    def calibration(self, trainer: GroupTrainer) -> dict[str, float]:
        """Expected calibration error with 10 bins and Brier score of sigma(ahead), over all ranks."""
        _, ahead_M, outcomes_M = self._all()
        probability_M = ahead_M.sigmoid()
        brier = trainer.sum_over_ranks(float(((probability_M - outcomes_M) ** 2).sum()))
        pairs = max(trainer.sum_over_ranks(float(ahead_M.numel())), 1.0)
        if not self._of_steps(trainer):
            # In one order every outcome is 1, and the error would be one minus the mean probability.
            probability_M = torch.cat((probability_M, (-ahead_M).sigmoid()))
            outcomes_M = torch.cat((outcomes_M, 1 - outcomes_M))
        own = calibration_bins(probability_M, outcomes_M).flatten().tolist()
        bins = torch.tensor([trainer.sum_over_ranks(value) for value in own], dtype=torch.float64).view(3, -1)
        return {"calibration_error": calibration_error(bins), "brier_score": brier / pairs}


def _check_one_kind(rows: list[Any], *, centred: bool) -> None:
    """One kind of row in a data set, and a margin in all rows or in none."""
    kinds = [reward_kind(row, index) for index, row in enumerate(rows)]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise DataError(
            f"row 0 is {kinds[0]}, row {other} is {kinds[other]}: their losses have no common denominator. "
            "Train on one kind."
        )
    if centred and kinds[:1] == ["stepwise"]:
        raise ConfigError(
            "center_rewards_coefficient with stepwise rows: labels fix where 0 is, so there is nothing to centre; "
            "remove the field."
        )
    with_margin = [row.get("margin") is not None for row in rows]
    if any(with_margin) and not all(with_margin):
        raise DataError(f"row {with_margin.index(False)} has no margin and others do: give all one, 0 for none.")


def _labels(group: Group) -> list[bool]:
    """The labels of steps, which are one completion."""
    return group.row.get("labels") or [] if len(group.completions) == 1 else []


def _longest(group: Group) -> int:
    return len(group.prompt_ids) + max(len(completion.token_ids) for completion in group.completions)
