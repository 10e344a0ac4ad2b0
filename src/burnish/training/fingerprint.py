"""Describe a run by stage, settings, data, models and processes, and find how two descriptions differ."""

from __future__ import annotations

import enum
import hashlib
import json
import logging
from array import array
from collections.abc import Collection, Generator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import is_fake

from burnish.config.online_fields import micro_batches_per_rollout
from burnish.config.stages import resume_class
from burnish.errors import ConfigError
from burnish.runs.checkpoints import RUN
from burnish.runs.files import read_json
from burnish.types import Group

__all__ = ["adapter_settings", "changed_settings", "data_digest", "describe_run", "model_digest", "trained_digest"]

logger = logging.getLogger(__name__)

_SAMPLED_GROUPS = 2048
"""Groups whose tokens are hashed; of the others only the lengths are."""

_SAMPLED_WEIGHTS = 16
"""Values hashed of each tensor."""


def describe_run(
    args: Any,
    *,
    model: torch.nn.Module,
    base: str,
    train_dataset: Any,
    others: Mapping[str, str],
    rewards: Sequence[str],
) -> dict[str, Any]:
    """Describe a run by everything that its next step depends on, as plain JSON.

    Args:
        args: the trainer's config.
        model: the model to train, adapters included.
        base: digest of the model before new adapters were added.
        train_dataset: groups, or a stream of them.
        others: digests of other models by argument, such as ref_model.
        rewards: names of the criteria.
    """
    micro = args.per_device_train_batch_size * args.world_size
    batch = micro * args.gradient_accumulation_steps
    asked = getattr(args, "steps_per_generation", None)
    return {
        "burnish": version("burnish"),
        "stage": args.kind,
        "world_size": args.world_size,
        "batch": batch,
        "rollout": micro * micro_batches_per_rollout(asked, args.gradient_accumulation_steps),
        "settings": _settings(args),
        "data": data_digest(train_dataset),
        "models": {"model": base, **others},
        "trained": trained_digest(model),
        "adapters": adapter_settings(model),
        "rewards": list(rewards),
    }


def data_digest(groups: Any) -> str:
    """Hash the lengths of all groups, and tokens and plain columns of a sample; for a stream, return its type."""
    if not isinstance(groups, Sequence):
        return f"stream of {type(getattr(groups, 'rows', groups)).__name__}"
    rows = cast("Sequence[Group]", groups)
    lengths = array("q")
    for group in rows:
        lengths.extend((group.index, len(group.prompt_ids), *(len(c.token_ids) for c in group.completions)))
    digest = hashlib.sha256(lengths.tobytes())
    for number in _spaced(len(rows), _SAMPLED_GROUPS):
        digest.update(_group_bytes(rows[number]))
    return f"{len(rows)} groups {digest.hexdigest()[:16]}"


@torch.no_grad()
def model_digest(model: torch.nn.Module) -> str:
    """Hash names, shapes and some values of a model's weights, without the random initial values of adapters."""
    digest = hashlib.sha256()
    for name, weights in model.named_parameters():
        digest.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        has_values = weights.device.type != "meta" and not is_fake(weights)
        if "lora_A" not in name and "lora_embedding_A" not in name and has_values:
            indices = torch.tensor(list(_spaced(weights.numel(), _SAMPLED_WEIGHTS)), device=weights.device)
            digest.update(weights.detach().flatten()[indices].double().cpu().numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


def trained_digest(model: torch.nn.Module) -> str:
    """Hash names, shapes and dtypes of the weights that train."""
    trained = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters() if p.requires_grad]
    return f"{len(trained)} tensors {hashlib.sha256(repr(trained).encode()).hexdigest()[:16]}"


_ADAPTER_NOTES = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "runtime_config", "task_type",
)  # fmt: skip


def adapter_settings(model: Any) -> dict[str, Any]:
    """Return the settings that affect the adapters of a model, by adapter and field."""
    configs = cast("Mapping[str, Any]", getattr(model, "peft_config", None) or {})
    return {
        name: {key: _plain(value) for key, value in config.to_dict().items() if key not in _ADAPTER_NOTES}
        for name, config in configs.items()
    }


def _settings(args: Any) -> dict[str, Any]:
    names = [name for name in args.__dataclass_fields__ if resume_class(name) != "free"]
    values = {name: _plain(getattr(args, name)) for name in names}
    template = values.get("chat_template")
    if isinstance(template, str) and len(template) < 1000 and Path(template).is_file():
        values["chat_template"] = hashlib.sha256(Path(template).read_bytes()).hexdigest()  # the file may move
    return values


def _plain(value: Any) -> Any:
    """Convert a value to plain JSON types, equal for equal settings."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in cast("Collection[Any]", value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _group_bytes(group: Group) -> bytes:
    columns = {key: value for key, value in group.row.items() if isinstance(value, bool | int | float | str)}
    tokens = [group.prompt_ids, *(c.token_ids for c in group.completions)]
    masks = [c.loss_mask for c in group.completions]
    return json.dumps([tokens, masks, columns], sort_keys=True).encode()


def _spaced(length: int, number: int) -> Collection[int]:
    """Return up to `number` evenly spaced indices, from the first to the last."""
    if length <= number:
        return range(length)
    return [i * (length - 1) // (number - 1) for i in range(number)]


def changed_settings(checkpoint: Path, now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from the checkpoint's and may change on a resume, as (before, now).

    Raises:
        ConfigError: the checkpoint is of another run.
    """
    before = read_json(checkpoint / RUN)
    if before is None:
        logger.warning(
            "%s was written by an earlier version of burnish, without a record of its run: nothing checks that "
            "settings, data and model are those that wrote it",
            checkpoint,
        )
        return {}
    if problems := list(_differences(before, now)):
        raise ConfigError(
            f"resume_from_checkpoint = {str(checkpoint)!r} is of another run: {'; '.join(problems)}. Set back what "
            "changed to continue that run; or train a new one in another output_dir, from model = "
            f"{str(checkpoint)!r} where its weights are wanted."
        )
    applied = {name: pair for name, pair in _changed(before, now).items() if resume_class(name) == "applied"}
    told = dict(applied)
    for name in ("world_size", "rewards"):
        if before.get(name) != now[name]:
            told[name] = (before.get(name), now[name])
    if told:
        changes = ", ".join(f"{name} = {new!r} (was {old!r})" for name, (old, new) in told.items())
        logger.warning("resuming %s with %s", checkpoint, changes)
    return applied


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    # A field that only one of two versions of transformers has cannot be compared.
    old, new = before["settings"], now["settings"]
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Generator[str]:
    """Yield the differences that make two descriptions those of different runs."""
    if before["stage"] != now["stage"]:
        yield f"stage {now['stage']}, it was {before['stage']}"
        return
    for name, (old, new) in _changed(before, now).items():
        if resume_class(name) == "refused":
            yield f"{name} = {new!r}, it was {old!r}"
    if before["data"] != now["data"]:
        yield f"train_dataset differs ({now['data']}, it was {before['data']})"
    for name in sorted({*before["models"], *now["models"]}):
        old, new = before["models"].get(name), now["models"].get(name)
        if old != new:
            yield f"{name} is not the one that the run began with ({new}, it was {old})"
    for name, what in (("batch", "completions or rows of an optimizer step"), ("rollout", "completions of a rollout")):
        if before[name] != now[name]:
            yield f"{now[name]} {what}, it was {before[name]} (per_device_train_batch_size x processes x accumulation)"
    yield from _adapter_differences(before, now)


def _adapter_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Generator[str]:
    old, new = before["adapters"], now["adapters"]
    if set(old) != set(new):
        yield f"adapters {sorted(new) or 'none'}, it was {sorted(old) or 'none'} (peft_config)"
        return
    found = False
    for adapter, fields in new.items():
        for name in sorted(fields.keys() & old[adapter].keys()):
            if fields[name] != old[adapter][name]:
                found = True
                yield f"peft_config.{name} = {fields[name]!r}, it was {old[adapter][name]!r}"
    if not found and before["trained"] != now["trained"]:
        yield f"other weights train ({now['trained']}, it was {before['trained']})"
