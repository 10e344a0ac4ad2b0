"""Check before the first step that model, tokenizer, data and arguments fit together."""

from __future__ import annotations

import logging
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.training_args import ParallelMode

from burnish.errors import ConfigError, ModelError
from burnish.model.adapter_checks import refuse_outside_weights
from burnish.model.adapter_files import saved_adapters
from burnish.model.adapters import carries_adapters
from burnish.model.checkpointing import checkpointing_field
from burnish.model.host_embedding import check_embedding_on_host
from burnish.model.loading import adopt_chat_template, load_processing_class, model_skeleton
from burnish.model.positions import check_lengths
from burnish.model.quantization import is_quantized
from burnish.model.recomputation import check_tiles
from burnish.model.scoring import causal_lm
from burnish.rollout.vllm.embedded import check_embedding
from burnish.rollout.vllm.weights import refuse_unsupported_config
from burnish.training.evaluation_sets import named_sets
from burnish.types import Group

__all__ = [
    "check_loaded",
    "check_run",
    "check_vocabulary",
    "refuse_router_loss",
    "resolve_tokenizer",
    "use_non_reentrant_checkpointing",
]

logger = logging.getLogger(__name__)


def check_run(model: Any, args: Any, train_dataset: Any, peft_config: Any) -> None:
    """Check what is known before any weight is read: processes, batches, quantised weights, vLLM.

    Raises:
        ConfigError: with the name of the argument.
    """
    _refuse_data_parallel(args)
    _refuse_no_batch(args, train_dataset)
    _check_quantized(model, args, peft_config)
    _check_architecture(model, args, peft_config)
    if getattr(args, "use_vllm", False):
        refuse_unsupported_config(peft_config)
        if args.vllm_mode == "colocate":
            check_embedding(args.vllm_tensor_parallel_size, args.world_size)


def check_loaded(model: Any, *, train_dataset: Any, eval_dataset: Any) -> None:
    """Check that the loaded model has weights to train, and embeddings for every token of the data.

    Raises:
        ConfigError, ModelError: it has not.
    """
    if carries_adapters(model) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model = {type(model).__name__}: it carries the adapters of an earlier trainer. Pass that trainer's "
            "`model` to train them further, its `model.merge_and_unload()`, or a model that was loaded anew."
        )
    for adapters in cast("dict[str, Any]", getattr(model, "peft_config", {})).values():
        refuse_outside_weights(adapters.peft_type, f"model = {type(model).__name__}")
    _check_trains(model)
    for name, groups in {"train_dataset": train_dataset, **named_sets(eval_dataset, "eval_dataset")}.items():
        check_vocabulary(model, groups, name)
        check_lengths(causal_lm(model), groups, name, "set max_length, or leave out the rows that are longer")


def refuse_router_loss(model: torch.nn.Module) -> None:
    """Refuse a mixture of experts whose config asks for the load-balancing loss of its routers.

    That loss is a product of means over the tokens of a batch, so shared prompts and split steps would change it.

    Raises:
        ConfigError: with the name of the field.
    """
    lm = causal_lm(model)
    if getattr(lm.config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            f"output_router_logits = True in the configuration of {type(lm).__name__}: it asks for the load-balancing "
            "loss of the experts, which is not added here. Train without it: model.config.output_router_logits = "
            "False, or model_init_kwargs={'output_router_logits': False} in Python."
        )


def check_vocabulary(model: Any, groups: Any, name: str) -> None:
    """Refuse tokens that the model has no embedding for; those of a stream are not known yet.

    Raises:
        ModelError: with the row.
    """
    lm = causal_lm(model)
    if not isinstance(groups, list) or getattr(lm, "is_quantized", False):
        return
    size = int(lm.get_input_embeddings().weight.shape[0])
    for group in cast("list[Group]", groups):
        largest = max(max(ids, default=0) for ids in (group.prompt_ids, *(c.token_ids for c in group.completions)))
        if largest >= size:
            raise ModelError(
                f"{name}: row {group.index} has the token {largest}, and {type(lm).__name__} has {size} embeddings: "
                "processing_class belongs to another model, or the embeddings were not resized."
            )


def _refuse_no_batch(args: Any, groups: Any) -> None:
    """Refuse a run without a full batch, for which transformers would only log a line."""
    size = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(groups, Sized) and len(groups) < size:
        raise ConfigError(
            f"dataloader_drop_last = True: {len(groups)} rows are not a full batch of {size}, so nothing would be "
            "trained; remove it, or lower per_device_train_batch_size."
        )


def _refuse_data_parallel(args: Any) -> None:
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise ConfigError(
            f"n_gpu = {args.n_gpu}: several visible GPUs without a launcher would become nn.DataParallel. Start with "
            "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one device."
        )


def resolve_tokenizer(
    model: Any, processing_class: PreTrainedTokenizerBase | None, args: Any
) -> PreTrainedTokenizerBase:
    """Return the given tokenizer or the model's, with `args.eos_token`, `args.chat_template` and a pad token set.

    Raises:
        ModelError: nothing names a tokenizer.
        ConfigError: `eos_token` is not in the vocabulary, or there is no such chat template.
    """
    if processing_class is not None:
        tokenizer = processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"processing_class = {type(tokenizer).__name__}: pass a tokenizer of transformers (of a processor, its "
                "tokenizer)."
            )
    else:
        name = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
        if not name and not isinstance(model, str):
            raise ModelError(
                f"model = {type(model).__name__}, processing_class = None: nothing names a tokenizer. Pass the model's "
                "name or folder, or its tokenizer as processing_class."
            )
        tokenizer = load_processing_class(name, args.model_init_kwargs)
    if (eos_token := getattr(args, "eos_token", None)) is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"eos_token = {eos_token!r}: not in the vocabulary of the tokenizer; use a token that is."
            )
        tokenizer.eos_token = eos_token
    adopt_chat_template(tokenizer, args.chat_template, keep_eos=eos_token is not None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def use_non_reentrant_checkpointing(args: Any) -> None:
    """Use non-reentrant checkpointing; reentrant is wrong for layers that share keys and values, or keep a prompt's."""
    name = checkpointing_field(args)
    if getattr(args, name):
        given = cast("dict[str, Any]", getattr(args, f"{name}_kwargs") or {})
        if given.get("use_reentrant"):
            logger.info("%s_kwargs: use_reentrant = True is taken as False, which has the same gradient", name)
        setattr(args, f"{name}_kwargs", {**given, "use_reentrant": False})


_ADAPTERS_NEEDED = "quantised weights cannot be trained; pass adapters, such as LoraConfig()"


def _check_quantized(model: Any, args: Any, peft_config: Any) -> None:
    """Refuse to train quantised weights without adapters, before any is read."""
    if peft_config is not None or (args.model_init_kwargs or {}).get("quantization_config") is None:
        return
    if not isinstance(model, str | Path) or saved_adapters(model) is None:
        raise ConfigError(f"peft_config = None: {_ADAPTERS_NEEDED}.")


def _check_architecture(model: Any, args: Any, peft_config: Any) -> None:
    """Refuse to save memory as the model cannot, before any weight is read: its modules tell without values."""
    if not isinstance(model, str | Path) or (args.mlp_tiles == 1 and not args.embedding_offloading):
        return
    auto_class = AutoModelForSequenceClassification if args.kind == "reward" else AutoModelForCausalLM
    skeleton = model_skeleton(model, args.model_init_kwargs, auto_class=auto_class)
    check_tiles(skeleton, args.mlp_tiles)
    if args.embedding_offloading:
        adapters = peft_config if peft_config is not None else saved_adapters(model)
        skeleton.requires_grad_(adapters is None or _trains_embedding(adapters, skeleton))
        check_embedding_on_host(skeleton)


def _trains_embedding(adapters: Any, model: Any) -> bool:
    """Return whether adapters name the input embedding, to be trained in full, in some rows, or by factors."""
    path = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    if isinstance(rows := getattr(adapters, "trainable_token_indices", None), list) and rows:
        return True
    lists = [getattr(adapters, field, None) or () for field in ("modules_to_save", "target_modules")]
    named = [name for names in (*lists, rows or ()) if not isinstance(names, str) for name in names]
    return any(path == name or path.endswith(f".{name}") for name in named)


def _check_trains(model: torch.nn.Module) -> None:
    has_adapters = hasattr(model, "peft_config")
    if is_quantized(causal_lm(model)) and not has_adapters:
        raise ConfigError(f"peft_config = None: {_ADAPTERS_NEEDED}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        fix = "load the adapters with is_trainable=True" if has_adapters else "let some of them require gradients"
        raise ModelError(f"model = {type(model).__name__}: all of its parameters are frozen; {fix}.")
