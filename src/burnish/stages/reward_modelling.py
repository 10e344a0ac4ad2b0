"""Reward modelling on pairs, ranked lists and labelled steps."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from burnish.data import EncodeStats, encode_rows, errors_of, finite_rows, reward_group, reward_kind
from burnish.errors import ConfigError, DataError
from burnish.model.classifier import group_ranges, load_reward_model, pack_reads, prepare_for_rewards, reward_scores
from burnish.model.scoring import causal_lm
from burnish.objectives.reward_modelling import (
    bradley_terry,
    calibration_bins,
    calibration_error,
    centering,
    plackett_luce,
    step_cross_entropy,
)
from burnish.training.checks import refuse_router_loss
from burnish.training.ranks import Ranks
from burnish.training.stage import Stage
from burnish.training.step import Loss, Step, read_groups
from burnish.types import Group, PackedBatch

__all__ = ["RewardStage", "RewardStats", "comparisons"]

logger = logging.getLogger(__name__)


class RewardStage(Stage):
    """Train a sequence classifier with one label on comparisons or labelled steps.

    Args:
        args: `RewardConfig`.
        tokenizer: the model's tokenizer; its pad token is set to `pad_token`.
    """

    columns = "`chosen` and `rejected`, or `prompt` and `completions`"
    whole_groups = True

    def __init__(self, args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(args, tokenizer)
        self._stats = RewardStats()
        if (pad := args.pad_token) is not None:
            if pad not in tokenizer.get_vocab():
                raise ConfigError(f"pad_token = {pad!r}: not in the vocabulary of the tokenizer; use a token that is.")
            tokenizer.pad_token = pad
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
            logger.warning(
                "pad_token is EOS (%r): transformers reads the score of the last token that is not padding, so "
                "scores are read before EOS. Set pad_token to another token to read them at EOS.",
                tokenizer.pad_token,
            )

    def load(self, model: Any) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
        """Load a sequence classifier, and set the pad token in its configuration."""
        args = self.args
        loaded, exact = load_reward_model(model, bf16=args.bf16, seed=args.seed, init_kwargs=args.model_init_kwargs)
        causal_lm(loaded).config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return loaded, exact

    def prepare(self, model: torch.nn.Module) -> None:
        """Prepare the forward for scores of packed rows."""
        refuse_router_loss(model)
        prepare_for_rewards(model)

    def encode(self, dataset: Any, name: str, stats: EncodeStats | None = None) -> list[Group]:
        """Encode rows of one kind; drop those that are too long, with a warning."""
        rows, limit = list(finite_rows(dataset, name)), self.args.max_length
        with errors_of(name):
            _check_one_kind(rows, centred=bool(self.args.center_rewards_coefficient))
        groups = encode_rows(
            reward_group,
            rows,
            self.tokenizer,
            stats=stats,
            name=name,
            pad_token_id=self.tokenizer.pad_token_id,
            step_separator=self.args.step_separator,
        )
        kept = [
            group
            for group in groups
            if limit is None or len(group.prompt_ids) + max(len(c.token_ids) for c in group.completions) <= limit
        ]
        if stats is not None:
            stats.num_dropped_rows += len(groups) - len(kept)
        if len(kept) < len(groups):
            logger.warning(
                "%s: %d of %d rows are longer than max_length = %s and dropped.",
                name, len(groups) - len(kept), len(groups), limit,
            )  # fmt: skip
        if not kept:
            raise DataError(f"{name}: every row is longer than max_length = {limit}; raise it.")
        return kept

    def next_step(self, batches: Iterator[list[Group]], num_batches: int) -> Step | None:
        """Return the next rows; the terms of the loss are pairs, lists or steps."""
        if (groups := read_groups(batches, num_batches)) is None:
            return None
        self.run.num_tokens += sum(group.num_tokens for group in groups)
        return Step(groups, count=self.run.ranks.sum(float(sum(len(_labels(group)) or 1 for group in groups))))

    def pack(self, groups: Sequence[Group]) -> PackedBatch:
        """Pack groups for scoring, with `labels` [N] of steps and `margins` [S] of completions."""
        batch = pack_reads(groups)
        if labels := [float(label) for group in groups for label in _labels(group)]:
            batch.token["labels"] = torch.tensor(labels)
        margins = [float(group.row.get("margin") or 0.0) for group in groups for _ in group.completions]
        batch.sequence["margins"] = torch.tensor(margins)
        return batch

    def loss(self, model: torch.nn.Module, batch: PackedBatch, step: Step) -> Loss:
        """Compute the mean loss over pairs, lists or steps."""
        scores_N = reward_scores(model, batch)
        self._stats.add(scores_N, batch)
        return Loss(self._losses(scores_N, batch).sum() / step.denominator)

    def _losses(self, scores_N: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Compute the loss of each step, pair or list."""
        if not scores_N.numel():
            return scores_N
        if "labels" in batch.token:
            return step_cross_entropy(scores_N, batch.token["labels"])
        coefficient = self.args.center_rewards_coefficient or 0.0
        losses: list[torch.Tensor] = []
        for index_PG in comparisons(batch):
            scores_PG = scores_N[index_PG]
            if scores_PG.shape[1] == 2:
                margin_P = batch.sequence["margins"][index_PG[:, 0]]
                likelihood_P = bradley_terry(scores_PG[:, 0], scores_PG[:, 1], margin_P)
            else:
                likelihood_P = plackett_luce(scores_PG)
            losses.append(likelihood_P + centering(scores_PG, coefficient=coefficient))
        return torch.cat(losses)

    def step_metrics(self) -> dict[str, float]:
        """Add the metrics of the scores since the last log."""
        metrics = super().step_metrics() | self._stats.summary(self.run.ranks)
        self._stats = RewardStats()
        return metrics

    def metrics_state(self) -> dict[str, Any]:
        """Return the scores since the last log."""
        return {"scores": self._stats.state_dict()}

    def load_metrics_state(self, state: Mapping[str, Any]) -> None:
        """Restore the scores since the last log."""
        self._stats.load_state_dict(state["scores"])

    def evaluate(self, groups: Sequence[Group], split: str) -> dict[str, float]:
        """Compute the loss, accuracy, margin and calibration."""
        stats, loss, terms, ranks = RewardStats(), 0.0, 0, self.run.ranks
        for part in self.held_out_parts(groups):
            batch = self.pack(part).to(self.args.device)
            scores_N = reward_scores(self.run.model, batch)
            stats.add(scores_N, batch)
            losses = self._losses(scores_N, batch)
            loss, terms = loss + float(losses.sum()), terms + losses.numel()
        return {
            "loss": ranks.sum(loss) / max(ranks.sum(terms), 1.0),
            **stats.summary(ranks),
            **stats.calibration(ranks),
        }

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str]:
        """Name the metrics of `evaluate`; steps have no margin."""
        margin = () if any(map(_labels, groups)) else ("margin",)
        of_rewards = ("min_reward", "mean_reward", "max_reward", "accuracy", *margin)
        return ("loss", *of_rewards, "calibration_error", "brier_score")


def comparisons(batch: PackedBatch) -> list[torch.Tensor]:
    """Return the score indices of each pair or list as [P, G] tensors, one for each G."""
    by_size: dict[int, list[list[int]]] = {}
    for indices in group_ranges(batch):
        by_size.setdefault(len(indices), []).append(list(indices))
    return [torch.tensor(rows, device=batch.input_ids.device) for _, rows in sorted(by_size.items())]


class RewardStats:
    """Statistics of a set of scores: range, accuracy, margin and calibration."""

    def __init__(self) -> None:
        self._scores: list[torch.Tensor] = []
        self._ahead: list[torch.Tensor] = []
        self._outcomes: list[torch.Tensor] = []
        self._steps = False

    def add(self, scores_N: torch.Tensor, batch: PackedBatch) -> None:
        """Add the scores of a batch; a list counts as all of its pairs."""
        scores_N = scores_N.detach()
        if not scores_N.numel():
            return
        self._scores.append(scores_N.double())
        if "labels" in batch.token:
            self._steps = True
            self._ahead.append(self._scores[-1])
            self._outcomes.append(batch.token["labels"].double())
            return
        for index_PG in comparisons(batch):
            better, worse = torch.triu_indices(index_PG.shape[1], index_PG.shape[1], 1)
            scores_PG = scores_N[index_PG].double()
            self._ahead.append((scores_PG[:, better] - scores_PG[:, worse]).flatten())
            self._outcomes.append(torch.ones_like(self._ahead[-1]))

    def state_dict(self) -> dict[str, Any]:
        """Return the scores added so far, as JSON."""
        scores, ahead, outcomes = (values.tolist() for values in self._all())
        return {"scores": scores, "ahead": ahead, "outcomes": outcomes, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        names = ("scores", "ahead", "outcomes")
        own = (torch.tensor(state[name], dtype=torch.float64) for name in names)
        self._scores, self._ahead, self._outcomes = ([values] for values in own)
        self._steps = state["steps"]

    def _all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        none = [torch.zeros(0, dtype=torch.float64)]
        # They stay on their device until they are read, so that no step waits for them.
        scores, ahead, outcomes = (
            torch.cat(none + [part.cpu() for part in parts]) for parts in (self._scores, self._ahead, self._outcomes)
        )
        return scores, ahead, outcomes

    def summary(self, ranks: Ranks) -> dict[str, float]:
        """Return TRL's metrics over all ranks; a pair is correct if the better completion has the higher score."""
        scores_N, ahead_M, outcomes_M = self._all()
        count, pairs = (max(ranks.sum(float(x.numel())), 1.0) for x in (scores_N, ahead_M))
        least = -float(scores_N.min()) if len(scores_N) else float("-inf")
        most = float(scores_N.max()) if len(scores_N) else float("-inf")
        metrics = {
            "min_reward": -ranks.max(least),
            "mean_reward": ranks.sum(float(scores_N.sum())) / count,
            "max_reward": ranks.max(most),
            "accuracy": ranks.sum(float(((ahead_M > 0) == (outcomes_M > 0)).sum())) / pairs,
        }
        margin = ranks.sum(float(ahead_M.sum())) / pairs
        return metrics if self._of_steps(ranks) else {**metrics, "margin": margin}

    def _of_steps(self, ranks: Ranks) -> bool:
        """Return whether any rank has steps: one without rows must take part in the same sums."""
        return ranks.max(float(self._steps)) > 0

    def calibration(self, ranks: Ranks) -> dict[str, float]:
        """Return the expected calibration error (10 bins) and Brier score of sigmoid(difference) over all ranks."""
        _, ahead_M, outcomes_M = self._all()
        probability_M = ahead_M.sigmoid()
        brier = ranks.sum(float(((probability_M - outcomes_M) ** 2).sum()))
        pairs = max(ranks.sum(float(ahead_M.numel())), 1.0)
        if not self._of_steps(ranks):
            # With the better one always first every outcome is 1, and the error would be 1 minus the mean probability.
            probability_M = torch.cat((probability_M, (-ahead_M).sigmoid()))
            outcomes_M = torch.cat((outcomes_M, 1 - outcomes_M))
        own = calibration_bins(probability_M, outcomes_M).flatten().tolist()
        bins = torch.tensor([ranks.sum(value) for value in own], dtype=torch.float64).view(3, -1)
        return {"calibration_error": calibration_error(bins), "brier_score": brier / pairs}


def _check_one_kind(rows: list[Any], *, centred: bool) -> None:
    """Refuse rows of different kinds, and margins in some rows only."""
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
        raise DataError(f"row {with_margin.index(False)} has no margin and others do: give every row one, 0 for none.")


def _labels(group: Group) -> list[bool]:
    """Return the labels of a group's steps, which form one completion."""
    return group.row.get("labels") or [] if len(group.completions) == 1 else []
