"""The tables of a run file besides those of stages: `[evaluation]`, `[pairs]`, `[report]` and `[model_init]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import MinLen

from burnish.config.declare import (
    AtLeastTwo,
    Count,
    Meets,
    Natural,
    NonNegative,
    PathName,
    Positive,
    Seed,
    Text,
    declared,
    own,
)
from burnish.config.paths import file_problem, folder_problem
from burnish.config.quantization import check_quantization
from burnish.config.validation import check_mapping, validated
from burnish.errors import ConfigError, show

__all__ = ["EvaluationSection", "ModelInit", "PairsSection", "ReportSection", "Section", "model_init", "section"]

S = TypeVar("S", bound="Section")

_File = Annotated[str, Meets(file_problem)]
_TEMPLATE = "Chat template: a .jinja file, Jinja source, a tokenizer's folder or chatml. None: the tokenizer's own."


@dataclass(frozen=True)
class Section:
    """A table of a run file, checked on construction."""

    table: ClassVar[str]

    def __post_init__(self) -> None:
        for name, info in declared(type(self)).items():
            validated(info, vars(self)[name], f"[{self.table}] ")
        for name, fix in self.contradictions():
            raise ConfigError(f"[{self.table}] {name} = {show(vars(self)[name])}: {fix}.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield a field and the fix for each contradictory combination of fields."""
        yield from ()


def section(kind: type[S], table: Mapping[str, Any]) -> S:
    """Build a section from a table of a file.

    Raises:
        ConfigError: an unknown name, a bad value or a contradiction.
    """
    return kind(**check_mapping(declared(kind), table, kind.table))


@dataclass(frozen=True)
class EvaluationSection(Section):
    """`[evaluation]`: pass@k on `data.eval`."""

    table: ClassVar[str] = "evaluation"

    num_samples: Count = own(8, "Completions per prompt.")
    ks: Annotated[list[Count], MinLen(1)] = own(
        [1], "Values of k for pass@k, at most num_samples.", fix="use positive integers, such as [1, 4]"
    )
    temperature: NonNegative = own(
        1.0,
        "Sampling temperature; 0 is greedy and requires num_samples = 1.",
        fix="use 0 (greedy) or a positive number",
    )
    max_completion_length: Count = own(512, "Maximum completion length in tokens.", fix="use at least 1 token")
    solved: str | None = own(
        None, "Criterion that decides whether a completion solves its prompt. None: the only criterion of the rubric."
    )
    chat_template: str | None = own(None, _TEMPLATE)
    output: _File | None = own(None, "JSON file for the evaluation, problem by problem (`burnish eval` only).")
    compare_with: PathName | None = own(
        None, "Output of another model's evaluation, to print paired differences with (`burnish eval` only)."
    )

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if max(self.ks) > self.num_samples:
            yield "ks", f"at most num_samples = {self.num_samples}; raise it"
        if self.temperature == 0 and self.num_samples > 1:
            yield "temperature", "greedy samples are equal; set num_samples = 1"


@dataclass(frozen=True)
class PairsSection(Section):
    """`[pairs]`: preference pairs and best-of-n rows from completions sampled on `data.train`."""

    table: ClassVar[str] = "pairs"

    output_dir: Annotated[str, Meets(partial(folder_problem, writable=True))] = own(
        "outputs/pairs", "Folder of samples.jsonl, pairs.jsonl and best.jsonl (`burnish pairs` only)."
    )
    num_samples: AtLeastTwo = own(8, "Completions per prompt.", fix="a pair needs at least 2")
    temperature: Positive = own(
        1.0, "Sampling temperature.", fix="greedy samples are equal and make no pairs; use a positive number"
    )
    max_completion_length: Count = own(512, "Maximum completion length in tokens.", fix="use at least 1 token")
    pairs_per_prompt: Count = own(
        1,
        "Maximum pairs per prompt: the best sample over the worst, the second best over the second worst.",
        fix="use 1 .. num_samples / 2",
    )
    min_margin: NonNegative = own(0.0, "Reward difference that a pair must exceed.")
    min_reward: float | None = own(None, "Minimum reward of best-of-n rows. None: no minimum.")
    chat_template: str | None = own(None, _TEMPLATE)
    seed: Seed = own(0, "Random seed.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.pairs_per_prompt > self.num_samples // 2:
            yield "pairs_per_prompt", "use 1 .. num_samples / 2"


@dataclass(frozen=True)
class ReportSection(Section):
    """`[report]`: the report at the end of a pipeline."""

    table: ClassVar[str] = "report"

    path: _File | None = own(None, "HTML file. None: report.html in the run's folder.")
    max_transcripts: Natural = own(
        5000, "Maximum transcripts on the page, sampled evenly over the steps.", fix="use 0 (embed none) or more"
    )


@dataclass(frozen=True)
class ModelInit:
    """`[model_init]`: arguments of from_pretrained, which itself ignores misspelled names."""

    attn_implementation: Text = own("sdpa", "Attention implementation of transformers for packed rows.")
    cache_dir: Text = own("", "Folder of downloaded models.")
    device_map: Text | dict[str, Any] = own("", "Devices of the model's parts; for evaluation only.")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = own(
        "float32", "Dtype to load in; if left out, weights are kept in fp32 and bf16 sets the compute dtype."
    )
    local_files_only: bool = own(False, "Do not use the hub.")
    quantization_config: str | dict[str, Any] = own(
        "", 'Quantisation of the frozen weights under adapters: "nf4", "int8", or arguments of BitsAndBytesConfig.'
    )
    revision: Text = own("main", "Branch, tag or commit of a model on the hub.")
    subfolder: Text = own("", "Folder within the model's repository.")
    trust_remote_code: bool = own(False, "Run code from the model's repository.")
    use_safetensors: bool = own(True, "Load .safetensors files only.")
    variant: Text = own("", "Variant of the weight files, such as fp16.")


def model_init(table: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of from_pretrained that a file sets.

    Raises:
        ConfigError: an unknown name or a bad value.
    """
    values = check_mapping(declared(ModelInit), table, "model_init")
    if "quantization_config" in values:
        values["quantization_config"] = check_quantization(
            values["quantization_config"], "model_init.quantization_config"
        )
    return values
