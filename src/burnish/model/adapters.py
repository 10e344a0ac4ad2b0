"""Adapters of peft: new ones on a model, saved ones on their base; both compute in the base's dtype."""

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
    "put_adapters",
    "saving_adapters",
    "without_adapters",
]

logger = logging.getLogger(__name__)

Exact = dict[torch.nn.Parameter, torch.Tensor]
"""fp32 values of parameters that were rounded."""


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
    replaced = " "
    for name, module in list(base.named_modules()):
        if name.startswith(replaced):
            continue  # inside of what is gone, such as the layer of trained tokens
        if callable(getattr(module, "get_base_layer", None)) or hasattr(module, "original_module"):
            base.set_submodule(name, _innermost(name, module)[1])
            replaced = f"{name}."
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def put_adapters(model: Any, saved: SavedAdapters) -> tuple[Any, Exact]:
    """Saved adapters on their base, ready to be trained further.

    A base whose vocabulary was resized in memory before the adapters were trained is resized to the embeddings that
    peft saved with them.

    Args:
        model: the base, in memory; changed in place.
        saved: the adapters.

    Returns:
        As `add_adapters`.

    Raises:
        ModelError: they do not fit the base.
    """
    from peft import PeftConfig, PeftModel

    if saved.note is not None:
        logger.warning("%s", saved.note)
    _resize_vocabulary(model, saved)
    folder = str(saved.folder)
    try:
        config = PeftConfig.from_pretrained(folder)
        # Where they are saved next, a path relative to this folder would lead nowhere.
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
    """Give the base the tokens that the adapters were trained with, whose embeddings are saved with them."""
    layers = _vocabulary_layers(model)
    sizes = {name: rows for name in layers if (rows := saved.rows(name)) is not None}
    before = {name: int(layer.weight.shape[0]) for name, layer in layers.items()}
    if all(rows == before[name] for name, rows in sizes.items()):
        return
    rows = max(sizes.values())
    lost = _not_saved(layers, saved) or [name for name, size in sizes.items() if size != rows]
    if lost:
        raise ModelError(
            f"model = {str(saved.folder)!r}: the adapters are for {rows} tokens and {lost[0]} of their base "
            f"{saved.base!r} has {before[lost[0]]}, and {lost[0]} was not saved with them, so its rows of the other "
            "tokens are lost. Save the resized base (save_pretrained), and train adapters on that."
        )
    with torch.random.fork_rng(devices=[]):
        # Every row is read from the file afterwards.
        model.resize_token_embeddings(rows, mean_resizing=False)
    logger.info("the base has %d tokens, as its adapters had; it had %d", rows, min(before.values()))


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
def saving_adapters(model: Any, folder: str | Path) -> Generator[None]:
    """Complete what peft writes inside: embeddings of a vocabulary that was resized are saved with the adapters.

    peft leaves them out where it finds no config.json of the base (one in a GGUF file, one on the hub while offline),
    and saves one of two where adapters are on that one only.

    Args:
        model: with or without adapters; without, nothing is added.
        folder: where its `save_pretrained` writes.
    """
    with warnings.catch_warnings():
        # What they tell of is looked after here.
        for begin in ("Could not find a config file in", "Setting `save_embedding_layers`", "Unable to fetch remote"):
            warnings.filterwarnings("ignore", begin, UserWarning)
        yield
    file = Path(folder) / "adapter_model.safetensors"
    if not hasattr(model, "peft_config") or not file.is_file() or not _was_resized(model):
        return
    layers, saved = _vocabulary_layers(model.get_base_model()), SavedAdapters(Path(folder))
    missing = _not_saved(layers, saved)
    if not missing:
        return
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in missing:
        place, layer = _innermost(name, layers[name])
        tensors[f"base_model.model.{place}.weight"] = layer.weight.detach().cpu().contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _was_resized(model: Any) -> bool:
    """Whether the model has another vocabulary than its base as it is stored; False where that cannot be known."""
    base = next(iter(model.peft_config.values())).base_model_name_or_path
    before = _stored_vocabulary(str(base)) if base else None
    return before is not None and model.config.get_text_config().vocab_size != before


@functools.cache
def _stored_vocabulary(name: str) -> int | None:
    from transformers import AutoConfig

    files = sorted(Path(name).glob("*.gguf")) if Path(name).is_dir() else []
    with_file = {"gguf_file": files[0].name} if files and not (Path(name) / "config.json").is_file() else {}
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, **with_file)
    except Exception:  # of any base: then peft's own judgement holds
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def _vocabulary_layers(model: Any) -> dict[str, Any]:
    """The input and output embedding of a model by name."""
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {names[layer]: layer for layer in ends if layer is not None and layer in names}


def _not_saved(layers: Mapping[str, Any], saved: SavedAdapters) -> list[str]:
    """Of a model's embeddings, those that are not with the adapters; a tied one is there with the other."""
    known = [name for name in layers if saved.whole(name) is not None]
    tied = len({_innermost(name, layer)[1].weight.data_ptr() for name, layer in layers.items()}) == 1
    return [] if tied and known else [name for name in layers if name not in known]


def _innermost(name: str, layer: Any) -> tuple[str, Any]:
    """The base's own layer inside what peft has wrapped it in, and its name."""
    for inner in ("token_adapter", "original_module", "base_layer"):
        if isinstance(child := getattr(layer, inner, None), torch.nn.Module):
            # The original module of trained tokens is in their adapter.
            return _innermost(f"{name}.{inner}", child)
    return name, layer


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
