"""Loading of models and tokenizers from paths, packages or the hub, in the compute dtype."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from burnish.config.paths import expanded, is_file
from burnish.data.chat import resolve_chat_template
from burnish.errors import ConfigError, ModelError
from burnish.model.adapter_files import saved_adapters
from burnish.model.adapters import put_adapters
from burnish.model.quantization import is_quantized, keep_layout, resolve_quantization
from burnish.model.sources import ModelSource, find_model, hub_arguments, reach, reading_model
from burnish.progress import phase

__all__ = [
    "adopt_chat_template",
    "compute_dtype",
    "load_model",
    "load_processing_class",
    "model_skeleton",
]

logger = logging.getLogger(__name__)


def compute_dtype(*, bf16: bool) -> torch.dtype:
    """Return the dtype of forward and backward."""
    return torch.bfloat16 if bf16 else torch.float32


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    bf16: bool,
    init_kwargs: Mapping[str, Any] | None = None,
    auto_class: Any = AutoModelForCausalLM,
    own_weights: bool = False,
) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
    """Load a model in its compute dtype; a model in memory is used unchanged.

    Weights are read in fp32 (GGUF's are dequantised); with bf16, their exact values are returned so that fp32 masters
    start from them. With quantised weights, the others are read in the compute dtype. A folder of adapters is loaded on
    the base that it names, with `init_kwargs`.

    Args:
        model: name, folder (of a model or of adapters), .gguf file, package, or a model in memory.
        bf16: compute in bf16.
        init_kwargs: passed to `from_pretrained` (`model_init_kwargs`); an explicit `dtype` overrides `bf16`, and
            `quantization_config` may be a word or a table (see `resolve_quantization`).
        auto_class: transformers class that loads the model; a causal language model by default.
        own_weights: load the whole model of a folder that also holds adapters, without these.

    Returns:
        The model, and exact fp32 values of the parameters that were rounded.

    Raises:
        ModelError: the model is not found, or `init_kwargs` are given with a model in memory.
        ConfigError: a bad `quantization_config`.
    """
    kwargs = dict(init_kwargs or {})
    if not isinstance(model, str | Path):
        if kwargs:
            raise ModelError(
                f"model_init_kwargs = {kwargs!r} with a model in memory: load the model with them, or pass its path."
            )
        given: Any = model
        if not isinstance(given.get_base_model() if hasattr(given, "get_base_model") else given, PreTrainedModel):
            raise ModelError(
                f"model = {type(model).__name__}: use a transformers or peft model, or its name or folder."
            )
        keep_layout(model)
        return model, {}
    source = find_model(model)
    if not own_weights and (adapters := saved_adapters(source.name)) is not None:
        if adapters.task_type == "SEQ_CLS":
            raise ModelError(
                f"model = {str(adapters.folder)!r}: adapters of a reward model, where a language model is needed."
            )
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
    exact = _round_parameters(loaded, compute_dtype(bf16=True)) if explicit is None and bf16 else {}
    return loaded, {} if is_quantized(loaded) else exact


def _load_plain(source: ModelSource, dtype: Any, kwargs: Mapping[str, Any], auto_class: Any) -> Any:
    fix = "Name a folder written by save_pretrained, a .gguf file, or a hub name"
    location = reach(source, kwargs)
    with (
        phase(f"loading {source.name}"),
        reading_model(source.name, "model", fix),
        _without_adapter_files(location) as name,
    ):
        loaded, info = auto_class.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **source.kwargs, **kwargs
        )
    loaded.name_or_path = loaded.config._name_or_path = source.name
    if missing := sorted(info["missing_keys"]):
        # They would be random: the folder holds a reward model or a bare decoder.
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"model = {source.name!r}: its files lack {len(missing)} weights of {type(loaded).__name__} ({names}), "
            "which would start random. Name a model that was saved as one, or load it yourself and pass it."
        )
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model = {source.name!r}: the hub name holds adapters. Download them (`hf download`) and pass the folder."
        )
    drop_gguf_config(loaded)
    keep_layout(loaded)
    return loaded


@contextmanager
def _without_adapter_files(name: str) -> Generator[str]:
    """Hide adapter files of a folder: transformers would load them too, or fail on an adapter_config.json alone."""
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
    # transformers quantises only what it reads from safetensors.
    with tempfile.TemporaryDirectory() as folder:
        _load_plain(source, dtype, {}, auto_class).save_pretrained(folder)
        loaded = _load_plain(ModelSource(folder), dtype, kwargs, auto_class)
    loaded.name_or_path = loaded.config._name_or_path = source.name
    return loaded


def _round_parameters(model: PreTrainedModel, dtype: torch.dtype) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Cast the parameters and return their exact values.

    Buffers keep their dtype (`model.to` would round rotary frequencies, and with them every position), and so do
    modules that the architecture keeps in fp32.
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
    """Remove the GGUF marker: the weights are dequantised, and transformers refuses to save a model with it."""
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


def model_skeleton(
    model: str | Path, init_kwargs: Mapping[str, Any] | None = None, *, auto_class: Any = AutoModelForCausalLM
) -> Any:
    """Build a model on the meta device: its modules, and tensors without values.

    Args:
        model: as in `load_model`; of a folder of adapters, their base.
        init_kwargs: the model's.
        auto_class: as in `load_model`.

    Raises:
        ModelError: no configuration is found.
    """
    source = find_model(model)
    if (adapters := saved_adapters(source.name)) is not None:
        source = find_model(adapters.base)
    name, kwargs = reach(source, init_kwargs), {**source.kwargs, **(init_kwargs or {})}
    for decides_tensors in ("dtype", "torch_dtype", "quantization_config", "device_map"):
        kwargs.pop(decides_tensors, None)
    with reading_model(source.name, "configuration", "Name a folder written by save_pretrained, or a hub name"):
        config, _ = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
        trusts = bool(kwargs.get("trust_remote_code", False))
        with torch.device("meta"):
            return auto_class.from_config(config, trust_remote_code=trusts)


def load_processing_class(model: str | Path, init_kwargs: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model (see `find_model`); a missing pad token becomes the EOS token.

    Args:
        model: name, folder, .gguf file or package.
        init_kwargs: the model's; the tokenizer is read from the same source and revision.

    Raises:
        ModelError: no tokenizer is found.
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
    """Set a tokenizer's chat template, so that it is saved with the model for the next stage.

    Args:
        tokenizer: changed in place.
        chat_template: see `resolve_chat_template`; or a tokenizer's folder, whose template and EOS token are adopted.
            None changes nothing.
        keep_eos: keep the tokenizer's EOS token.

    Raises:
        ConfigError: the template is not found, the folder has no tokenizer, or the template uses tokens that are not in
            the vocabulary.
        DataError: "chatml" with a tokenizer that has no EOS token.
    """
    if chat_template is None:
        return
    if "{" in chat_template or not Path(chat_template).is_dir():
        tokenizer.chat_template = resolve_chat_template(chat_template, tokenizer)
        return
    try:
        source = AutoTokenizer.from_pretrained(chat_template, local_files_only=True)
    except Exception as error:  # a damaged folder fails in as many ways as there are parsers
        reason = " ".join(str(error).split())
        raise ConfigError(f"chat_template = {chat_template!r}: no tokenizer could be read there ({reason}).") from error
    if not source.chat_template:
        raise ConfigError(f"chat_template = {chat_template!r}: the tokenizer in that folder has no chat template.")
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
