"""Loading a model and its tokenizer: from a path or a package, in memory as it is, with the dtype policy applied."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from burnish.config.paths import expanded, is_file
from burnish.data.chat import resolve_chat_template
from burnish.errors import ConfigError, ModelError
from burnish.model.adapter_files import SavedAdapters, saved_adapters
from burnish.model.adapters import put_adapters
from burnish.model.quantization import is_quantized, keep_layout, resolve_quantization
from burnish.model.sources import ModelSource, find_model, hub_arguments, reach, reading_model
from burnish.progress import phase

__all__ = [
    "adopt_chat_template",
    "compute_dtype",
    "load_model",
    "load_processing_class",
]

logger = logging.getLogger(__name__)


def compute_dtype(*, bf16: bool) -> torch.dtype:
    """The dtype that the forward and backward compute in."""
    return torch.bfloat16 if bf16 else torch.float32


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    bf16: bool,
    init_kwargs: Mapping[str, Any] | None = None,
    auto_class: Any = AutoModelForCausalLM,
    own_weights: bool = False,
) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
    """Load a model in its compute dtype; a model in memory is used as it is.

    Weights stored in fp32 (and GGUF's, dequantised) are read in fp32; where bf16 computes, the exact values are handed
    out so that masters start from them and not from rounded ones. Where the weights are quantised, the rest is read in
    the compute dtype. A folder of adapters is loaded on the base that it names, which gets `init_kwargs`.

    Args:
        model: name, folder (of a model or of adapters), .gguf file, package, or a model.
        bf16: compute in bf16.
        init_kwargs: passed to `from_pretrained` (`model_init_kwargs`); an explicit `dtype` wins over `bf16`, and
            `quantization_config` may be a word or a table (see `resolve_quantization`).
        auto_class: what loads it; a causal language model by default.
        own_weights: read the whole model of a folder that holds adapters of it, too, without them.

    Returns:
        The model, and fp32 values by parameter for those rounded here.

    Raises:
        ModelError: no such model, or `init_kwargs` beside a model in memory.
        ConfigError: a bad `quantization_config`.
    """
    kwargs = dict(init_kwargs or {})
    if not isinstance(model, str | Path):
        if kwargs:
            raise ModelError(
                f"model_init_kwargs = {kwargs!r} beside a model in memory: load the model with them, or pass its path."
            )
        given: Any = model
        if not isinstance(given.get_base_model() if hasattr(given, "get_base_model") else given, PreTrainedModel):
            raise ModelError(
                f"model = {type(model).__name__}: use a model of transformers, with or without adapters, or the name "
                "or folder of one."
            )
        keep_layout(model)
        return model, {}
    source = find_model(model)
    if not own_weights and (adapters := saved_adapters(source.name)) is not None:
        _check_language_model(adapters)
        adapters.check_sizes(find_model(adapters.base).name)
        base, _ = load_model(
            adapters.base, bf16=bf16, init_kwargs=init_kwargs, auto_class=auto_class, own_weights=adapters.is_own_base
        )
        return put_adapters(base, adapters)
    explicit = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    quantization = kwargs.pop("quantization_config", None)
    if quantization is not None:
        return _load_quantized(source, quantization, explicit or compute_dtype(bf16=bf16), kwargs, auto_class), {}
    loaded = _load_plain(source, explicit or torch.float32, kwargs, auto_class)
    exact: dict[torch.nn.Parameter, torch.Tensor] = {}
    if explicit is None and bf16:
        exact = _round_parameters(loaded, compute_dtype(bf16=True))
    return loaded, {} if is_quantized(loaded) else exact


def _load_plain(source: ModelSource, dtype: Any, kwargs: Mapping[str, Any], auto_class: Any) -> Any:
    fix = "Name a folder written by save_pretrained, a .gguf file, or a hub name"
    place = reach(source, kwargs)
    with (
        phase(f"loading {source.name}"),
        reading_model(source.name, "model", fix),
        _without_adapter_files(place) as name,
    ):
        loaded, info = auto_class.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **source.kwargs, **kwargs
        )
    loaded.name_or_path = loaded.config._name_or_path = source.name
    _refuse_missing(source.name, loaded, info["missing_keys"])
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model = {source.name!r}: adapters on the hub. Download them (`hf download`) and pass the folder."
        )
    drop_gguf_config(loaded)
    keep_layout(loaded)
    return loaded


@contextmanager
def _without_adapter_files(name: str) -> Generator[str]:
    """A folder's own model: transformers puts adapters beside it on it, and fails over an adapter_config.json alone."""
    folder = expanded(name)
    if not is_file(folder / "adapter_config.json"):
        yield name
        return
    with tempfile.TemporaryDirectory() as view:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                Path(view, file.name).symlink_to(file.resolve())
        yield view


def _load_quantized(source: ModelSource, quantization: Any, dtype: Any, kwargs: dict[str, Any], auto_class: Any) -> Any:
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    config = resolve_quantization(quantization, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    kwargs = {**kwargs, "quantization_config": config}
    if source.gguf_file is None:
        return _load_plain(source, dtype, kwargs, auto_class)
    # transformers quantises what it reads from safetensors, and from them only.
    with tempfile.TemporaryDirectory() as folder:
        _load_plain(source, dtype, {}, auto_class).save_pretrained(folder)
        loaded = _load_plain(ModelSource(folder), dtype, kwargs, auto_class)
    loaded.name_or_path = loaded.config._name_or_path = source.name
    return loaded


def _check_language_model(adapters: SavedAdapters) -> None:
    if adapters.task_type == "SEQ_CLS":
        raise ModelError(
            f"model = {str(adapters.folder)!r}: adapters of a reward model, where a language model is needed."
        )


def _refuse_missing(model: str | Path, loaded: Any, missing: Collection[str]) -> None:
    """Weights that the files lack would be random: a reward model or a bare decoder taken for a language model."""
    if missing:
        names = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"model = {str(model)!r}: its files lack {len(missing)} weights of {type(loaded).__name__} ({names}), "
            "which would start random. Name a model that was saved as one, or load it yourself and pass it."
        )


def _round_parameters(model: PreTrainedModel, dtype: torch.dtype) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Cast the parameters and hand out their exact values.

    Buffers keep their dtype (`model.to` would round rotary frequencies, and with them every position), and so do the
    modules that the architecture wants in fp32.
    """
    kept: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept.update(cast("list[str]", getattr(model, attribute, None) or []))
    exact: dict[torch.nn.Parameter, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and kept.isdisjoint(name.split(".")):
            exact[parameter] = parameter.detach()
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return exact


def drop_gguf_config(model: Any) -> None:
    """Forget the GGUF marker: the weights are dequantised, and transformers refuses to save a model that carries it."""
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    if config is not None and quantization is not None and str(getattr(method, "value", method)) == "gguf":
        del config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
        for attribute in ("quantization_method", "_is_quantized_training_enabled"):
            if hasattr(model, attribute):
                setattr(model, attribute, None)


def load_processing_class(model: str | Path, init_kwargs: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model's name (see `find_model`); a missing pad token becomes the EOS token.

    Args:
        model: name, folder, .gguf file or package.
        init_kwargs: of the model; the tokenizer is read from the same place and revision.

    Raises:
        ModelError: there is none.
    """
    source = find_model(model)
    name, hub = reach(source, init_kwargs), hub_arguments(init_kwargs)
    with reading_model(model, "tokenizer", "Save it beside the model, or pass processing_class"):
        tokenizer = AutoTokenizer.from_pretrained(name, **source.kwargs, **hub)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adopt_chat_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, *, keep_eos: bool = False
) -> None:
    """Give a tokenizer the template to render with, so that it is saved with the model and the next stage has it.

    Args:
        tokenizer: changed in place.
        chat_template: see `resolve_chat_template`; also a folder with a tokenizer, whose template and EOS token are
            taken over. None changes nothing.
        keep_eos: keep the tokenizer's EOS token.

    Raises:
        ConfigError: no such template, a folder without a tokenizer, or a template for tokens that are not in the
            vocabulary.
        DataError: "chatml", and the tokenizer has no EOS.
    """
    if chat_template is None:
        return
    if "{" in chat_template or not Path(chat_template).is_dir():
        tokenizer.chat_template = resolve_chat_template(chat_template, tokenizer)
        return
    try:
        source = AutoTokenizer.from_pretrained(chat_template, local_files_only=True)
    except Exception as error:  # of a damaged folder, as many kinds as there are parsers
        reason = " ".join(str(error).split())
        raise ConfigError(f"chat_template = {chat_template!r}: no tokenizer could be read there ({reason}).") from error
    if not source.chat_template:
        raise ConfigError(f"chat_template = {chat_template!r}: the tokenizer there has no chat template.")
    template = str(source.get_chat_template())
    known = tokenizer.get_vocab()
    used = [t for t in source.all_special_tokens if t in template or (t == source.eos_token and not keep_eos)]
    if missing := [token for token in used if token not in known]:
        raise ConfigError(
            f"chat_template = {chat_template!r}: it writes {missing[0]!r}, which is not in the vocabulary of the "
            "tokenizer; add the token to the tokenizer and the model first, or use another template."
        )
    tokenizer.chat_template = template
    if not keep_eos and source.eos_token is not None:
        tokenizer.eos_token = source.eos_token
