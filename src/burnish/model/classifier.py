"""Sequence classifiers with one label as reward models and critics, run on packed rows with shared prompts.

A classifier is a decoder and a linear layer `score`. As in `burnish.model.scoring`, its own `forward` gets one more
argument: the decoder runs under prefix attention, hidden states are gathered at the scored positions, and `score` maps
them to scalars.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from burnish.errors import CheckFailed, ModelError
from burnish.model.adapter_checks import refuse_outside_weights
from burnish.model.adapter_files import saved_adapters
from burnish.model.adapters import put_adapters
from burnish.model.attention import Layout, install
from burnish.model.loading import load_model
from burnish.model.packing import pack
from burnish.model.positions import learned_positions, refuse_beyond
from burnish.model.quantization import keep_layout, mark_quantized
from burnish.model.recomputation import save_less
from burnish.model.scoring import attention_layout, causal_lm, eval_mode, model_inputs
from burnish.model.self_test import supports_prefix
from burnish.model.sources import find_model, hub_arguments, reach, reading_model
from burnish.model.traced import is_traced
from burnish.types import Group, PackedBatch

__all__ = [
    "RewardRequest",
    "classifier_adapters",
    "group_ranges",
    "is_reward_model",
    "load_reward_model",
    "pack_reads",
    "prepare_for_rewards",
    "reward_scores",
    "to_reward_model",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """Argument of the model's forward that asks for scores (see `reward_scores`)."""

    layout: Layout | None
    score_index: torch.Tensor


def load_reward_model(
    model: str | Path | PreTrainedModel,
    *,
    bf16: bool,
    seed: int | None,
    init_kwargs: Mapping[str, Any] | None = None,
    own_weights: bool = False,
) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
    """Load a sequence classifier with one label, converting a causal language model into one.

    Args:
        model: name, folder (of a model or of a reward model's adapters), .gguf file, package, or a model in memory;
            a classifier or a causal language model.
        bf16: compute in bf16.
        seed: seed of a new `score` layer; None refuses a causal language model, whose scores would be random.
        init_kwargs: passed to `from_pretrained`.
        own_weights: see `load_model`.

    Returns:
        The model, and exact fp32 values of the parameters that were rounded.

    Raises:
        ModelError: the model is not found, has more than one label, or its architecture has no sequence classifier.
    """
    adapters = None
    if isinstance(model, str | Path) and not own_weights:
        adapters = saved_adapters(find_model(model).name)
    if adapters is not None:
        if adapters.task_type != "SEQ_CLS":
            raise ModelError(
                f"model = {_name(model)}: adapters of task_type {adapters.task_type!r}; a reward model's are SEQ_CLS."
                " Merge them into their base first (peft: merge_and_unload), and pass the merged model."
            )
        adapters.check_sizes(find_model(adapters.base).name)
        # The adapters hold their own score layer, which replaces the base's new one.
        base, _ = load_reward_model(
            adapters.base, bf16=bf16, seed=0, init_kwargs=init_kwargs, own_weights=adapters.is_own_base
        )
        return put_adapters(base, adapters)
    ready = is_reward_model(model, init_kwargs)
    if not ready and seed is None:
        raise ModelError(
            f"model = {_name(model)}: a language model without a trained score. Train it with RewardTrainer first."
        )
    auto = {"auto_class": AutoModelForSequenceClassification} if ready else {}
    loaded, exact = load_model(model, bf16=bf16, init_kwargs=init_kwargs, own_weights=own_weights, **auto)
    if ready or seed is None:
        _check_labels(causal_lm(loaded))
        return loaded, exact
    made = to_reward_model(loaded, seed=seed)
    if exact:
        head = made.score.weight
        exact[head] = _new_head(head.shape, seed).to(head.device)
    return made, exact


def is_reward_model(model: str | Path | PreTrainedModel, init_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a model in memory, or a saved one by its configuration, is a sequence classifier.

    Raises:
        ModelError: the model is not found.
    """
    if not isinstance(model, str | Path):
        return type(causal_lm(model)).__name__.endswith("ForSequenceClassification")
    source = find_model(model)
    if source.gguf_file is not None:
        return False
    name = reach(source, init_kwargs)
    with reading_model(source.name, "configuration", "Name a folder written by save_pretrained, or a hub name"):
        config = AutoConfig.from_pretrained(name, **hub_arguments(init_kwargs))
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def to_reward_model(model: PreTrainedModel, *, seed: int) -> Any:
    r"""Build a sequence classifier around the decoder of a causal language model.

    The entries of the new `score` layer have standard deviation 1 / (H + 1), so that initial scores are near 0 and the
    initial loss near log 2; they depend on the seed alone.

    Args:
        model: a causal language model in memory.
        seed: seed of the new layer.

    Raises:
        ModelError: transformers has no sequence classifier with this decoder.
    """
    # A copy: the language model may still be in use, and its configuration has no labels.
    config = copy.deepcopy(model.config)
    prefix = model.base_model_prefix
    classes = cast("Mapping[type, Any]", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    fix = "use an architecture that has <Name>ForSequenceClassification"
    if type(config) not in classes or not hasattr(model, prefix):
        raise ModelError(f"model = {type(model).__name__}: transformers has no sequence classifier for it: {fix}.")
    config.num_labels = 1
    with torch.device("meta"):
        made: Any = classes[type(config)]._from_config(config, dtype=model.dtype)
    decoder: Any = getattr(model, prefix)
    head = getattr(made, "score", None)
    if type(getattr(made, prefix, None)) is not type(decoder) or type(head) is not torch.nn.Linear:
        raise ModelError(
            f"model = {type(model).__name__}: {type(made).__name__} is not its decoder and a score: {fix}."
        )
    setattr(made, prefix, decoder)
    # New parameters, since a meta tensor cannot be moved in a trace.
    head.weight = torch.nn.Parameter(_new_head(head.weight.shape, seed).to(model.device, head.weight.dtype))
    if (bias := cast("torch.Tensor | None", head.bias)) is not None:
        head.bias = torch.nn.Parameter(torch.zeros_like(bias, device=model.device))
    mark_quantized(made, like=model)
    return made.train(model.training)


def classifier_adapters(peft_config: Any) -> Any:
    """Set the task type of a sequence classifier, so that peft trains and saves the score layer too.

    Raises:
        ModelError: the configuration is for another task.
    """
    from peft import TaskType

    if not hasattr(peft_config, "peft_type"):
        return peft_config  # refused later, with the other arguments
    refuse_outside_weights(peft_config.peft_type, "peft_config")
    task = cast("TaskType | str | None", getattr(peft_config, "task_type", None))
    if task not in (None, TaskType.SEQ_CLS):
        raise ModelError(
            f"peft_config.task_type = {str(getattr(task, 'value', task))!r}: a reward model is a sequence classifier; "
            "use 'SEQ_CLS', or leave it out."
        )
    # A copy: peft appends the score layer to the configuration's list.
    config = copy.deepcopy(peft_config)
    config.task_type = TaskType.SEQ_CLS
    return config


def _new_head(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / (shape[-1] + 1)


def _name(model: Any) -> str:
    return repr(str(model)) if isinstance(model, str | Path) else type(model).__name__


def _check_labels(model: Any) -> None:
    labels = model.config.num_labels
    if labels != 1:
        raise ModelError(
            f"num_labels = {labels} of {type(model).__name__}: a reward is a scalar. Load it with num_labels=1 "
            "(model_init_kwargs), or pass a causal language model, which gets a new score layer."
        )


def prepare_for_rewards(model: torch.nn.Module) -> None:
    """Prepare a sequence classifier, with or without adapters, for `reward_scores`; see `prepare_for_scoring`.

    Raises:
        ModelError: the model is not a classifier with one label and a `score` layer, or its logits are not `score` of
            the last hidden state.
    """
    classifier = causal_lm(model)
    keep_layout(classifier)
    prefix = getattr(classifier, "base_model_prefix", "")
    if not (hasattr(classifier, "score") and hasattr(classifier, prefix)):
        raise ModelError(
            f"{type(classifier).__name__} has no decoder with a `score` layer: pass a causal language model, or its "
            "<Name>ForSequenceClassification."
        )
    _check_labels(classifier)
    # The decoder is tested, because a classifier returns only one value per row.
    support = supports_prefix(getattr(classifier, prefix))
    if support.ok:
        install(classifier)
    else:
        logger.warning("%s runs one row per completion: %s", type(classifier).__name__, support.reason)
    save_less(classifier)
    classifier.forward = MethodType(_reward_forward, classifier)
    classifier._burnish_prefix = support.ok
    classifier._burnish_positions = learned_positions(classifier)
    if not is_traced(classifier):
        _probe_score(classifier)


@torch.no_grad()
def _probe_score(classifier: Any) -> None:
    """Compare `reward_scores` with the model's own logits on a short row."""
    weight = classifier.get_input_embeddings().weight
    pad = classifier.config.get_text_config().pad_token_id
    ids = (torch.arange(8, device=weight.device) * 7919 + 11)[None] % weight.shape[0]
    if pad is not None:  # transformers does not score the padding token
        ids[ids == pad] = (pad + 1) % weight.shape[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with eval_mode(classifier):
        expected = type(classifier).forward(classifier, **inputs).logits.flatten().float()
        actual = classifier(**inputs, scoring=RewardRequest(None, torch.tensor([7], device=weight.device))).float()
    # The same kernels on the same row, but 16-bit products with one row and with eight may round differently.
    bound = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
    difference = float((expected - actual).abs().max()) if expected.shape == actual.shape else float("inf")
    if not difference <= bound * (1 + float(expected.abs().max())):
        raise ModelError(
            f"{type(classifier).__name__}: its own logits differ from `score` of the last hidden state by "
            f"{difference:.2g}, so it cannot be scored on packed rows. Use another architecture."
        )


def _reward_forward(self: Any, *args: Any, scoring: RewardRequest | None = None, **kwargs: Any) -> Any:
    """Run the model's own forward, or with `scoring` return [N] scores in fp32 or wider."""
    if scoring is None:
        return type(self).forward(self, *args, **kwargs)
    kwargs.pop("labels", None)  # peft passes labels, which a decoder does not take
    with attention_layout(scoring.layout, self):
        hidden = getattr(self, self.base_model_prefix)(*args, **kwargs).last_hidden_state
    scores_N1 = self.score(hidden.reshape(-1, hidden.shape[-1])[scoring.score_index])
    return scores_N1[:, 0].to(torch.promote_types(scores_N1.dtype, torch.float32))


def pack_reads(groups: Sequence[Group]) -> PackedBatch:
    """Pack groups for scores read at marked tokens, instead of for predictions of the next token.

    Args:
        groups: `loss_mask` of every completion marks the tokens where scores are read.

    Returns:
        A `PackedBatch` whose `score_index` [N] indexes the marked tokens and `target_ids` [N] are these tokens.
    """
    batch = pack(groups)
    completions = [completion for group in groups for completion in group.completions]
    starts = [start for span in batch.spans for start, _ in span.completions]
    reads = [
        (sequence, starts[sequence] + offset)
        for sequence, completion in enumerate(completions)
        for offset, is_read in enumerate(completion.loss_mask or ())
        if is_read
    ]
    index = torch.tensor([position for _, position in reads], dtype=torch.long)
    return dataclasses.replace(
        batch,
        score_index=index,
        target_ids=batch.input_ids[0, index],
        sequence_index=torch.tensor([sequence for sequence, _ in reads], dtype=torch.long),
    )


def reward_scores(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    r"""Compute the scores that a packed batch asks for.

    A batch of `pack_reads` is scored at the marked tokens: rewards of completions or steps. A batch of `pack` is scored
    at the token before each scored one: values of the states in which those tokens were sampled.

    .. math:: r_t = w \cdot h_t, \quad h_t \text{ the last hidden state at token } t

    Args:
        model: prepared by `prepare_for_rewards`; may be wrapped.
        batch: result of `pack_reads` or `pack`, on the model's device.

    Returns:
        [N] scores, fp32 (float64 for a float64 model), differentiable where grad mode is on.

    Raises:
        CheckFailed: the model was not prepared.
    """
    classifier = causal_lm(model)
    prefix = cast("bool | None", getattr(classifier, "_burnish_prefix", None))
    if prefix is None:
        raise CheckFailed(
            f"{type(classifier).__name__} was not prepared for scores: call prepare_for_rewards(model) first."
        )
    refuse_beyond(classifier._burnish_positions, batch, classifier)
    inputs, layout, score_index = model_inputs(batch, prefix=prefix)
    return model(**inputs, use_cache=False, scoring=RewardRequest(layout, score_index))


def group_ranges(batch: PackedBatch) -> list[range]:
    """Return the range of sequences (0 .. S-1) of each group of a batch."""
    ends = list(accumulate(len(span.completions) for span in batch.spans))
    return [range(end - len(span.completions), end) for end, span in zip(ends, batch.spans, strict=True)]
