"""peft adapters in the base model's dtype: new ones on a model, and saved ones on their base."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from burnish.errors import ConfigError, ModelError
from burnish.model.adapter_checks import check_fit, refuse_outside_weights
from burnish.model.adapter_files import SavedAdapters

__all__ = [
    "Exact",
    "add_adapters",
    "carries_adapters",
    "copy_modules",
    "put_adapters",
    "saving_adapters",
    "without_adapters",
]

logger = logging.getLogger(__name__)

Exact = dict[torch.nn.Parameter, torch.Tensor]
"""Exact fp32 values of parameters that were rounded."""


def add_adapters(model: Any, peft_config: Any, *, seed: int) -> tuple[Any, Exact]:
    """Add new adapters to a model, drawn from a seed so that they are the same on every rank.

    peft's `prepare_model_for_kbit_training` is not called: it would cast norms, embeddings and the head to fp32, and
    the residual stream with them. Frozen weights keep their dtype, adapters get the model's, and the optimizer steps
    fp32 masters.

    Args:
        model: in memory; changed in place.
        peft_config: a peft configuration, not changed; its `task_type` defaults to a causal language model.
        seed: seed of the new weights.

    Returns:
        The `PeftModel`, and exact fp32 values of the adapter weights that were rounded.

    Raises:
        ConfigError: the adapters do not fit the model.
        ModelError: the model already has adapters.
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
        # peft draws on the CPU from the global generator, whose state may differ between ranks.
        torch.default_generator.manual_seed(seed)
        try:
            made = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ConfigError(f"peft_config does not fit {type(model).__name__}: {error}") from error
    return made, _round_trained(made)


def carries_adapters(model: Any) -> bool:
    """Tell whether a bare model holds adapters: peft adds them in place when it wraps a model."""
    layers = (type(module).__module__.startswith("peft.") for module in model.modules())
    return not hasattr(model, "get_base_model") and any(layers)


def _without_earlier(model: Any) -> Any:
    """Rebuild the base of a model that an earlier trainer added adapters to, in new modules around the same weights.

    The earlier trainer's model keeps its adapters.

    Raises:
        ModelError: the adapters were added by transformers (`load_adapter`, `add_adapter`), so they are meant.
    """
    if not carries_adapters(model):
        return model
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "peft_config was given with a model that has adapters (load_adapter, add_adapter): pass one or the other."
        )
    logger.warning(
        "%s carries the adapters of an earlier trainer: new ones are added to its base without them. Pass that "
        "trainer's `model` to train them further.",
        type(model).__name__,
    )
    base = copy_modules(model)
    replaced = " "
    for name, module in list(base.named_modules()):
        if name.startswith(replaced):
            continue  # inside a replaced module, such as the layer of trained tokens
        if callable(getattr(module, "get_base_layer", None)) or hasattr(module, "original_module"):
            base.set_submodule(name, _innermost(name, module)[1])
            replaced = f"{name}."
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def put_adapters(model: Any, saved: SavedAdapters) -> tuple[Any, Exact]:
    """Load saved adapters onto their base for further training.

    Where the vocabulary was resized before the adapters were trained, the base is resized to the embeddings that peft
    saved with them.

    Args:
        model: the base, in memory; changed in place.
        saved: the adapters.

    Returns:
        As `add_adapters`.

    Raises:
        ModelError: the adapters do not fit the base.
    """
    from peft import PeftConfig, PeftModel

    if saved.note is not None:
        logger.warning("%s", saved.note)
    _resize_vocabulary(model, saved)
    folder = str(saved.folder)
    try:
        config = PeftConfig.from_pretrained(folder)
        # A path relative to this folder would be wrong in the folder that they are saved to next.
        config.base_model_name_or_path = saved.base
        made = PeftModel.from_pretrained(model, folder, config=config, is_trainable=True, autocast_adapter_dtype=False)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model = {folder!r}: the adapters do not fit their base {saved.base!r} ({reason:.500}). Set "
            "base_model_name_or_path in adapter_config.json to the model that they were trained on."
        ) from error
    return made, _round_trained(made)


def _resize_vocabulary(model: Any, saved: SavedAdapters) -> None:
    """Resize the base to the vocabulary that the adapters were trained with, whose embeddings they hold."""
    layers = _vocabulary_layers(model)
    sizes = {name: rows for name in layers if (rows := saved.rows(name)) is not None}
    before = {name: int(layer.weight.shape[0]) for name, layer in layers.items()}
    if all(rows == before[name] for name, rows in sizes.items()):
        return
    rows = max(sizes.values())
    lost = _not_saved(layers, saved) or [name for name, size in sizes.items() if size != rows]
    if lost:
        raise ModelError(
            f"model = {str(saved.folder)!r}: the adapters are for {rows} tokens, {lost[0]} of their base "
            f"{saved.base!r} has {before[lost[0]]}, and {lost[0]} was not saved with them, so its rows of the other "
            "tokens are lost. Save the resized base (save_pretrained), and train adapters on that."
        )
    with torch.random.fork_rng(devices=[]):
        # Every row is then read from the file.
        model.resize_token_embeddings(rows, mean_resizing=False)
    logger.info("the base was resized from %d to the %d tokens of its adapters", min(before.values()), rows)


@contextmanager
def without_adapters(model: Any) -> Generator[None]:
    """Disable a peft model's adapters inside, and restore every `requires_grad` on exit.

    peft's own `disable_adapter` leaves all active adapters trainable, also those that were frozen by hand.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)


def copy_modules(model: Any) -> Any:
    """Copy the modules of a model, which then shares its tensors with the copy."""
    # An embedding in host memory holds its weight outside the parameters.
    outside = (
        value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)
    )
    # deepcopy takes every tensor in its memo, which is keyed by id, for already copied.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *outside)})


@contextmanager
def saving_adapters(model: Any, folder: str | Path) -> Generator[None]:
    """Add the embeddings of a resized vocabulary to the adapters that peft saves inside.

    peft omits them where it finds no config.json of the base (in a GGUF file, or on the hub while offline), and saves
    only one of the two where only that one has adapters.

    Args:
        model: with or without adapters; without, nothing is added.
        folder: where its `save_pretrained` writes.
    """
    with warnings.catch_warnings():
        # These warn of the omission that is mended below.
        for begin in ("Could not find a config file in", "Setting `save_embedding_layers`", "Unable to fetch remote"):
            warnings.filterwarnings("ignore", begin, UserWarning)
        yield
    file = Path(folder) / "adapter_model.safetensors"
    if not hasattr(model, "peft_config") or not file.is_file():
        return
    name = next(iter(model.peft_config.values())).base_model_name_or_path
    before = _stored_vocabulary(str(name)) if name else None
    if before is None or model.config.get_text_config().vocab_size == before:
        return
    layers, saved = _vocabulary_layers(model.get_base_model()), SavedAdapters(Path(folder))
    missing = _not_saved(layers, saved)
    if not missing:
        return
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in missing:
        inner, layer = _innermost(name, layers[name])
        tensors[f"base_model.model.{inner}.weight"] = layer.weight.detach().cpu().contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@functools.cache
def _stored_vocabulary(name: str) -> int | None:
    """Read the vocabulary size of a stored base; None where it is unknown."""
    from transformers import AutoConfig

    files = sorted(Path(name).glob("*.gguf")) if Path(name).is_dir() else []
    with_file = {"gguf_file": files[0].name} if files and not (Path(name) / "config.json").is_file() else {}
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, **with_file)
    except Exception:  # any base may fail to load: then peft's own choice stands
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def _vocabulary_layers(model: Any) -> dict[str, Any]:
    """Return the input and output embeddings of a model by name."""
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {names[layer]: layer for layer in ends if layer is not None and layer in names}


def _not_saved(layers: Mapping[str, Any], saved: SavedAdapters) -> list[str]:
    """Return the embeddings that are not saved with the adapters; tied ones are saved with each other."""
    known = [name for name in layers if saved.whole(name) is not None]
    tied = len({_innermost(name, layer)[1].weight.data_ptr() for name, layer in layers.items()}) == 1
    return [] if tied and known else [name for name in layers if name not in known]


def _innermost(name: str, layer: Any) -> tuple[str, Any]:
    """Return the name and module of the base's own layer inside peft's wrappers."""
    for inner in ("token_adapter", "original_module", "base_layer"):
        if isinstance(child := getattr(layer, inner, None), torch.nn.Module):
            # Trained tokens keep the original module inside their adapter.
            return _innermost(f"{name}.{inner}", child)
    return name, layer


def _round_trained(model: Any) -> Exact:
    """Cast fp32 adapters, which peft creates on some quantised layers, to a 16-bit model's dtype."""
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
