"""Trace an update: a trainer's own step on fake tensors, with every byte counted and no weights.

The model is built on the meta device and its tensors are replaced by fake ones, so a model of any size takes no memory.
Its forward, loss, backward pass and optimizer step run as they are; what only a GPU's kernels allocate is replaced by
what these allocate: attention (`burnish.model.prefix`) and products with 4-bit weights (below).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from burnish.model.checkpointing import enable_checkpointing
from burnish.model.packing import continued, halve, pack
from burnish.model.scoring import causal_lm, continuing, eval_mode, score
from burnish.model.traced import on_host, standing_for
from burnish.planner.rollout import Wave
from burnish.training.ledger import Ledger, Peak
from burnish.training.step import MicroBatch, Step
from burnish.training.traced_rollout import trace_rollout
from burnish.types import Completion, Group, PackedBatch, Score

__all__ = ["Trace", "adding_fakes", "cut_in_two", "fake_groups", "fake_model", "trace_update", "with_values"]


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """Peaks of the phases of an optimizer step.

    Attributes:
        scoring: forward passes without gradients, as for reference and old log-probabilities.
        update: forward and backward passes, with the optimizer's states.
        optimizer: the optimizer's own step.
        rollout: a prefill and a decode forward of the native engine; None where it does not sample.
        critic_update: the same as `update` for a critic, with its optimizer's step; None without one.
    """

    scoring: Peak
    update: Peak
    optimizer: Peak
    rollout: Peak | None = None
    critic_update: Peak | None = None

    def by_phase(self) -> dict[str, Peak]:
        """Return the peaks by the planner's names of phases, in the order of a step."""
        peaks = {
            "rollout": self.rollout,
            "scoring": self.scoring,
            "critic update": self.critic_update,
            "update": self.update,
            "optimizer": self.optimizer,
        }
        return {name: peak for name, peak in peaks.items() if peak is not None}


class _QuantizedProduct(torch.autograd.Function):
    """x W^T from a packed weight, which is unpacked for the product, in the forward and the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, packed: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.size, ctx.dtype = size, hidden.dtype
        ctx.save_for_backward(packed)
        return hidden @ hidden.new_empty(size).t()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_out @ grad_out.new_empty(ctx.size), None, None


class _QuantizedLinear(nn.Linear):
    """A linear layer whose weight takes the bytes of 4 bits a number and its scales."""

    def __init__(self, layer: nn.Linear, bits: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        stored = math.ceil(self.weight.numel() * bits / 8)
        self.weight = nn.Parameter(torch.empty(stored, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = layer.bias

    def forward(self, hidden: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Multiply as bitsandbytes does on a GPU."""
        out = cast(Tensor, _QuantizedProduct.apply(hidden, self.weight, (self.out_features, self.in_features)))
        bias = cast("Tensor | None", self.bias)
        return out if bias is None else out + bias


def fake_model(
    config: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bits: float | None = None,
    peft_config: Any = None,
    has_head: bool = True,
) -> tuple[Any, FakeTensorMode]:
    """Build a model of fake tensors.

    Args:
        config: a transformers configuration.
        dtype: of the weights.
        bits: bits of a weight of the linear layers but the head, with its scales, such as 4.127; None for `dtype`.
        peft_config: adapters to add, or None.
        has_head: False makes a reward model, with one score instead of the vocabulary.

    Returns:
        The model, and the mode to run it in.
    """
    if not has_head:
        config.num_labels = 1
    auto_class = AutoModelForCausalLM if has_head else AutoModelForSequenceClassification
    with torch.device("meta"):
        model: Any = auto_class.from_config(config, dtype=dtype)
    if bits is not None:
        head = model.get_output_embeddings() if has_head else model.score
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                model.set_submodule(path, _QuantizedLinear(module, bits))
    if peft_config is not None:
        model = get_peft_model(model, peft_config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[Tensor, Any] = {}

    def faked(tensor: Tensor) -> Tensor:
        if tensor not in made:  # tied weights stay tied
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]
            tensors.update({name: faked(tensor) for name, tensor in tensors.items() if tensor is not None})
    # torch would exchange the tensors' contents, which fake ones do not allow; there is nowhere to move them.
    model.to = lambda *args, **kwargs: model
    return model, mode


def with_values(model: Any) -> Any:
    """Replace a model's fake tensors by random ones, to measure what a trace counts; return the model."""
    made: dict[Tensor, Tensor] = {}

    def valued(tensor: Tensor) -> Tensor:
        if tensor not in made:  # tied weights stay tied
            values = torch.randn(tensor.shape).mul_(0.02).to(tensor.dtype)
            made[tensor] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: valued(tensor) for name, tensor in tensors.items() if tensor is not None})
    del model.to
    return model


@contextmanager
def adding_fakes(mode: FakeTensorMode) -> Generator[None]:
    """Make the modules that are added inside fake as well, such as a critic's adapters and score.

    `nn.Module.to` would exchange tensors with their converted copies, which fake ones do not allow; here it converts
    the data of each.
    """

    def convert(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)
        return module

    with mode, patch.object(nn.Module, "to", convert):
        yield


def trace_update(
    trainer: Any,
    groups: Sequence[Group],
    *,
    mode: FakeTensorMode | None,
    scored: Sequence[Sequence[Group]] | None = None,
    device: str = "cuda",
    num_parts: int = 1,
    keeps_prompt: bool = False,
    wave: Wave | None = None,
    ranks: int = 1,
) -> Trace:
    """Run a trainer's step and count its bytes.

    Args:
        trainer: a trainer on a model of `fake_model`.
        groups: one part of a micro-batch; only lengths matter.
        mode: the model's; None for a model with values, which is trained and measured.
        scored: parts that are scored without gradients; None for `groups`, and for their pieces where they have some.
        device: type of the device that fake tensors stand for.
        num_parts: passes whose gradients add up before the optimizer's step.
        keeps_prompt: update on the two halves of the one group, behind its kept prompt.
        wave: completions that the native engine samples together; None to trace no rollout.
        ranks: data-parallel processes, of which one is traced, with DDP's buckets or the masters' average
            of gradients.
    """
    ledger, model, stage = Ledger(), trainer.model, trainer.stage
    _own_models(trainer, ledger)
    critic, has_head = _critic(stage), causal_lm(model).get_output_embeddings() is not None
    if trainer.args.gradient_checkpointing:
        enable_checkpointing(causal_lm(model))
    with _ranks(ranks), standing_for(device), nullcontext() if mode is None else mode, ledger:
        if hasattr(stage, "algorithm"):
            step = stage.algorithm.step(list(groups), is_on_policy=False)
        else:
            step = stage.next_step(iter([list(groups)]), 1)
            groups = step.groups  # with their streams
        parts = cut_in_two(groups[0]) if keeps_prompt else [list(groups)]
        small, *passes = (_faked(stage.pack(part), mode) for part in ([_shortened(groups[0])], *parts))
        rows = passes if scored is None else [_faked(pack(part), mode) for part in scored]
        with ledger.component("optimizer"):
            trainer.create_optimizer()
        with ledger.component("buckets"):
            # Its reducer allocates them; backward passes go without it.
            needs_reducer = ranks > 1 and trainer.master_weights is None
            _held = DistributedDataParallel(model, init_sync=False) if needs_reducer else None
        # The first step makes the optimizer's states; the second is measured.
        _take_step(trainer, step, [small], ledger)
        if critic is not None:
            _update_critic(critic, [small], ledger)
        with torch.no_grad(), eval_mode(model), ledger.phase() as scoring:
            for row in rows if has_head else ():  # a reward model reads no log-probabilities
                with continuing(model, row):
                    score(model, row, temperature=1.0)
        # Gradients are whole, and from the second pass on wide, after a pass of any size.
        earlier = [small] * min(num_parts - 1, 2)
        critic_update = None if critic is None else _update_critic(critic, [*earlier, *passes], ledger)
        update, optimizer = _take_step(trainer, step, [*earlier, *passes], ledger)
        rollout = None if wave is None else trace_rollout(model, stage.tokenizer, wave, ledger)
    return Trace(scoring, update, optimizer, rollout, critic_update)


def cut_in_two(group: Group) -> list[list[Group]]:
    """Cut a group into two parts that share its kept prompt."""
    return [[piece] for piece in continued(halve(group))]


def _critic(stage: Any) -> Any:
    return getattr(getattr(stage, "algorithm", None), "critic", None)


def _own_models(trainer: Any, ledger: Ledger) -> None:
    """Count what exists before the step; each storage counts for the first component that has it."""
    model, stage = trainer.model, trainer.stage
    ledger.own("trained weights", (p for p in model.parameters() if p.requires_grad))
    ledger.own("frozen weights", (*model.parameters(), *model.buffers()))
    reference = getattr(getattr(stage, "scores", stage), "reference", None)
    if reference is not None and reference.model is not None:
        ledger.own("reference", (*reference.model.parameters(), *reference.model.buffers()))
    if (critic := _critic(stage)) is not None:
        ledger.own("critic", (*critic.model.parameters(), *critic.model.buffers()))
        ledger.own("critic's optimizer", getattr(critic.optimizer, "rests", ()))
    embedding, head = causal_lm(model).get_input_embeddings().weight, causal_lm(model).get_output_embeddings()
    with on_host():  # one outside the parameters
        ledger.own("frozen weights", [embedding])
    if head is not None and head.weight is embedding and embedding.requires_grad:
        ledger.tied_shapes.add(embedding.shape)


@contextmanager
def _ranks(number: int) -> Generator[None]:
    """Stand for the first of so many processes; what it sends is dropped."""
    if number == 1:
        yield
        return
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def fake_groups(prompt: int, completions: Sequence[int], *, index: int = 0, reads_last: bool = False) -> list[Group]:
    """Make a group of these lengths, with every stream that a loss may read, and the label of a row of KTO.

    Args:
        prompt: tokens of the prompt.
        completions: tokens of each completion.
        index: of the group in its data set.
        reads_last: whether only the last token of a completion is scored, as by a reward model.
    """
    made: list[Completion] = []
    for length in completions:
        zeros = [0.0] * length
        names: Sequence[str] = ("old_logprobs", "ref_logprobs", "advantages", "values", "returns")
        made.append(
            Completion(
                [0] * length,
                [False] * (length - 1) + [True] if reads_last else None,
                sampler_logprobs=zeros,
                policy_logprobs=zeros,
                score=Score(float(not made)),
                token=dict.fromkeys(names, zeros),
                sequence={"advantages": 1.0},
            )
        )
    return [Group([0] * prompt, made, {"label": True}, index)]


def _shortened(group: Group) -> Group:
    """Return a group of the same kind with a few tokens."""
    completions = [
        dataclasses.replace(
            whole,
            token_ids=whole.token_ids[:2],
            loss_mask=whole.loss_mask and whole.loss_mask[-2:],
            token={name: values[:2] for name, values in whole.token.items()},
            sampler_logprobs=whole.sampler_logprobs and whole.sampler_logprobs[:2],
            policy_logprobs=whole.policy_logprobs and whole.policy_logprobs[:2],
        )
        for whole in group.completions
    ]
    return dataclasses.replace(group, prompt_ids=group.prompt_ids[:2], completions=completions)


def _faked(batch: PackedBatch, mode: FakeTensorMode | None) -> PackedBatch:
    def faked(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: faked(tensor) for name, tensor in value.items()}
        return value if mode is None or not isinstance(value, Tensor) else mode.from_tensor(value)

    return PackedBatch(**{f.name: faked(getattr(batch, f.name)) for f in dataclasses.fields(batch)})


def _update_critic(critic: Any, batches: Sequence[PackedBatch], ledger: Ledger) -> Peak:
    """Take the step of `Critic.update`, without the metrics, which the host reads."""
    critic.model.train()
    with ledger.phase() as peak:
        for batch in batches:
            critic._backward(batch, clip=0.2, scale=1.0)
        with ledger.component("critic's optimizer"):
            critic._clip_gradients()
            critic.optimizer.step()
    critic.optimizer.zero_grad(set_to_none=True)
    critic.model.eval()
    return peak


def _take_step(trainer: Any, step: Step, parts: list[PackedBatch], ledger: Ledger) -> tuple[Peak, Peak]:
    with ledger.phase() as update:
        trainer.training_step(trainer.model, MicroBatch(step, parts))
        if distributed.is_initialized() and trainer.master_weights is not None:
            trainer.master_weights.all_reduce_gradients()
    with ledger.phase() as optimizer, ledger.component("optimizer"):
        if (masters := trainer.master_weights) is not None:
            masters.clip_gradients(1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    return update, optimizer
