"""burnish's own configuration fields, to which the trainers' configs add those of transformers.TrainingArguments.

Names, meanings and defaults are TRL's where possible; the help of a field says where it differs. `contradictions`
yields an error message for each combination of fields that contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, MinLen

from burnish.config.declare import (
    DATA,
    LOGGING,
    LOSS,
    MODEL,
    REFERENCE,
    TRAINING,
    AtLeastTwo,
    Count,
    Folder,
    Fraction,
    Meets,
    Natural,
    NonNegative,
    PathName,
    Positive,
    Proportion,
    Seed,
    Text,
    Weights,
    one_of,
    own,
    stage,
)
from burnish.config.predicates import parse_size
from burnish.config.sources import Names

__all__ = [
    "CHAT_TEMPLATE_HELP",
    "LOSSES_WITHOUT_REFERENCE",
    "PRECOMPUTED_GROUPS",
    "PREFERENCE_LOSS_NAMES",
    "SMOOTHED_EXO",
    "CommonFields",
    "DPOFields",
    "KTOFields",
    "ReferenceFields",
    "RewardFields",
    "SFTFields",
]

PREFERENCE_LOSS_NAMES = Names("objectives/preference.py", "PREFERENCE_LOSSES")

CHAT_TEMPLATE_HELP = (
    "Chat template: a .jinja file, Jinja source, a tokenizer's folder (whose EOS token is used too) or chatml; saved "
    "with the tokenizer for later stages. None: the tokenizer's own."
)


def _steps(value: int) -> str | None:
    return None if value >= 1 or value == -1 else "use at least 1, or -1 to count by epochs"


def _size(value: str) -> str | None:
    return None if value == "auto" or parse_size(value) else "use a size such as 8GB or 7.5GiB, or auto"


def _off(fix: str) -> Meets:
    return Meets(lambda value: fix if value else None)


@dataclass
class CommonFields:
    """Fields of every stage. Inherit it before `transformers.TrainingArguments`, so its defaults take precedence."""

    kind: ClassVar[str]

    samples: ClassVar[bool] = False
    """Whether the stage samples the completions that it learns from."""

    output_dir: Folder | None = own(
        None, "Folder of checkpoints, metrics and the trained model. None: trainer_output.", LOGGING
    )
    per_device_train_batch_size: Count = own(
        8, "Rows per micro-batch and device; in online stages, completions.", TRAINING
    )
    gradient_accumulation_steps: Count = own(1, "Micro-batches per optimizer step.", TRAINING)
    num_train_epochs: Positive = own(3.0, "Passes over the data, unless max_steps is set.", TRAINING)
    max_steps: Annotated[int, Meets(_steps)] = own(
        -1, "Number of optimizer steps. -1: set by num_train_epochs.", TRAINING
    )
    warmup_steps: NonNegative = own(
        0,
        "Steps over which the learning rate rises to its peak; below 1, a fraction of all steps.",
        TRAINING,
        fix="use a number of steps of at least 0; below 1 it is a fraction of all steps",
    )
    weight_decay: NonNegative = own(0.0, "Weight decay, applied to all weights except biases and norms.", TRAINING)
    seed: Seed = own(42, "Random seed of initial weights, the order of rows and samples.", TRAINING, resume="refused")
    model_init_kwargs: dict[str, Any] | None = own(
        None, "Arguments of from_pretrained for a model given by name or path.", MODEL
    )
    trust_remote_code: bool = own(
        False, "Run code from the model's repository; the same as in model_init_kwargs.", MODEL
    )
    token_budget: Count | None = own(
        None,
        "Maximum tokens per forward and backward pass, a group's prompt counted once; a larger micro-batch is split, "
        "if necessary between completions of a group, with the same gradient; a long prompt of such a group is still "
        "computed once. None: 2,048 on a CPU, 16,384 elsewhere.",
        MODEL,
        fix="use a number of tokens of at least 1; a large one sets no limit",
    )
    memory_budget: Annotated[str, Meets(_size)] | None = own(
        None,
        "Device memory for the run, such as 8GB, or auto for all of it. Where the planner's formulas need more, or "
        "more memory than the host has, the fastest settings that fit and leave the gradient as it is are set, and "
        "shown. On a CPU it counts the process, which then returns freed memory at once, at some cost in speed. "
        "None: nothing is set.",
        MODEL,
    )
    check_memory: bool = own(
        True,
        "Refuse, before weights are loaded, a run that takes more than the memory of the device or the host, by the "
        "planner's formulas.",
        MODEL,
    )
    activation_offloading: bool = own(
        False,
        "Keep what the backward pass needs in host memory, with copies beside the computation and the same gradient. "
        "Use it with gradient_checkpointing. No effect on a CPU.",
        MODEL,
        resume="free",
    )
    embedding_offloading: bool = own(
        False,
        "Keep the input embedding in host memory and look tokens up there, where it is frozen and not the head's "
        "weight too.",
        MODEL,
        resume="free",
    )
    mlp_tiles: Count = own(
        1,
        "Parts of its tokens that a gated MLP computes one after another, recomputed in the backward pass: less memory "
        "for long rows, one more forward pass of the MLPs.",
        MODEL,
        resume="free",
    )
    bf16: bool | None = own(
        None,
        "Compute in bf16 with fp32 master weights. None: true on hardware with fast bf16.",
        MODEL,
        resume="refused",
    )
    resume_from_checkpoint: PathName | bool | None = own(
        None,
        "Resume from this checkpoint folder; true resumes from the latest complete one in output_dir, or starts anew "
        "if there is none.",
        LOGGING,
    )
    overwrite_output_dir: bool = own(
        False,
        "Delete the checkpoints, metrics and transcripts of an earlier run in output_dir, unless resuming it. If "
        "false, a new run in such a folder is refused.",
        LOGGING,
    )
    progress: bool = own(True, "Show live progress, metrics and rates in the terminal.", LOGGING)
    max_dead_steps: Natural | None = own(
        20,
        "Stop after this many consecutive optimizer steps without a learning signal: equal, failed or masked rewards, "
        "nothing in the loss, a zero gradient, or a diverged loss. 0 or None: only warn.",
        LOGGING,
        fix="use a number of steps of at least 1, or 0 to never stop",
    )
    log_metrics: bool | Folder = own(
        True,
        "Write logs to metrics.jsonl, and versions and hardware to environment.json, in output_dir or in the folder "
        "given here.",
        LOGGING,
    )
    logging_first_step: bool = own(True, "Log the first step too, so even the shortest run has metrics.", LOGGING)
    logging_steps: Positive = own(
        10,
        "Optimizer steps between logs; below 1, a fraction of all steps.",
        LOGGING,
        fix="use a number of steps above 0; below 1 it is a fraction of all steps",
    )
    logging_nan_inf_filter: Annotated[bool, _off("it hides NaN and infinite losses; remove the field")] = own(
        False, "Always off, so a NaN is visible in the log.", LOGGING
    )
    remove_unused_columns: Annotated[
        bool, _off("rewards and row formats need the data set's columns; remove the field")
    ] = own(False, "Always off: rewards and row formats need the data set's columns.", LOGGING, resume="refused")

    def contradictions(self) -> Iterator[str]:
        """Yield an error message for each contradictory combination of fields."""
        yield from ()

    def check(self) -> None:
        """Check every value and every combination; the trainers' configs call it first.

        Raises:
            ConfigError: a bad value, a contradiction, or an inherited field that the trainer does not support.
        """
        # Imported late: validation needs the table of stages, which this module fills.
        from burnish.config.validation import check_config

        check_config(self)


@stage(
    "SFT",
    summary="fine-tune on conversations, prompts with completions, or text",
    method="supervised fine-tuning",
    rows="demonstrations",
)
@dataclass
class SFTFields(CommonFields):
    """Fields of supervised fine-tuning."""

    kind: ClassVar[str] = "sft"

    learning_rate: NonNegative = own(2e-5, "Peak learning rate.", TRAINING)
    max_length: AtLeastTwo | None = own(
        1024,
        "Maximum sequence length in tokens; see truncation_mode. None: no limit.",
        DATA,
        fix="use at least 2 tokens (one predicts the next), or leave it out",
    )
    truncation_mode: Literal["keep_start", "keep_end", "drop", "split"] = own(
        "keep_start",
        "Treatment of sequences above max_length: keep_start, keep_end, drop (skip the row) or split (cut a text into "
        "several sequences).",
        DATA,
    )
    dataset_text_field: Text = own("text", "Column of plain text in language modelling rows.", DATA)
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    eos_token: Text | None = own(None, "Token that ends a turn. None: the tokenizer's EOS token.", DATA)
    completion_only_loss: bool | None = own(
        None, "Train on the completion only. None: true for prompt-completion rows, false for plain text.", DATA
    )
    assistant_only_loss: bool = own(False, "Train on the assistant's turns of a conversation only.", DATA)
    loss_type: Literal["nll", "dft"] = own(
        "nll",
        "Loss, averaged over all scored tokens of the global batch: nll, or dft (2508.05629), which weights each token "
        "by its probability.",
        LOSS,
        fix="use nll or dft; logits are tiled already, so nll is also the chunked one",
    )

    def contradictions(self) -> Iterator[str]:
        if self.assistant_only_loss and self.completion_only_loss:
            yield (
                "assistant_only_loss = True with completion_only_loss = True: they select different tokens; set one, "
                "assistant_only_loss for conversations, completion_only_loss for prompt-completion rows."
            )


@stage(
    "Reward",
    title="Reward model",
    summary="train a reward model on comparisons",
    method="reward modelling",
    rows="pairs",
)
@dataclass
class RewardFields(CommonFields):
    """Fields of reward modelling."""

    kind: ClassVar[str] = "reward"

    learning_rate: NonNegative = own(1e-4, "Peak learning rate.", TRAINING)
    max_length: AtLeastTwo | None = own(
        1024,
        "Maximum sequence length in tokens; rows with longer sequences are skipped and counted. None: no limit.",
        DATA,
        fix="use at least 2 tokens (one predicts the next), or leave it out",
    )
    eos_token: Text | None = own(None, "Token that ends a turn. None: the tokenizer's EOS token.", DATA)
    pad_token: Text | None = own(
        None,
        "Padding token of the saved model, which is scored at the last token that is not padding; if EOS pads, that is "
        "the token before EOS. None: the tokenizer's padding token, or EOS.",
        DATA,
    )
    step_separator: Text = own(
        "\n", "Text that ends each step in rows with step labels; the step is scored there.", DATA
    )
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    disable_dropout: bool = own(True, "Train without dropout, in the model and in adapters.", MODEL, resume="applied")
    center_rewards_coefficient: NonNegative | None = own(
        None,
        "Weight of (r_chosen + r_rejected)^2, which centres rewards around 0, such as 0.01. None: no such term.",
        LOSS,
    )


@dataclass
class ReferenceFields(CommonFields):
    """Fields of the offline stages that compare a policy with a reference."""

    learning_rate: NonNegative = own(1e-6, "Peak learning rate.", TRAINING)
    max_length: AtLeastTwo | None = own(
        1024,
        "Maximum sequence length in tokens; longer sequences are truncated at the end. None: no limit.",
        DATA,
        fix="use at least 2 tokens (one predicts the next), or leave it out",
    )
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    disable_dropout: bool = own(True, "Train without dropout, in the model and in adapters.", MODEL, resume="applied")
    beta: Positive = own(0.1, "Strength of the regularisation towards the reference.", REFERENCE)
    precompute_ref_log_probs: bool = own(
        False,
        "Compute the reference's log-probabilities of the whole data set before training, and cache them on disk.",
        REFERENCE,
        resume="free",
    )
    sync_ref_model: bool = own(
        False,
        "Update the reference towards the policy during training (TR-DPO, 2404.09656).",
        REFERENCE,
        resume="refused",
    )
    ref_model_mixup_alpha: Proportion = own(
        0.6, "Weight of the policy in each update of the reference; 1 replaces the reference.", REFERENCE
    )
    ref_model_sync_steps: Count = own(512, "Optimizer steps between updates of the reference.", REFERENCE)

    def contradictions(self) -> Iterator[str]:
        if self.sync_ref_model and self.precompute_ref_log_probs:
            yield (
                "sync_ref_model = True with precompute_ref_log_probs = True: one updates the reference, the other "
                "fixes it; set one of them."
            )


_LOSSES_OF_PAIRS = frozenset({"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"})
PRECOMPUTED_GROUPS = 64
"""Groups that the reference scores together where it scores all before the first step."""
LOSSES_WITHOUT_REFERENCE = frozenset({"cpo", "simpo", "alphapo", "orpo", "sft"})
_PreferenceLoss = Annotated[str, one_of(PREFERENCE_LOSS_NAMES)]

SMOOTHED_EXO = "label_smoothing = 0.0 with loss_type exo_pair: its target has a logarithm of 0; use 1e-3, as TRL does."


def _not_zero(value: float) -> str | None:
    return None if value else "use a number other than 0; 0 would be simpo"


@stage(
    "DPO",
    summary="train on preference pairs: DPO and its family",
    method="direct preference optimisation",
    paper="2305.18290",
    rows="pairs",
)
@dataclass
class DPOFields(ReferenceFields):
    """Fields of DPO and its family."""

    kind: ClassVar[str] = "dpo"

    loss_type: _PreferenceLoss | Annotated[list[_PreferenceLoss], MinLen(1)] = own(
        "sigmoid", "One or several losses of burnish.objectives.preference.PREFERENCE_LOSSES, which are summed.", LOSS
    )
    loss_weights: Weights | None = own(
        None,
        "One weight per loss_type. None: 1 each.",
        LOSS,
        fix="use a list of numbers, one per loss_type, or leave it out",
    )
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = own(
        0.0, "Assumed fraction of pairs with a wrong label, below 0.5.", LOSS
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = own(
        "reverse_kl",
        "Divergence from the reference: reverse_kl, forward_kl, js_divergence or alpha_divergence.",
        LOSS,
    )
    f_alpha_divergence_coef: float = own(0.5, "alpha of the alpha-divergence.", LOSS)
    simpo_gamma: NonNegative = own(0.5, "Target margin of simpo and alphapo.", LOSS)
    alpha: Annotated[float, Meets(_not_zero)] = own(0.25, "alpha of alphapo, which approaches simpo at 0.", LOSS)
    discopop_tau: Positive = own(0.05, "Temperature of discopop's mixing weight.", LOSS)
    ld_alpha: Fraction | None = own(
        None, "Weight of tokens beyond the length of a pair's shorter completion, in [0, 1] (LD-DPO). None: 1.", LOSS
    )
    use_weighting: bool = own(False, "Weight pairs by their probability under the policy (WPO).", LOSS)

    def contradictions(self) -> Iterator[str]:
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        weights = self.loss_weights
        if weights is not None and len(weights) != len(names):
            yield f"loss_weights = {weights!r}: {len(weights)} weights for {len(names)} losses; give one per loss_type."
        if "exo_pair" in names and self.label_smoothing == 0:
            yield SMOOTHED_EXO
        ignored = sorted((_LOSSES_OF_PAIRS | LOSSES_WITHOUT_REFERENCE) & set(names))
        if self.f_divergence_type != "reverse_kl" and ignored:
            yield (
                f"f_divergence_type = {self.f_divergence_type!r} with loss_type {ignored[0]}: that loss is defined on "
                "log-ratios; use sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair or discopop, or reverse_kl."
            )
        if set(names) <= LOSSES_WITHOUT_REFERENCE and (self.precompute_ref_log_probs or self.sync_ref_model):
            yield (
                f"loss_type = {self.loss_type!r} does not use a reference: remove precompute_ref_log_probs and "
                "sync_ref_model."
            )
        if self.use_weighting and {"aot", "aot_unpaired"} & set(names):
            yield "use_weighting = True with aot: sorted losses are not of single pairs; remove use_weighting."
        yield from super().contradictions()


@stage(
    "KTO",
    summary="train on completions labelled good or bad",
    method="Kahneman-Tversky optimisation",
    paper="2402.01306",
    rows="pairs",
)
@dataclass
class KTOFields(ReferenceFields):
    """Fields of KTO."""

    kind: ClassVar[str] = "kto"

    loss_type: Literal["kto", "apo_zero_unpaired"] = own(
        "kto", "kto, or apo_zero_unpaired, which does not need a KL estimate.", LOSS
    )
    desirable_weight: NonNegative = own(1.0, "Weight of completions labelled true.", LOSS)
    undesirable_weight: NonNegative = own(1.0, "Weight of completions labelled false.", LOSS)
