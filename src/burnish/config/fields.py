"""burnish's own configuration fields; the trainers' configs add those of transformers.TrainingArguments.

Names, meanings and defaults are TRL's where both mean the same; each help text says where they do not. Combinations
that contradict each other stand beside the fields: `contradictions` yields an error message for each.
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
    Place,
    Positive,
    Seed,
    Share,
    Text,
    Weights,
    one_of,
    own,
    stage,
)
from burnish.config.sources import Names

__all__ = [
    "CHAT_TEMPLATE_HELP",
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
    "A .jinja file, Jinja source, a tokenizer's folder (its EOS token is taken over too), or chatml; saved with the "
    "tokenizer, for later stages. None: the tokenizer's own."
)


def _steps(value: int) -> str | None:
    return None if value >= 1 or value == -1 else "use at least 1, or -1 to count by epochs"


def _off(fix: str) -> Meets:
    return Meets(lambda value: fix if value else None)


@dataclass
class CommonFields:
    """Fields of every stage. Inherit it before `transformers.TrainingArguments`, so that its defaults win."""

    kind: ClassVar[str]

    samples: ClassVar[bool] = False
    """Whether the stage learns from completions of its own."""

    output_dir: Folder | None = own(
        None, "Folder of checkpoints, metrics and the trained model. None: trainer_output.", LOGGING
    )
    per_device_train_batch_size: Count = own(
        8, "Rows of one micro-batch on each device; online, completions.", TRAINING
    )
    gradient_accumulation_steps: Count = own(1, "Micro-batches of one optimizer step.", TRAINING)
    num_train_epochs: Positive = own(3.0, "Passes over the data, where max_steps does not say otherwise.", TRAINING)
    max_steps: Annotated[int, Meets(_steps)] = own(
        -1, "Optimizer steps to train for. -1: as num_train_epochs says.", TRAINING
    )
    warmup_steps: NonNegative = own(
        0,
        "Steps in which the learning rate rises to its peak; below 1 a share of all steps.",
        TRAINING,
        fix="use a number of steps of at least 0; below 1 it is a share of all",
    )
    weight_decay: NonNegative = own(0.0, "Weight decay, of all weights but biases and norms.", TRAINING)
    seed: Seed = own(42, "Of every random number: initial weights, order of rows, samples.", TRAINING, resume="refused")
    model_init_kwargs: dict[str, Any] | None = own(
        None, "Arguments of from_pretrained, used when the model is given by name or path.", MODEL
    )
    trust_remote_code: bool = own(
        False, "Run code that a model's repository brings, as model_init_kwargs would.", MODEL
    )
    token_budget: Count | None = own(
        None,
        "Most tokens of one forward and backward, prompts counted once per group. A micro-batch above it runs in "
        "several parts with the same gradient; a group that is larger is cut between completions, a longer completion "
        "runs alone. None: 2,048 on a CPU, 16,384 elsewhere.",
        MODEL,
        fix="use a number of tokens of at least 1; a large one sets no limit",
    )
    bf16: bool | None = own(
        None,
        "Compute in bf16 with fp32 master weights. None: yes where the hardware is fast at it.",
        MODEL,
        resume="refused",
    )
    resume_from_checkpoint: Place | bool | None = own(
        None,
        "Continue from this checkpoint folder; true: from the latest whole one in output_dir, or from the start "
        "where it has none.",
        LOGGING,
    )
    overwrite_output_dir: bool = own(
        False,
        "Before a run that resumes nothing, delete the checkpoints, metrics and transcripts that an earlier one wrote "
        "into output_dir; without it such a folder is refused.",
        LOGGING,
    )
    progress: bool = own(True, "Show live progress, metrics and rates in the terminal.", LOGGING)
    max_dead_steps: Natural | None = own(
        20,
        "Stop after so many optimizer steps in a row that teach nothing: no reward differs or every one failed, every "
        "completion is cut and masked, nothing is in the loss, the gradient is zero, or the loss is far above its "
        "start. A run that has learned goes on where it may be done. 0 or None: only warn.",
        LOGGING,
        fix="use a number of steps of at least 1, or 0 to go on whatever happens",
    )
    log_metrics: bool | Folder = own(
        True,
        "Write every log as a line of metrics.jsonl, and environment.json (versions and hardware) beside it: into "
        "output_dir, or into the folder named here.",
        LOGGING,
    )
    logging_first_step: bool = own(True, "Log the first step too, so that the shortest run has metrics.", LOGGING)
    logging_steps: Positive = own(
        10,
        "Log every so many optimizer steps; below 1 it is a share of all steps.",
        LOGGING,
        fix="use a number of steps above 0; below 1 it is a share of all",
    )
    logging_nan_inf_filter: Annotated[bool, _off("it hides NaN and infinite losses; remove the field")] = own(
        False, "Always off: a NaN in the log should be seen.", LOGGING
    )
    remove_unused_columns: Annotated[
        bool, _off("rewards and row formats need the data set's columns; remove the field")
    ] = own(False, "Always off: rewards and formats need the data set's columns.", LOGGING, resume="refused")

    def contradictions(self) -> Iterator[str]:
        """Yield an error message for each combination of fields that cannot be meant."""
        yield from ()

    def check(self) -> None:
        """Check every value and every combination; the trainers' configs call it before anything else.

        Raises:
            ConfigError: a bad value, a contradiction, or an inherited field that the trainer cannot honour.
        """
        # It reads the table of stages, which lists the classes of this module.
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
    """Own fields of supervised fine-tuning."""

    kind: ClassVar[str] = "sft"

    learning_rate: NonNegative = own(2e-5, "Peak learning rate.", TRAINING)
    max_length: AtLeastTwo | None = own(
        1024,
        "Longest sequence in tokens; see truncation_mode. None: no limit.",
        DATA,
        fix="use at least 2 tokens (one predicts the next), or leave it out",
    )
    truncation_mode: Literal["keep_start", "keep_end", "drop", "split"] = own(
        "keep_start",
        "What becomes of a sequence above max_length: keep_start, keep_end, drop (the row is left out) or split (a "
        "text becomes several sequences).",
        DATA,
    )
    dataset_text_field: Text = own("text", "Column of plain text, for language modelling rows.", DATA)
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    eos_token: Text | None = own(None, "Token that ends a turn, where it is not the tokenizer's own.", DATA)
    completion_only_loss: bool | None = own(
        None, "Loss on the completion only. None: yes for prompt-completion rows, no for plain text.", DATA
    )
    assistant_only_loss: bool = own(False, "Loss on the assistant's turns of a conversation only.", DATA)
    loss_type: Literal["nll", "dft"] = own(
        "nll",
        "The loss, a mean over all scored tokens of the global batch: nll, or dft (2508.05629), which weights each "
        "token by its own probability.",
        LOSS,
        fix="use nll or dft; logits are tiled already, so nll is also the chunked one",
    )

    def contradictions(self) -> Iterator[str]:
        if self.assistant_only_loss and self.completion_only_loss:
            yield (
                "assistant_only_loss = True beside completion_only_loss = True: they choose different tokens; set one "
                "of them, assistant_only_loss for conversations, completion_only_loss for prompt-completion rows."
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
    """Own fields of reward modelling."""

    kind: ClassVar[str] = "reward"

    learning_rate: NonNegative = own(1e-4, "Peak learning rate.", TRAINING)
    max_length: AtLeastTwo | None = own(
        1024,
        "Longest sequence in tokens; rows with a longer one are left out, and counted. None: no limit.",
        DATA,
        fix="use at least 2 tokens (one predicts the next), or leave it out",
    )
    eos_token: Text | None = own(None, "Token that ends a turn, where it is not the tokenizer's own.", DATA)
    pad_token: Text | None = own(
        None,
        "Token that pads when transformers runs the saved model; a score is read at the last token that is another "
        "one, so before EOS where EOS pads. None: the tokenizer's own, else EOS.",
        DATA,
    )
    step_separator: Text = own(
        "\n", "Text that ends every step of rows with step labels; their scores are read there.", DATA
    )
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    disable_dropout: bool = own(True, "Train without dropout, in the model and in adapters.", MODEL, resume="applied")
    center_rewards_coefficient: NonNegative | None = own(
        None,
        "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0, such as 0.01. None: no such term.",
        LOSS,
    )


@dataclass
class ReferenceFields(CommonFields):
    """Fields of the stages that compare a policy with a reference on a data set."""

    learning_rate: NonNegative = own(1e-6, "Peak learning rate.", TRAINING)
    max_length: AtLeastTwo | None = own(
        1024,
        "Longest sequence in tokens; the rest is cut off. None: no limit.",
        DATA,
        fix="use at least 2 tokens (one predicts the next), or leave it out",
    )
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    disable_dropout: bool = own(True, "Train without dropout, in the model and in adapters.", MODEL, resume="applied")
    beta: Positive = own(0.1, "Strength of the pull towards the reference.", REFERENCE)
    precompute_ref_log_probs: bool = own(
        False,
        "Score the whole data set with the reference before training, once, and keep the result on disk.",
        REFERENCE,
        resume="free",
    )
    sync_ref_model: bool = own(
        False,
        "Move the reference towards the policy during training (TR-DPO, 2404.09656).",
        REFERENCE,
        resume="refused",
    )
    ref_model_mixup_alpha: Share = own(
        0.6, "Share of the policy in each move of the reference; 1 replaces it.", REFERENCE
    )
    ref_model_sync_steps: Count = own(512, "Optimizer steps between moves of the reference.", REFERENCE)

    def contradictions(self) -> Iterator[str]:
        if self.sync_ref_model and self.precompute_ref_log_probs:
            yield (
                "sync_ref_model = True moves the reference, precompute_ref_log_probs = True fixes it: set one of them."
            )


_LOSSES_OF_PAIRS = frozenset({"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"})
_LOSSES_WITHOUT_REFERENCE = frozenset({"cpo", "simpo", "alphapo", "orpo", "sft"})
_PreferenceLoss = Annotated[str, one_of(PREFERENCE_LOSS_NAMES)]

SMOOTHED_EXO = "label_smoothing = 0.0 with loss_type exo_pair: its target has a logarithm of 0; use 1e-3, as TRL does."


def _not_zero(value: float) -> str | None:
    return None if value else "use a number other than 0; at 0 it is simpo"


@stage(
    "DPO",
    summary="train on preference pairs: DPO and its family",
    method="direct preference optimisation",
    paper="2305.18290",
    rows="pairs",
)
@dataclass
class DPOFields(ReferenceFields):
    """Own fields of DPO and its family."""

    kind: ClassVar[str] = "dpo"

    loss_type: _PreferenceLoss | Annotated[list[_PreferenceLoss], MinLen(1)] = own(
        "sigmoid", "One or several rows of burnish.objectives.preference.PREFERENCE_LOSSES; several add up.", LOSS
    )
    loss_weights: Weights | None = own(
        None,
        "One weight per loss_type. None: 1 each.",
        LOSS,
        fix="use a list of numbers, one per loss_type, or leave it out",
    )
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = own(
        0.0, "Assumed share of pairs whose label is wrong, below 0.5.", LOSS
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = own(
        "reverse_kl",
        "What regularises towards the reference: reverse_kl, forward_kl, js_divergence, alpha_divergence.",
        LOSS,
    )
    f_alpha_divergence_coef: float = own(0.5, "alpha of the alpha-divergence.", LOSS)
    simpo_gamma: NonNegative = own(0.5, "Target margin of simpo and alphapo.", LOSS)
    alpha: Annotated[float, Meets(_not_zero)] = own(0.25, "alpha of alphapo; towards 0 it is simpo.", LOSS)
    discopop_tau: Positive = own(0.05, "Temperature of discopop's blend.", LOSS)
    ld_alpha: Fraction | None = own(
        None, "Weight of the tokens beyond the shorter completion of a pair, in [0, 1] (LD-DPO). None: 1.", LOSS
    )
    use_weighting: bool = own(False, "Weight pairs by how likely the policy itself would write them (WPO).", LOSS)

    def contradictions(self) -> Iterator[str]:
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        weights = self.loss_weights
        if weights is not None and len(weights) != len(names):
            yield f"loss_weights = {weights!r}: {len(weights)} weights for {len(names)} losses; give one per loss_type."
        if "exo_pair" in names and self.label_smoothing == 0:
            yield SMOOTHED_EXO
        ignored = sorted((_LOSSES_OF_PAIRS | _LOSSES_WITHOUT_REFERENCE) & set(names))
        if self.f_divergence_type != "reverse_kl" and ignored:
            yield (
                f"f_divergence_type = {self.f_divergence_type!r} with loss_type {ignored[0]}: that loss is defined on "
                "log-ratios; use sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair or discopop, or reverse_kl."
            )
        if set(names) <= _LOSSES_WITHOUT_REFERENCE and (self.precompute_ref_log_probs or self.sync_ref_model):
            yield (
                f"loss_type = {self.loss_type!r} reads no reference: remove precompute_ref_log_probs and "
                "sync_ref_model."
            )
        if self.use_weighting and {"aot", "aot_unpaired"} & set(names):
            yield "use_weighting = True with aot: sorted losses belong to no pair, so there is nothing to weight."
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
    """Own fields of KTO."""

    kind: ClassVar[str] = "kto"

    loss_type: Literal["kto", "apo_zero_unpaired"] = own(
        "kto", "kto, or apo_zero_unpaired, which needs no KL estimate.", LOSS
    )
    desirable_weight: NonNegative = own(1.0, "Weight of completions labelled true.", LOSS)
    undesirable_weight: NonNegative = own(1.0, "Weight of completions labelled false.", LOSS)
