"""What a run is: its stage, settings, data, models and processes, cheap to compute and written into each checkpoint."""

from __future__ import annotations

import enum
import hashlib
import json
from array import array
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from burnish.config.online_fields import micro_batches_per_rollout
from burnish.config.stages import resume_class
from burnish.types import Group

__all__ = ["adapter_settings", "data_digest", "describe_run", "model_digest", "trained_digest"]

_SAMPLED_GROUPS = 2048
"""Groups whose tokens are read; of the others only the lengths are."""

_SAMPLED_WEIGHTS = 16
"""Values read of each tensor."""


def describe_run(
    args: Any,
    *,
    model: torch.nn.Module,
    base: str,
    train_dataset: Any,
    others: Mapping[str, str],
    rewards: Sequence[str],
) -> dict[str, Any]:
    """Describe a run by all that its next step depends on, as plain JSON.

    Args:
        args: the trainer's config.
        model: as it is trained, adapters included.
        base: digest of the model before it got new adapters.
        train_dataset: groups, or a stream of them.
        others: digests of further models by argument, such as ref_model.
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
    """Hash the lengths of all groups, and the tokens and plain columns of a sample; of a stream, its kind."""
    if not isinstance(groups, Sequence):
        return f"stream of {type(getattr(groups, 'rows', groups)).__name__}"
    rows = cast("Sequence[Group]", groups)
    lengths = array("q")
    for group in rows:
        lengths.extend((group.index, len(group.prompt_ids), *(len(c.token_ids) for c in group.completions)))
    digest = hashlib.sha256(lengths.tobytes())
    for number in _spread(len(rows), _SAMPLED_GROUPS):
        digest.update(_group_bytes(rows[number]))
    return f"{len(rows)} groups {digest.hexdigest()[:16]}"


@torch.no_grad()
def model_digest(model: torch.nn.Module) -> str:
    """Hash names, shapes and some values of a model's weights; those of adapters that are drawn anew are left out."""
    digest = hashlib.sha256()
    for name, weights in model.named_parameters():
        digest.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        if "lora_A" not in name and "lora_embedding_A" not in name and weights.device.type != "meta":
            places = torch.tensor(list(_spread(weights.numel(), _SAMPLED_WEIGHTS)), device=weights.device)
            digest.update(weights.detach().flatten()[places].double().cpu().numpy().tobytes())
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
    """Return what shapes and scales the adapters of a model, by adapter and field."""
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
    """The value as a JSON file gives it back, equal for equal settings."""
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


def _spread(length: int, number: int) -> Collection[int]:
    """Up to `number` places from the first to the last."""
    if length <= number:
        return range(length)
    return [place * (length - 1) // (number - 1) for place in range(number)]
