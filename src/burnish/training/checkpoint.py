"""Start, save and resume runs, and apply settings that changed before a resume."""

from __future__ import annotations

import contextlib
import logging
import pickle
import random
import uuid
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals

from burnish.config.paths import is_folder, missing
from burnish.errors import BurnishError, ConfigError, FileError, show
from burnish.runs.checkpoints import (
    DRAFTS,
    RUN,
    check_unused,
    delete_run,
    discard_draft,
    find_checkpoint,
    noting_files,
    problem_of,
    publish,
    rotate,
    set_aside_after,
    settle,
)
from burnish.runs.files import read_json, write_json
from burnish.training.fingerprint import changed_settings, describe_run, model_digest

__all__ = [
    "RunCheckpoints",
    "check_weights",
    "keeping_dtypes",
    "keeping_hyperparameters",
    "reading",
    "start",
    "writing_checkpoint",
]

logger = logging.getLogger(__name__)

_OWN = "trainer.json"
"""File of a trainer's own state in a checkpoint."""

_DISK = ("PytorchStreamWriter", "open file")
"""Parts of torch's messages about a file that it cannot write."""

_SCHEDULE = frozenset(
    {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"}
)
_HYPERPARAMETERS = {"weight_decay": "weight_decay", "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
"""Config field -> key in an optimizer's parameter group."""


class RunCheckpoints:
    """Manage the checkpoints of a run: find the one to start from, save, and restore.

    Args:
        trainer: the trainer of the run.
        model: its model before new adapters are added.
    """

    def __init__(self, trainer: Any, model: torch.nn.Module) -> None:
        self._trainer = trainer
        self._base = model_digest(model)
        self._run: dict[str, Any] = {}
        self.changed: Mapping[str, tuple[Any, Any]] = {}
        """Settings that differ from the resumed checkpoint's, as (before, now)."""

    def begin(self, asked: str | bool | None) -> Path | None:
        """Return the checkpoint to start from, or None for a new run; `asked` is the argument of `train`.

        Raises:
            ConfigError: there is no such checkpoint, it is of another run, or a new run would mix with an earlier one.
        """
        trainer = self._trainer
        args = trainer.args
        resume = args.resume_from_checkpoint if asked is None else asked
        checkpoint = trainer.ranks.agreed(lambda: start(args, resume, model=_source(trainer.model)))
        if checkpoint is None and asked is True:
            raise ConfigError(
                f"resume_from_checkpoint = True: output_dir = {args.output_dir!r} has no checkpoint; name one, or "
                "remove it to start anew."
            )
        if not self._run:  # describe the initial weights, not those that an earlier train() left
            self._run = describe_run(
                args,
                model=trainer.model,
                base=self._base,
                train_dataset=trainer.train_dataset,
                others={name: model_digest(model) for name, model in trainer.stage.other_models().items()},
                rewards=trainer.stage.reward_names(),
            )
        self.changed = {}
        self._run["run"] = trainer.ranks.agreed(lambda: uuid.uuid4().hex)
        if checkpoint is not None:
            with reading(checkpoint):
                step = _read_step(checkpoint)
                self.changed = changed_settings(checkpoint, self._run)
                self._run["run"] = read_json(checkpoint / RUN, self._run)["run"]
            trainer.ranks.agreed(lambda: set_aside_after(Path(args.output_dir), step))
        return checkpoint

    def save(self, folder: Path) -> None:
        """Write a draft checkpoint, publish it among the finished ones, and delete old ones.

        Args:
            folder: the run's folder.

        Raises:
            FileError: it cannot be written.
        """
        trainer, args, state = self._trainer, self._trainer.args, self._trainer.state
        draft = folder / DRAFTS / f"checkpoint-{state.global_step}"
        own = {"num_tokens": int(trainer.total_tokens())}
        with writing_checkpoint(draft):
            if args.should_save:
                discard_draft(folder)
            trainer.accelerator.wait_for_everyone()
            trainer.store_flos()
            trainer.save_model(str(draft), _internal_call=True)
            if not args.save_only_model:
                trainer._save_optimizer_and_scheduler(str(draft))
                trainer._save_scaler(str(draft))
                trainer._save_rng_state(str(draft))
            trainer.stage.save_state(draft)
            trainer.log_state.save(draft)
            if best := state.best_global_step:
                path = folder / f"checkpoint-{best}"
                if best == state.global_step or path.is_dir():
                    state.best_model_checkpoint = str(path)
            if args.should_save:
                write_json(draft / _OWN, own)
                write_json(draft / RUN, self._run)
                for part in (*trainer.callback_handler.callbacks, trainer.control):
                    if isinstance(part, ExportableState):
                        _export(part, state.stateful_callbacks)
                state.save_to_json(str(draft / "trainer_state.json"))
            trainer.accelerator.wait_for_everyone()
            if args.should_save:
                finished = publish(draft, folder)
                rotate(folder, args.save_total_limit, keep=[state.best_model_checkpoint])
                if args.push_to_hub:
                    trainer._push_from_checkpoint(str(finished))
            trainer.accelerator.wait_for_everyone()

    def saving_result(self, folder: Path) -> AbstractContextManager[None]:
        """Save the trained model inside and record its files, so that overwrite_output_dir can delete them."""
        own = self._trainer.args.should_save and folder.resolve() == Path(self._trainer.args.output_dir).resolve()
        return noting_files(folder) if own else contextlib.nullcontext()

    def load(self, checkpoint: Path, read: Callable[[], None]) -> None:
        """Restore optimizer, schedule and the trainer's state; changed settings take precedence.

        Args:
            checkpoint: the checkpoint's folder.
            read: restores optimizer and scheduler by transformers.

        Raises:
            ConfigError: the files are damaged, or of another configuration.
        """
        trainer = self._trainer
        total = read_json(checkpoint / "trainer_state.json").get("max_steps")
        with reading(checkpoint):
            if not (checkpoint / RUN).is_file():
                _check_masters(checkpoint, trainer.master_weights is not None)
            with applying(trainer, self.changed, total_before=total):
                read()
            if {"metric_for_best_model", "greater_is_better"} & set(self.changed):
                trainer.state.best_metric = trainer.state.best_global_step = trainer.state.best_model_checkpoint = None
            own = read_json(checkpoint / _OWN)
            if own is None:
                logger.warning("%s has no %s: num_tokens counts from here.", checkpoint, _OWN)
            trainer.num_tokens = int(own["num_tokens"]) if own and trainer.is_world_process_zero() else 0
            trainer.log_state.load(checkpoint)
            trainer.stage.load_state(checkpoint, self.changed)
            _check_random_state(checkpoint, trainer.args)


def _read_step(checkpoint: Path) -> int:
    """Read the step of a checkpoint, and check that transformers can resume from its state.

    Raises:
        TypeError: a field is unknown, or of another type.
    """
    state: Any = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    for name, kind in _STATE_TYPES.items():
        if not isinstance(getattr(state, name), kind):
            raise TypeError(f"trainer_state.json: {name} = {show(getattr(state, name))}")
    if not isinstance(state.stateful_callbacks.get("TrainerControl"), dict):
        raise TypeError("trainer_state.json: stateful_callbacks has no TrainerControl")
    return int(state.global_step)


_STATE_TYPES: dict[str, Any] = {
    "best_model_checkpoint": str | None,
    "epoch": int | float | None,
    "global_step": int,
    "log_history": list,
    "max_steps": int,
    "stateful_callbacks": dict,
    "train_batch_size": int,
}


def _check_masters(checkpoint: Path, masters: bool) -> None:
    """Refuse an optimizer state with masters for a run without, or the reverse: torch would ignore them.

    Raises:
        ConfigError: only one of checkpoint and run has fp32 masters.
    """
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    if ("masters" in saved) != masters:
        kinds = {True: "bf16 weights with fp32 masters", False: "weights without masters"}
        raise ConfigError(
            f"resume_from_checkpoint = {str(checkpoint)!r}: it holds {kinds[not masters]}, and this run trains "
            f"{kinds[masters]}; set bf16, or the model's dtype, as it was."
        )


def _source(model: Any) -> str:
    """Return where a model was read from; the folder of adapters on a base is not known."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _export(part: ExportableState, states: dict[str, Any]) -> None:
    """Store the state of a callback as transformers does: by class, in a list if there are several."""
    name = type(part).__name__
    if isinstance(states.get(name), list):
        states[name].append(part.state())
    else:
        states[name] = part.state()


def _check_random_state(checkpoint: Path, args: Any) -> None:
    """Check the state of the random generators, which transformers only restores after the first batch."""
    name = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
    if (file := checkpoint / name).is_file():
        with safe_globals():
            state = torch.load(file, weights_only=True)
        torch.Generator().set_state(state["cpu"])
        random.Random().setstate(state["python"])
        numpy.random.RandomState().set_state(state["numpy"])


def start(args: Any, resume: str | bool | None, *, model: str = "", check_only: bool = False) -> Path | None:
    """Return the checkpoint that a run starts from, or None for a new run, in a folder without another.

    Args:
        args: the trainer's config.
        resume: a checkpoint; True (or "true") for the latest usable one; None or False for a new run.
        model: path of the model, which `overwrite_output_dir` must not delete.
        check_only: write and delete nothing.

    Raises:
        ConfigError: the checkpoint cannot be resumed, or the folder holds another run.
        FileError: the folder cannot be written.
    """
    folder, overwrite = Path(args.output_dir), bool(args.overwrite_output_dir)
    if overwrite and model and Path(model).exists() and Path(model).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"overwrite_output_dir = True: output_dir = {str(folder)!r} holds the model to start from, {model}; give "
            "another output_dir."
        )
    if resume is None or str(resume).lower() == "false":
        if not overwrite:
            check_unused(folder)
        elif not check_only:
            delete_run(folder)
        return None
    if not check_only:
        settle(folder)
    if str(resume).lower() == "true":
        found = find_checkpoint(folder)
        if found is None and overwrite and not check_only:
            delete_run(folder)
        return found
    if not is_folder(checkpoint := Path(str(resume))):
        raise ConfigError(
            f"resume_from_checkpoint = {show(resume)}: no such folder; name a checkpoint ({missing(checkpoint)})."
        )
    if (problem := problem_of(checkpoint)) is not None:
        raise ConfigError(
            f"resume_from_checkpoint = {resume!r}: {problem}. resume_from_checkpoint = true takes the latest usable "
            "checkpoint of output_dir."
        )
    return checkpoint


@contextlib.contextmanager
def applying(trainer: Any, changed: Mapping[str, tuple[Any, Any]], *, total_before: int | None) -> Generator[None]:
    """Load optimizer and scheduler inside; changed settings take precedence over the loaded state.

    Args:
        trainer: trainer with a new optimizer and scheduler.
        changed: field -> (before, now).
        total_before: total steps of the run that wrote the checkpoint, over which its schedule was laid out.
    """
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    moved = bool(_SCHEDULE & set(changed)) or total_before not in (None, trainer.state.max_steps)
    own = isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) and not isinstance(
        scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
    )
    state: dict[str, Any] | None = None
    if moved and own and trainer._created_lr_scheduler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the scheduler steps before the optimizer
            for _ in range(trainer.state.global_step):
                scheduler.step()  # pyright: ignore[reportCallIssue]
        state = scheduler.state_dict()
    with keeping_hyperparameters(optimizer, changed, *(() if state is None else ("lr", "initial_lr"))):
        yield
    if state is not None:
        scheduler.load_state_dict(state)
    elif "learning_rate" in changed:
        # A schedule that follows a metric cannot be replayed, so the loaded learning rates are scaled.
        before, now = changed["learning_rate"]
        for group in optimizer.param_groups:
            for key in {"lr", "initial_lr"} & group.keys():
                group[key] *= now / before if before else 1.0


@contextlib.contextmanager
def keeping_hyperparameters(optimizer: Any, changed: Mapping[str, tuple[Any, Any]], *keys: str) -> Generator[None]:
    """Load an optimizer's state inside, and keep the changed hyperparameters and `keys` of its parameter groups."""
    now = [dict(group) for group in optimizer.param_groups]
    wanted = {*keys, *(key for name, key in _HYPERPARAMETERS.items() if name in changed)}
    yield
    for group, own in zip(optimizer.param_groups, now, strict=True):
        group.update({key: own[key] for key in wanted & own.keys()})


@contextlib.contextmanager
def keeping_dtypes(model: torch.nn.Module) -> Generator[None]:
    """Load weights inside and keep their dtypes: peft reads adapters into fp32, whatever they compute in."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


@contextlib.contextmanager
def reading(checkpoint: str | Path) -> Generator[None]:
    """Turn errors of libraries about a file of a checkpoint into one that names the checkpoint.

    Raises:
        ConfigError: the files are damaged, or of another configuration.
    """
    try:
        yield
    except BurnishError:
        raise
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _unreadable(checkpoint, error) from error
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: str | Path, error: Exception) -> ConfigError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError(
        f"resume_from_checkpoint = {str(checkpoint)!r}: it does not fit this run, or is damaged ({said:.300}). Resume "
        "with the dtype, optimizer and peft_config that wrote it, or from another checkpoint."
    )


@contextlib.contextmanager
def writing_checkpoint(folder: str | Path, what: str = "a checkpoint") -> Generator[None]:
    """Turn a full disk, as reported by torch and safetensors, into a `FileError`.

    Raises:
        FileError: `what` cannot be written.
    """
    try:
        yield
    except BurnishError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _DISK):
            raise
        raise FileError(
            f"{folder}: {what} cannot be written ({' '.join(str(error).split()):.200}). Free space or permit "
            "writing there, then resume: the checkpoints before it are whole."
        ) from error


def check_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Refuse weights of another model, which transformers would only log and skip.

    Raises:
        ConfigError: with the name of one of them.
    """
    files = sorted(checkpoint.glob("model*.safetensors"))
    if not files:  # adapters, or sharded over ranks
        return
    saved: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            saved |= set(opened.keys())
    weights = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in weights.items() if name in saved}
    absent = [name for name, tensor in weights.items() if name not in saved and tensor.data_ptr() not in loaded]
    if found := [*absent, *sorted(saved - weights.keys())]:
        lack = "lacks" if absent else "holds"
        raise ConfigError(
            f"resume_from_checkpoint: the checkpoint {lack} {found[0]} and {len(found) - 1} other weights that the "
            "model does not share with it: resume with the model and peft_config that wrote it."
        )
