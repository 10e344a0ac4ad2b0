"""Scoring: log-probabilities, entropies and accuracy of the scored tokens of a packed batch.

`prepare_for_scoring(model)` adds an argument, `scoring=`, to a causal language model's own `forward`. With it, the
forward runs the decoder under prefix attention, gathers the hidden states that predict scored tokens, and computes
their log-probabilities tile by tile in the output embedding. All of it happens inside the forward of the (possibly
wrapped) model, so data-parallel and sharding wrappers see an ordinary call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch

from burnish.errors import CheckFailed, ModelError
from burnish.model.attention import Layout, install, use_layout
from burnish.model.head import head_logprobs, head_spec
from burnish.model.packing import pack, to_row
from burnish.model.positions import depends_on_row, learned_positions, refuse_beyond
from burnish.model.prefix import PrefixLayout
from burnish.model.quantization import keep_layout
from burnish.model.recomputation import recomputing, save_less
from burnish.model.self_test import supports_prefix
from burnish.model.tiled_head import HeadOutput, HeadSpec
from burnish.model.traced import is_traced
from burnish.types import Group, PackedBatch

__all__ = [
    "Scores",
    "ScoringRequest",
    "attention_layout",
    "causal_lm",
    "continuing",
    "eval_mode",
    "keeps_prompts",
    "model_inputs",
    "noisy_embeddings",
    "prepare_for_scoring",
    "score",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """Results of scoring.

    Attributes:
        logprobs: [N] log-probabilities in nats, fp32.
        entropy: [N] entropy of each predicting distribution in nats, or None where not requested.
        correct: [N] mask, True where no token is likelier than the scored one.
        log_collision: [N] log sum_v p_v^2 of each predicting distribution, without gradient, or None where not
            requested.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    correct: torch.Tensor
    log_collision: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """Argument of the model's forward that asks for scores (see `score`)."""

    layout: Layout | None
    score_index: torch.Tensor
    target_ids: torch.Tensor
    temperature: float
    with_entropy: bool = False
    entropy_gradient: bool = True
    with_collision: bool = False


@dataclass(frozen=True, slots=True)
class _Setup:
    fused: bool
    spec: HeadSpec
    positions: int | None


def causal_lm(model: torch.nn.Module) -> Any:
    """Return the transformers model inside peft and distributed wrappers."""
    while hasattr(model, "module") and isinstance(model.module, torch.nn.Module):
        model = model.module
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


@contextmanager
def eval_mode(model: torch.nn.Module) -> Generator[None]:
    """Run in evaluation mode; restore the mode of every module on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def noisy_embeddings(model: torch.nn.Module, batch: PackedBatch, alpha: float) -> Generator[None]:
    r"""Add NEFTune noise (2310.05914) to the input embeddings of a batch scored inside.

    .. math:: e_t + \frac{\alpha}{\sqrt{L d}} u, \quad u \sim \mathrm{Uniform}(-1, 1)^d

    with d the embedding size and L the length of the token's sequence, prompt and completion, not of the packed row.

    Args:
        model: prepared by `prepare_for_scoring`; may be wrapped.
        batch: packed groups of one completion each, on the model's device.
        alpha: scale of the noise.
    """
    lm = causal_lm(model)
    lengths = torch.tensor([span.prompt[1] + span.completions[0][1] for span in batch.spans])
    if lm._burnish_prefix:
        assert all(len(span.completions) == 1 for span in batch.spans)
        # Spans are consecutive and cover the row, so each length applies to as many tokens.
        lengths = lengths.repeat_interleave(lengths)[None, :, None]
    else:
        lengths = lengths[:, None, None]
    scale = (alpha / lengths.to(batch.input_ids.device).float().sqrt()).float()

    def add(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * (scale / output.shape[-1] ** 0.5).to(output.dtype)

    handle = lm.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def prepare_for_scoring(model: torch.nn.Module) -> None:
    """Prepare a model for `score`, choosing the supported paths by numeric probes.

    Models without prefix attention, such as state-space models, are scored on one padded row per completion; models
    whose logits are not a function of their output embedding alone are scored without tiling. Both are logged. Call it
    again after replacing the output embedding (LoRA on the head).

    Raises:
        ModelError: the model has no output embedding, or its log-probabilities are not finite.
    """
    lm = causal_lm(model)
    if lm.get_output_embeddings() is None or not hasattr(lm, lm.base_model_prefix):
        raise ModelError(f"{type(lm).__name__} has no output embedding: pass a causal language model.")
    keep_layout(lm)
    support = supports_prefix(lm)
    if support.ok:
        install(lm)
    else:
        logger.warning("%s runs one row per completion: %s", type(lm).__name__, support.reason)
    save_less(lm)
    spec = head_spec(lm.config)
    lm.forward = MethodType(_scoring_forward, lm)
    positions = learned_positions(lm)
    lm._burnish_prefix = support.ok
    lm._burnish_scoring = _Setup(fused=True, spec=spec, positions=positions)
    difference = _probe_head(lm)
    if difference is not None:
        logger.warning(
            "%s: the tiled head differs from the model's own logits by %.2g nats, so the full logits are used: memory "
            "grows with tokens times vocabulary.",
            type(lm).__name__,
            difference,
        )
        lm._burnish_scoring = _Setup(fused=False, spec=spec, positions=positions)


@torch.no_grad()
def _probe_head(lm: Any) -> float | None:
    """Return the largest difference of tiled and plain log-probabilities on a short row, or None where they agree."""
    if is_traced(lm):
        return None
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    device = lm.get_input_embeddings().weight.device
    ids = (torch.arange(8, device=device) * 7919 + 11)[None] % vocabulary
    targets = ids[0, 1:]
    with eval_mode(lm):
        logits = type(lm).forward(lm, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        plain = logits[0, :-1].float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        request = ScoringRequest(None, torch.arange(7, device=device), targets, 1.0)
        tiled = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, scoring=request)[0].float()
    if not torch.isfinite(plain).all():
        raise ModelError(
            f"{type(lm).__name__}: its log-probabilities of a short row are not finite: a weight is NaN or infinite, "
            f"or {logits.dtype} overflows. Load it again, or in another dtype."
        )
    difference = float((plain - tiled).abs().max())
    # The model rounds logits to its dtype and the tiled head does not: a bf16 logit of 20 is exact to 0.06.
    bound = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.25
    return difference if not difference <= bound else None


def _scoring_forward(self: Any, *args: Any, scoring: ScoringRequest | None = None, **kwargs: Any) -> Any:
    """Run the model's own forward, or with `scoring` return the fields of `HeadOutput`, empty where not requested."""
    if scoring is None:
        return type(self).forward(self, *args, **kwargs)
    setup = cast(_Setup, self._burnish_scoring)
    if setup.fused:
        decoder = getattr(self, self.base_model_prefix)
        with attention_layout(scoring.layout, self):
            hidden = decoder(*args, **kwargs).last_hidden_state
        rows_NH = hidden.reshape(-1, hidden.shape[-1])[scoring.score_index]
        head = self.get_output_embeddings()
        # The embedding's own call computes the scores, so that wrappers which gather its weight in it still do.
        before = head.__dict__.get("forward")
        head.forward = MethodType(_head_forward, head)
        try:
            return head(rows_NH, scoring=scoring, spec=setup.spec)
        finally:
            del head.forward
            if before is not None:
                head.forward = before
    with attention_layout(scoring.layout, self):
        logits = type(self).forward(self, *args, **kwargs).logits
    logits_NV = logits.reshape(-1, logits.shape[-1])[scoring.score_index]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / scoring.temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    logprobs_N = logprobs_NV.gather(-1, scoring.target_ids[:, None])[:, 0]
    with torch.no_grad():
        correct_N = logits_NV.gather(-1, scoring.target_ids[:, None])[:, 0] == logits_NV.amax(-1)
        collision_N = (2 * logprobs_NV).logsumexp(-1) if scoring.with_collision else None
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1) if scoring.with_entropy else None
    if entropy_N is not None and not scoring.entropy_gradient:
        entropy_N = entropy_N.detach()
    return _as_tensors(HeadOutput(logprobs_N, entropy_N, correct_N, collision_N))


def _as_tensors(output: HeadOutput) -> tuple[torch.Tensor, ...]:
    """Replace None by empty tensors: wrappers expect a forward to return tensors."""
    return tuple(output.logprobs.new_empty(0) if tensor is None else tensor for tensor in output)


@contextmanager
def attention_layout(layout: Layout | None, model: torch.nn.Module) -> Generator[None]:
    """Attend by a layout, or without one as the model itself does (one row per completion)."""
    # The mask of a packed row is ours: ones.
    with recomputing(model), nullcontext() if layout is None else use_layout(layout, model, checks_mask=False):
        yield


def _head_forward(self: Any, hidden_NH: torch.Tensor, *, scoring: ScoringRequest, spec: HeadSpec) -> Any:
    output = head_logprobs(
        self,
        hidden_NH,
        scoring.target_ids,
        temperature=scoring.temperature,
        spec=spec,
        with_entropy=scoring.with_entropy,
        entropy_gradient=scoring.entropy_gradient,
        with_collision=scoring.with_collision,
    )
    return _as_tensors(output)


def score(
    model: torch.nn.Module,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    with_collision: bool = False,
) -> Scores:
    r"""Compute the log-probability of every scored token of a batch.

    .. math:: \log \pi(y_t \mid x, y_{<t}) = \log \mathrm{softmax}(z_t / \tau)_{y_t}

    Args:
        model: prepared by `prepare_for_scoring`; may be wrapped.
        batch: packed groups, on the model's device.
        temperature: tau, positive.
        with_entropy: also return the entropy of each distribution.
        entropy_gradient: False returns an entropy without a gradient, which is faster where the head is frozen.
        with_collision: also return the log collision probability of each distribution (without gradient).

    Returns:
        `Scores` in fp32 (float64 for a float64 model); where grad mode is on, log-probabilities are differentiable, and
        so is the entropy unless that is switched off.

    Raises:
        CheckFailed: the model was not prepared.
    """
    lm = causal_lm(model)
    setup = cast("_Setup | None", getattr(lm, "_burnish_scoring", None))
    if setup is None:
        raise CheckFailed(f"{type(lm).__name__} was not prepared for scoring: call prepare_for_scoring(model) first.")
    refuse_beyond(setup.positions, batch, lm)
    inputs, layout, score_index = model_inputs(batch, prefix=lm._burnish_prefix)
    request = ScoringRequest(
        layout, score_index, batch.target_ids, temperature, with_entropy, entropy_gradient, with_collision
    )
    logprobs_N, entropy_N, correct_N, collision_N = model(**inputs, use_cache=False, scoring=request)
    return Scores(logprobs_N, entropy_N if with_entropy else None, correct_N, collision_N if with_collision else None)


def keeps_prompts(model: torch.nn.Module) -> bool:
    """Return whether pieces of a group may share keys and values of its prompt: rows of any length give the same.

    Args:
        model: prepared by `prepare_for_scoring` or `prepare_for_rewards`; may be wrapped.
    """
    lm = causal_lm(model)
    return bool(getattr(lm, "_burnish_prefix", False)) and not depends_on_row(lm)


@contextmanager
def continuing(
    model: torch.nn.Module, batch: PackedBatch, run: Callable[[torch.nn.Module, PackedBatch], object] = score
) -> Generator[None]:
    """Run forward and backward of a batch inside; those of its kept prompt precede the first piece and follow the last.

    Without gradients there is no backward pass, and the prompt's keys and values are let go of after the last piece.

    Args:
        model: prepared for `run`; may be wrapped.
        batch: on the model's device. Without a kept prompt, nothing else is run.
        run: runs the model on a row: `score`, or `burnish.model.classifier.reward_scores`.
    """
    prompt = batch.kept_prompt
    if prompt is not None and not prompt.is_begun:
        row = pack([Group(list(prompt.token_ids), [])]).to(batch.input_ids.device)
        row.kept_prompt = prompt
        run(model, row)
    yield
    if prompt is not None:
        prompt.end_piece()


def model_inputs(batch: PackedBatch, *, prefix: bool) -> tuple[dict[str, torch.Tensor], Layout | None, torch.Tensor]:
    """Build the arguments of a model's forward for a packed batch.

    Args:
        batch: packed groups, on the model's device.
        prefix: use one row under prefix attention, instead of one padded row per completion.

    Returns:
        Arguments by name, the layout of a packed row or None, and `score_index` into the flattened rows.
    """
    if not prefix:
        assert batch.kept_prompt is None
        input_ids, attention_mask, score_index = to_row(batch, pad_token_id=0)
        return {"input_ids": input_ids, "attention_mask": attention_mask}, None, score_index
    inputs: dict[str, torch.Tensor] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        # All ones, not None: without a mask, transformers takes restarting positions for packed sequences.
        "attention_mask": torch.ones_like(batch.input_ids),
    }
    kept = batch.kept_prompt
    return inputs, PrefixLayout(batch.spans) if kept is None else kept.layout(batch.spans), batch.score_index
