"""The tables of a run file beside those of its stages: `[evaluation]`, `[pairs]`, `[report]` and `[model_init]`."""

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
    Place,
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
_TEMPLATE = "A .jinja file, Jinja source, a tokenizer's folder, or chatml. None: the tokenizer's own."


@dataclass(frozen=True)
class Section:
    """A table of a run file, checked when it is made."""

    table: ClassVar[str]

    def __post_init__(self) -> None:
        for name, info in declared(type(self)).items():
            validated(info, vars(self)[name], f"[{self.table}] ")
        for name, fix in self.contradictions():
            raise ConfigError(f"[{self.table}] {name} = {show(vars(self)[name])}: {fix}.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield a field and the fix for each combination that cannot be meant."""
        yield from ()


def section(kind: type[S], table: Mapping[str, Any]) -> S:
    """A section from a table of a file.

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
        [1], "The k of each pass@k; at most num_samples.", fix="use positive integers, such as [1, 4]"
    )
    temperature: NonNegative = own(
        1.0,
        "Sampling temperature; 0 is greedy, which needs num_samples = 1.",
        fix="use 0 (greedy) or a positive number",
    )
    max_completion_length: Count = own(512, "Most tokens of one completion.", fix="use at least 1 token")
    solved: str | None = own(
        None, "The criterion that says whether a completion solved its prompt. None: the only one of the rubric."
    )
    chat_template: str | None = own(None, _TEMPLATE)
    output: _File | None = own(None, "`burnish eval` only: JSON file for the whole evaluation, problem by problem.")
    compare_with: Place | None = own(
        None, "`burnish eval` only: such a file of another model; paired differences are printed too."
    )

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if max(self.ks) > self.num_samples:
            yield "ks", f"at most num_samples = {self.num_samples}; raise it"
        if self.temperature == 0 and self.num_samples > 1:
            yield "temperature", "greedy samples are equal: num_samples = 1"


@dataclass(frozen=True)
class PairsSection(Section):
    """`[pairs]`: preference pairs and best-of-n rows from samples of the model on `data.train`."""

    table: ClassVar[str] = "pairs"

    output_dir: Annotated[str, Meets(partial(folder_problem, writable=True))] = own(
        "outputs/pairs", "`burnish pairs` only: folder of samples.jsonl, pairs.jsonl and best.jsonl."
    )
    num_samples: AtLeastTwo = own(8, "Completions per prompt.", fix="a pair needs at least 2")
    temperature: Positive = own(1.0, "Sampling temperature.", fix="equal samples make no pair; use a positive number")
    max_completion_length: Count = own(512, "Most tokens of one completion.", fix="use at least 1 token")
    pairs_per_prompt: Count = own(
        1,
        "Most pairs of one prompt: the best sample over the worst, the second best over the second worst.",
        fix="use 1 .. num_samples / 2",
    )
    min_margin: NonNegative = own(0.0, "Rewards of a pair differ by more than this.")
    min_reward: float | None = own(
        None, "Best-of-n rows need at least this reward. None: the best is kept whatever it got."
    )
    chat_template: str | None = own(None, _TEMPLATE)
    seed: Seed = own(0, "Of the random numbers.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.pairs_per_prompt > self.num_samples // 2:
            yield "pairs_per_prompt", "use 1 .. num_samples / 2"


@dataclass(frozen=True)
class ReportSection(Section):
    """`[report]`: the page that a pipeline ends with."""

    table: ClassVar[str] = "report"

    path: _File | None = own(None, "The HTML file. None: report.html in the run's folder.")
    max_transcripts: Natural = own(
        5000, "Most transcripts on the page, sampled evenly over the steps.", fix="use 0 (embed none) or more"
    )


@dataclass(frozen=True)
class ModelInit:
    """`[model_init]`: arguments of from_pretrained. It would take any name and lose a misspelled one."""

    attn_implementation: Text = own("sdpa", "Attention of transformers that packed rows run through.")
    cache_dir: Text = own("", "Folder of downloaded models.")
    device_map: Text | dict[str, Any] = own("", "Places of the model's parts; for evaluation only.")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = own(
        "float32", "Dtype to load in; without it weights are kept in fp32, and bf16 says what is computed in."
    )
    local_files_only: bool = own(False, "Look for nothing on the hub.")
    quantization_config: str | dict[str, Any] = own(
        "", 'Quantise the frozen weights below adapters: "nf4", "int8", or arguments of BitsAndBytesConfig.'
    )
    revision: Text = own("main", "Branch, tag or commit of a model on the hub.")
    subfolder: Text = own("", "Folder within the model's repository.")
    trust_remote_code: bool = own(False, "Run code that the model's repository brings.")
    use_safetensors: bool = own(True, "Load .safetensors files only.")
    variant: Text = own("", "Variant of the weights' files, such as fp16.")


def model_init(table: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of from_pretrained that a file sets, checked.

    Raises:
        ConfigError: an unknown name or a bad value.
    """
    values = check_mapping(declared(ModelInit), table, "model_init")
    if "quantization_config" in values:
        values["quantization_config"] = check_quantization(
            values["quantization_config"], "model_init.quantization_config"
        )
    return values
