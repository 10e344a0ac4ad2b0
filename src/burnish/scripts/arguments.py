"""Script arguments besides those of the trainer, with TRL's names: model, adapters and data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, get_type_hints

from burnish.config import FieldInfo, check_mapping
from burnish.config.paths import path_problem
from burnish.errors import ConfigError, show

__all__ = ["DatasetConfig", "DatasetMixtureConfig", "ModelConfig", "ScriptArguments"]

T = TypeVar("T", bound=type[Any])

DTYPES = ("auto", "bfloat16", "float16", "float32")


def _typed(record: T) -> T:
    """Make a dataclass check the types of its fields, which argparse and YAML do not guarantee."""
    # Read the hints now, since HfArgumentParser overwrites the fields' types.
    hints = get_type_hints(record)
    infos = {
        item.name: FieldInfo(item.name, hints[item.name])
        for item in dataclasses.fields(record)
        if item.default_factory is dataclasses.MISSING
    }
    rules = getattr(record, "__post_init__", None)

    def check(self: Any) -> None:
        values = {name: getattr(self, name) for name in infos}
        for name, value in check_mapping(infos, values, record.__name__).items():
            setattr(self, name, value)
        if rules is not None:
            rules(self)

    record.__post_init__ = check
    return record


def _field(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


def _check_name(record: str, name: str, value: str | None) -> None:
    if value is not None and (problem := path_problem(value)) is not None:
        raise ConfigError(f"[{record}] {name} = {show(value)}: {problem}.")


@_typed
@dataclass
class ScriptArguments:
    """Source of a script's rows, as arguments of `datasets.load_dataset`; a mixture replaces all of them."""

    dataset_name: str | None = _field(None, "Folder of data files, or a data set's name on the hub.")
    dataset_config: str | None = _field(None, "Configuration of a data set that has several.")
    dataset_train_split: str = _field("train", "Split to train on.")
    dataset_test_split: str = _field("test", "Split to evaluate on.")
    dataset_streaming: bool = _field(False, "Stream the rows instead of loading the whole data set.")
    ignore_bias_buffers: bool = _field(
        False, "Exclude boolean buffers (GPT-2's attention masks) from synchronisation between processes."
    )

    def __post_init__(self) -> None:
        _check_name("ScriptArguments", "dataset_name", self.dataset_name)


@_typed
@dataclass
class ModelConfig:
    """Model, quantisation and adapters of a script.

    `dtype` defaults to None here and to float32 in TRL, with the same meaning: trained weights are kept in fp32, and
    `bf16` sets the dtype of the forward pass. An explicit dtype applies to both.
    """

    model_name_or_path: str | None = _field(
        None, "Model: folder, .gguf file, name on the hub, or installed package that ships one."
    )
    model_revision: str = _field("main", "Branch, tag or commit of a model on the hub.")
    dtype: str | None = _field(
        None,
        f"Dtype to load and compute in: {', '.join(DTYPES)}. None: fp32 weights, with the compute dtype set by bf16.",
    )
    attn_implementation: str | None = _field(None, "Attention implementation of transformers for packed rows.")
    use_peft: bool = _field(False, "Train LoRA adapters instead of the weights.")
    lora_r: int = _field(16, "Rank of the adapters.")
    lora_alpha: int = _field(32, "Scale of the adapters' output, divided by the rank.")
    lora_dropout: float = _field(0.05, "Dropout before the adapters, unless the trainer disables dropout.")
    lora_target_modules: list[str] | None = _field(
        None,
        "Modules that get adapters: names, one regular expression, or all-linear. None: peft's choice for the model.",
    )
    lora_target_parameters: list[str] | None = _field(None, "Parameters that get adapters, such as MoE experts.")
    lora_modules_to_save: list[str] | None = _field(None, "Modules trained in full and saved with the adapters.")
    lora_task_type: str = _field("CAUSAL_LM", "CAUSAL_LM, or SEQ_CLS for reward models.")
    use_rslora: bool = _field(False, "Divide lora_alpha by the square root of the rank (rsLoRA, 2312.03732).")
    use_dora: bool = _field(False, "Train direction and magnitude separately (DoRA, 2402.09353).")
    load_in_8bit: bool = _field(False, "Load the model's weights in 8 bits; requires adapters.")
    load_in_4bit: bool = _field(False, "Load the model's weights in 4 bits (QLoRA, 2305.14314); requires adapters.")
    bnb_4bit_quant_type: str = _field("nf4", "4-bit data type: nf4 or fp4.")
    use_bnb_nested_quant: bool = _field(
        False, "Also quantise the quantisation constants of 4-bit blocks (double quantisation)."
    )
    bnb_4bit_quant_storage: str | None = _field(None, "Dtype that holds packed 4-bit weights. None: uint8.")

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype = {show(self.dtype)}: use one of {', '.join(DTYPES)}, or leave it out.")
        _check_name("ModelConfig", "model_name_or_path", self.model_name_or_path)
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("load_in_8bit and load_in_4bit are both set: keep one of them.")


@_typed
@dataclass
class DatasetConfig:
    """One data set of a mixture, as arguments of `datasets.load_dataset`.

    Attributes:
        path: folder, file (.csv, .json, .jsonl, .parquet), or name on the hub.
        name: configuration of a data set that has several.
        data_dir: folder in the data set.
        data_files: one file, several, or several by split.
        split: split to load.
        columns: columns to keep; None keeps all.
        fraction: fraction of the mixture drawn from this data set, relative to the others' fractions.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        _check_name("DatasetConfig", "path", self.path)
        if not self.path:
            raise ConfigError("[DatasetConfig] path = '': name a folder, a file or a data set on the hub.")
        if self.fraction is not None and not (math.isfinite(self.fraction) and self.fraction > 0):
            raise ConfigError(f"[DatasetConfig] fraction = {show(self.fraction)}: use a finite number above 0.")


@_typed
@dataclass
class DatasetMixtureConfig:
    """Data sets that `burnish.get_dataset` concatenates."""

    datasets: list[DatasetConfig] = field(
        default_factory=list[DatasetConfig],
        metadata={"help": "Paths of data sets; in a file, tables with path, split, columns, fraction."},
    )
    streaming: bool = _field(False, "Stream the rows instead of loading whole data sets.")
    test_split_size: float | None = _field(
        None, "Rows to hold out as the test split: a fraction below 1, or a number of rows. None: no test split."
    )

    def __post_init__(self) -> None:
        given: Any = self.datasets
        if isinstance(given, DatasetConfig):  # argparse parses a single path into one DatasetConfig
            given = [given]
        if not isinstance(given, list):
            raise ConfigError(f"datasets = {show(given)}: use a list of tables, such as [{{path: train.jsonl}}].")
        self.datasets = [_as_dataset(item, i) for i, item in enumerate(cast("list[Any]", given))]
        fractions = [item.fraction for item in self.datasets]
        if None in fractions and any(fraction is not None for fraction in fractions):
            raise ConfigError(f"datasets: fraction = {show(fractions)}: set it for every data set, or for none.")
        size = self.test_split_size
        if size is not None and not (0 < size < 1 or (size >= 1 and size.is_integer())):
            raise ConfigError(
                f"test_split_size = {show(size)}: use a fraction in (0, 1) or a whole number of rows, or leave it out."
            )
        if self.streaming and (size is not None or any(fraction is not None for fraction in fractions)):
            raise ConfigError(
                "streaming = true with test_split_size or fraction, which need the number of rows: remove one of them."
            )


def _as_dataset(item: Any, index: int) -> DatasetConfig:
    if isinstance(item, DatasetConfig):
        return item
    if not isinstance(item, Mapping):
        raise ConfigError(f"datasets[{index}] = {show(item)}: use a table, such as {{path: train.jsonl}}.")
    table = cast("Mapping[str, Any]", item)
    known = {entry.name for entry in dataclasses.fields(DatasetConfig)}
    if unknown := sorted(str(name) for name in table if name not in known):
        raise ConfigError(f"datasets[{index}].{unknown[0]} is unknown: a data set takes {', '.join(sorted(known))}.")
    if "path" not in table:
        raise ConfigError(f"datasets[{index}] = {show(dict(table))}: path is missing.")
    return DatasetConfig(**table)
