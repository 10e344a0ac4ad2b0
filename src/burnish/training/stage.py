"""What a stage is: a plain object that says which groups make an optimizer step, and what their loss is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from burnish.data import EncodeStats
from burnish.model.loading import load_model
from burnish.model.packing import pack, split_by_tokens
from burnish.model.scoring import prepare_for_scoring
from burnish.training.checks import refuse_router_loss
from burnish.training.learning_signal import LearningMonitor
from burnish.training.metrics import StepMetrics
from burnish.training.ranks import Ranks
from burnish.training.step import Loss, Step
from burnish.types import Group, PackedBatch

__all__ = ["Run", "Stage"]


class Run(Protocol):
    """What a stage may use of the run that it is part of; `Learner` is one."""

    model: Any
    state: TrainerState
    ranks: Ranks
    metrics: StepMetrics
    learning_monitor: LearningMonitor
    num_tokens: int
    """This process's share of the tokens trained on so far."""

    @property
    def is_untouched(self) -> bool:
        """Whether no step has changed the model yet."""
        ...

    @property
    def lr_factor(self) -> float:
        """The learning rate of this step over the peak learning rate."""
        ...

    @property
    def eval_sets(self) -> Mapping[str, list[Group]]:
        """The held-out sets by the prefix of their metrics."""
        ...


class Stage:
    """A way of learning.

    A stage is made before any weight is loaded (`encode`, `load`, `prepare`), joins a run once the model is in place
    (`join`), and is then asked for one `Step` after the other and for the loss of each packed part of one.

    Args:
        args: the trainer's config.
        tokenizer: of the model.
    """

    columns: ClassVar[str]
    """The columns of its rows, for messages."""

    whole_groups: bool = False
    """Whether the completions of a group meet in one loss, so that no split may separate them."""

    run: Run

    def __init__(self, args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.args = args
        self.tokenizer = tokenizer

    @property
    def uses_dropout(self) -> bool:
        """Whether the model's dropout stays on during training."""
        return not self.args.disable_dropout

    def encode(self, dataset: Any, name: str, stats: EncodeStats | None = None) -> list[Group]:
        """Encode rows and add to `stats`; `name` is for messages."""
        raise NotImplementedError

    def training_set(self, dataset: Any) -> Any:
        """Encode the rows to train on: a list of groups, or a stream of them."""
        return self.encode(dataset, "train_dataset")

    def load(self, model: Any) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
        """Load the model to train, without adapters, and exact values of the parameters that were rounded."""
        return load_model(model, bf16=bool(self.args.bf16), init_kwargs=self.args.model_init_kwargs)

    def prepare(self, model: torch.nn.Module) -> None:
        """Teach the loaded model, adapters included, what `loss` asks of its forward."""
        refuse_router_loss(model)
        prepare_for_scoring(model)

    def join(self, run: Run) -> None:
        """Make what needs the model in place: a reference, an engine, a critic."""
        self.run = run

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Return callbacks that the stage brings along; asked once, after `join`."""
        return ()

    def train_dataloader(self, batch_size: int) -> DataLoader[Any] | None:
        """Return the batches that `next_step` reads; None for those of transformers."""
        return None

    def begin_training(self) -> None:
        """Find out what must be known before the first step of a run, new or resumed."""

    def end_training(self) -> None:
        """Say what is known of a run that took its last step."""

    def next_step(self, batches: Iterator[list[Group]], num_batches: int) -> Step | None:
        """Return this rank's next optimizer step, or None when the data ended."""
        raise NotImplementedError

    def parts(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Split groups into parts within `token_budget`."""
        return split_by_tokens(groups, self.args.token_budget, whole=self.whole_groups)

    def pack(self, groups: Sequence[Group]) -> PackedBatch:
        """Pack groups, with the tensors that `loss` reads, into one row."""
        return pack(groups)

    def loss(self, model: torch.nn.Module, batch: PackedBatch, step: Step) -> Loss:
        """Compute a packed part's share of the step's loss."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Check the step before the optimizer takes it: its gradients are complete.

        Raises:
            CheckFailed: it must not be taken.
        """

    def step_metrics(self) -> dict[str, float]:
        """Return the metrics of the training steps since the last log, over all ranks, and start anew."""
        return self.run.metrics.flush(self.run.ranks.gathered)

    def evaluate(self, groups: Sequence[Group], split: str) -> dict[str, float]:
        """Measure the loss and the metrics of held-out groups.

        Args:
            groups: of all ranks; each computes its own and all return the same.
            split: prefix of the metrics, such as "eval".
        """
        raise NotImplementedError

    def own(self, groups: Sequence[Group]) -> list[Group]:
        """Return this rank's held-out groups."""
        return list(groups[self.run.ranks.index :: self.run.ranks.count])

    def held_out_parts(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Split this rank's held-out groups into parts within `token_budget`, one evaluation batch after the other."""
        own, size = self.own(groups), self.args.per_device_eval_batch_size
        for first in range(0, len(own), size):
            yield from self.parts(own[first : first + size])

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Name the metrics of an evaluation of these groups; None where they cannot be known."""
        return None

    def metrics_state(self) -> dict[str, Any]:
        """Return what `step_metrics` has collected beside `run.metrics` since the last log, as JSON."""
        return {}

    def load_metrics_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `metrics_state` gave."""

    def save_state(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint that transformers knows nothing of."""

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Read back what `save_state` wrote; the settings in `changed` are new and win."""

    def save_beside(self, folder: Path) -> None:
        """Write what is delivered beside the trained model."""

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """Return models beside the trained one that the loss depends on, by argument."""
        return {}

    def other_trained_models(self) -> Mapping[str, torch.nn.Module]:
        """Return models beside the policy that train too, by what messages call them."""
        return {}

    def reward_names(self) -> Sequence[str]:
        """Name what rewards the samples."""
        return ()
