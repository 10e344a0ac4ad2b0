"""Adapters of peft: new ones on a model, saved ones on their base; both compute in the base's dtype."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from burnish.errors import ConfigError, ModelError
from burnish.model.adapter_checks import check_fit, refuse_outside_weights

__all__ = [
    "Exact",
    "SavedAdapters",
    "add_adapters",
    "carries_adapters",
    "put_adapters",
    "saved_adapters",
    "without_adapters",
    "without_base_config",
]

logger = logging.getLogger(__name__)

Exact = dict[torch.nn.Parameter, torch.Tensor]
"""fp32 values of parameters that were rounded."""


class SavedAdapters:
    """A folder of adapters without their base.

    Attributes:
        folder: where they are.
        base: name or path of the model they belong to.
        task_type: what peft calls the model's task, or None.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self.folder = folder
        refuse_outside_weights(config.get("peft_type"), f"model = {str(folder)!r}")
        self.task_type: str | None = config.get("task_type")
        self._base: str | None = config.get("base_model_name_or_path")

    @property
    def base(self) -> str:
        """Name or path of the base.

        Raises:
            ModelError: the folder names none, or one that is not there.
        """
        fix = (
            "set base_model_name_or_path in adapter_config.json, or load the base yourself, put the adapters on it "
            "with peft.PeftModel.from_pretrained(base, folder, is_trainable=True), and pass the model"
        )
        if not self._base:
            raise ModelError(f"model = {str(self.folder)!r}: adapters that do not name their base: {fix}.")
        if Path(self._base).is_absolute() and not Path(self._base).exists():
            raise ModelError(f"model = {str(self.folder)!r}: its base {self._base!r} does not exist: {fix}.")
        return self._base


def saved_adapters(name: str | Path) -> SavedAdapters | None:
    """The adapters in a folder, or None where it holds a model (or is no folder)."""
    folder = Path(name).expanduser()
    alone = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return SavedAdapters(folder) if alone else None


def add_adapters(model: Any, peft_config: Any, *, seed: int) -> tuple[Any, Exact]:
    """New adapters on a model, drawn from a seed and so the same on every rank.

    peft's `prepare_model_for_kbit_training` is not called: it would hold norms, embeddings and the head in fp32, and
    the residual stream with them. What is frozen keeps its dtype, adapters have the model's, and fp32 masters take the
    steps.

    Args:
        model: in memory; changed in place.
        peft_config: of peft; not changed. Without a `task_type` it is that of a causal language model.
        seed: of the new weights.

    Returns:
        The `PeftModel`, and fp32 values of the adapters' weights that were rounded.

    Raises:
        ConfigError: adapters that do not fit the model.
        ModelError: the model has adapters already.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ModelError("peft_config was given with a model that already has adapters: pass one or the other.")
    refuse_outside_weights(peft_config.peft_type, "peft_config")
    model = _without_earlier(model)
    check_fit(peft_config, model)
    config = copy.deepcopy(peft_config)
    config.task_type = config.task_type or "CAUSAL_LM"
    with torch.random.fork_rng(devices=[]):
        # peft draws on the CPU. Ranks that drew their own would keep masters of their own.
        torch.default_generator.manual_seed(seed)
        try:
            made = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ConfigError(f"peft_config does not fit {type(model).__name__}: {error}") from error
    return made, _round_trained(made)


def carries_adapters(model: Any) -> bool:
    """Whether adapters were put into a bare model, which peft does in place when it wraps one."""
    layers = (type(module).__module__.startswith("peft.") for module in model.modules())
    return not hasattr(model, "get_base_model") and any(layers)


def _without_earlier(model: Any) -> Any:
    """The base of a bare model that an earlier trainer has put adapters into: its weights in modules of its own.

    The earlier trainer's model keeps its adapters.

    Raises:
        ModelError: the adapters were put there by transformers (`load_adapter`, `add_adapter`), to be used.
    """
    if not carries_adapters(model):
        return model
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "peft_config was given with a model that has adapters (load_adapter, add_adapter): pass one or the other."
        )
    logger.warning(
        "%s carries the adapters of an earlier trainer: the new ones go on its base without them. Pass that trainer's "
        "`model` to train them further.",
        type(model).__name__,
    )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # A copy of the modules alone: deepcopy takes every tensor in `shared` for copied already.
    base = copy.deepcopy(model, shared)
    for name, module in list(base.named_modules()):
        if hasattr(module, "base_layer") and callable(getattr(module, "get_base_layer", None)):
            base.set_submodule(name, module.get_base_layer())
        elif hasattr(module, "original_module"):
            base.set_submodule(name, module.original_module)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def put_adapters(model: Any, saved: SavedAdapters) -> tuple[Any, Exact]:
    """Saved adapters on their base, ready to be trained further.

    Args:
        model: the base, in memory; changed in place.
        saved: the adapters.

    Returns:
        As `add_adapters`.
    """
    from peft import PeftModel

    made = PeftModel.from_pretrained(model, str(saved.folder), is_trainable=True, autocast_adapter_dtype=False)
    return made, _round_trained(made)


@contextmanager
def without_adapters(model: Any) -> Generator[None]:
    """Switch the adapters of a peft model off; afterwards every weight is as frozen or trained as it was before.

    peft's own `disable_adapter` makes all active adapters trainable at its end, those that were frozen by hand too.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)


@contextmanager
def without_base_config() -> Generator[None]:
    """Save adapters without a warning that their base has no config.json: one in a GGUF file has none.

    peft looks there for another size of the vocabulary, which would make it save the embeddings; burnish resizes none.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        yield


def _round_trained(model: Any) -> Exact:
    """Cast fp32 adapters, which peft makes on some quantised layers, to a 16-bit model's dtype."""
    embedding = model.get_input_embeddings()
    dtype = embedding.weight.dtype
    exact: Exact = {}
    if dtype not in (torch.bfloat16, torch.float16):
        return exact
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32:
            exact[parameter] = parameter.detach()
            parameter.data = parameter.data.to(dtype)
    return exact
