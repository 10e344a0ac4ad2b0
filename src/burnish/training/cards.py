"""Model cards: a README.md with the hub's metadata and the training settings; a user's card is kept."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

from burnish.algorithms import ALGORITHMS
from burnish.config.stages import STAGES, resume_class
from burnish.runs.files import replacing, writing
from burnish.training.environment import environment

__all__ = ["CARD", "CardWriter", "keeping_card"]

logger = logging.getLogger(__name__)

CARD = "README.md"

_SIGNATURE = "<!-- Written by burnish ({}). Once it is edited, burnish leaves it alone. -->"

_ALWAYS = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "seed",
)  # fmt: skip

_NEVER = frozenset({"chat_template", "model_init_kwargs", "optim_args"})
"""Settings that may hold paths or secrets."""

_NO_METRICS = re.compile(r"epoch|step|num_tokens|total_flos|.*_runtime|.*_per_second|seconds/.*")


class CardWriter:
    """Write the model card of a trainer.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._name: str | None = None
        self._datasets: list[str] = []
        algorithm = getattr(trainer.args, "algorithm", None)
        names = dict.fromkeys((trainer.args.kind, algorithm or trainer.args.kind))
        self._tags = ["burnish", *(name.replace("_", "-") for name in names)]
        # A user's own wrapper of a model may not have tags.
        if callable(add := getattr(trainer.model, "add_model_tags", None)):
            add(list(self._tags))

    def tell(
        self, *, model_name: str | None, dataset_name: str | Sequence[str] | None, tags: str | Sequence[str] | None
    ) -> None:
        """Set the name, data sets and further tags of all later cards."""
        self._name = self._name if model_name is None else model_name
        if dataset_name is not None:
            self._datasets = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        for tag in [tags] if isinstance(tags, str) else tags or ():
            if tag not in self._tags:
                self._tags.append(tag)

    def write(self, folder: Path) -> None:
        """Let the main process write the card, unless one that burnish did not write, or that was edited, is there.

        Raises:
            FileError: it cannot be written.
        """
        if not self._trainer.is_world_process_zero():
            return
        file = folder / CARD
        if file.is_file() and not _is_own(file):
            logger.info("%s was not written by burnish, or was edited: it is kept", file)
            return
        trainer = self._trainer
        base = getattr(trainer.model.config, "_name_or_path", "") or ""
        name = self._name or (trainer.args.hub_model_id or str(folder.resolve())).rstrip("/").rsplit("/", 1)[-1]
        data = ModelCardData(
            base_model=base if _is_hub_name(base) else None,
            datasets=self._datasets or None,
            library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
            license=_licence_of(base),
            model_name=name,
            pipeline_tag="text-classification" if trainer.args.kind == "reward" else "text-generation",
            tags=self._tags,
        )
        text = f"---\n{data.to_yaml()}\n---\n\n{_body(trainer, name, base, self._datasets)}"
        with replacing(file) as stream:
            stream.write(f"{text}\n{_signature(text)}\n")


@contextmanager
def keeping_card(folder: Path) -> Generator[None]:
    """Save a model inside and keep its folder's card, into which peft would merge its template.

    Raises:
        FileError: the card cannot be restored.
    """
    file = folder / CARD
    before = (file.read_bytes(), file.stat()) if file.is_file() else None
    yield
    with writing(file):
        if before is None:
            file.unlink(missing_ok=True)
        elif file.read_bytes() != before[0]:
            file.write_bytes(before[0])
            os.utime(file, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))


def _signature(text: str) -> str:
    return _SIGNATURE.format(hashlib.sha256(text.strip().encode()).hexdigest()[:16])


def _is_own(file: Path) -> bool:
    text, _, signature = file.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")
    return signature == _signature(text)


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _licence_of(base: str) -> str | None:
    """Return the licence in the card of a local base model."""
    file = Path(base) / CARD
    if not base or not file.is_file():
        return None
    try:
        licence = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError):
        return None
    return licence if isinstance(licence, str) else None


def _body(trainer: Any, name: str, base: str, datasets: Sequence[str]) -> str:
    args, state = trainer.args, trainer.state
    stage, paper = STAGES[args.kind].method, STAGES[args.kind].paper
    origin = "" if not base else f" from {_link(base) if _is_hub_name(base) else f'`{Path(base).name}`'}"
    data = "" if not datasets else f" on {', '.join(_link(name, 'datasets/') for name in datasets)}"
    lines = [f"# {name}", "", f"Trained{origin}{data} with [burnish](https://pypi.org/project/burnish/).", ""]
    lines += ["## Training", "", f"Stage: {stage}{_cited(paper)}."]
    algorithm = ALGORITHMS.get(getattr(args, "algorithm", None) or "")
    if algorithm is not None:
        lines.append(f"Algorithm: `{args.algorithm}`{_cited(algorithm.paper)}: {algorithm.summary}.")
    adapters = cast("Mapping[str, Any]", getattr(trainer.model, "peft_config", None) or {})
    for config in adapters.values():
        rank = f", rank {config.r}" if hasattr(config, "r") else ""
        lines.append(f"Adapters: {getattr(config.peft_type, 'value', config.peft_type)}{rank}.")
    lines.append(f"{state.global_step:,} optimizer steps.")
    tables = (("Settings", "setting", _settings(args)), ("Final metrics", "metric", _metrics(state.log_history)))
    for title, header, rows in tables:
        if rows:
            lines += ["", f"## {title}", "", f"| {header} | value |", "| --- | --- |"]
            lines += [f"| `{name}` | {value} |" for name, value in rows.items()]
    versions = environment()["versions"]
    lines += ["", "## Versions", "", ", ".join(f"{package} {version}" for package, version in versions.items()), ""]
    return "\n".join(lines)


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else f"`{name}`"


def _cited(paper: str) -> str:
    return f" ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else ""


def _settings(args: Any) -> dict[str, Any]:
    """Return the settings that reproduce the run: a few always, others if they are not the default."""
    fields: Mapping[str, Any] = args.__dataclass_fields__
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    found = {name: getattr(args, name) for name in (length, *_ALWAYS)}
    for name, field in fields.items():
        value = getattr(args, name)
        matters = resume_class(name) != "free" and name not in _NEVER
        is_plain = isinstance(value, bool | int | float | str | list)
        if name not in found and matters and is_plain and value != field.default:
            found[name] = value
    return {name: getattr(value, "value", value) for name, value in found.items()}


def _metrics(history: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the metrics of the last training log and the last evaluation."""
    trained = [log for log in history if "loss" in log]
    evaluated = [log for log in history if any(name.startswith("eval_") for name in log)]
    last = {name: value for logs in (trained, evaluated) if logs for name, value in logs[-1].items()}
    return {name: f"{value:.4g}" for name, value in last.items() if not _NO_METRICS.fullmatch(name)}
