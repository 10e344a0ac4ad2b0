"""Load the data sets of a script and concatenate them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish.config.paths import is_file, is_folder
from burnish.data.delimited import find_delimiter
from burnish.errors import ConfigError, DataError, show
from burnish.scripts.arguments import DatasetConfig, DatasetMixtureConfig

__all__ = ["get_dataset"]

_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tsv": "csv"}
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
"""Files that mark a folder written by `save_to_disk`."""

_DELIMITED = {".csv": ",", ".tsv": "\t"}
"""Suffix of delimited text -> its usual delimiter."""

_SPLIT_SEED = 0
"""Fixed, since a resumed run must hold out the same rows."""


def get_dataset(mixture_config: DatasetMixtureConfig) -> Any:
    """Load the data sets of a mixture and concatenate them.

    With fractions f_i (normalised to a sum of 1) of data sets with n_i rows, the mixture has N = min_i(n_i / f_i) rows:
    the first round(f_i N) of each, so no row is used twice.

    Args:
        mixture_config: the data sets, and the rows to hold out.

    Returns:
        A `datasets.DatasetDict` with the split train, and with test if `test_split_size` is set (drawn with a fixed
        seed); an `IterableDatasetDict` when streaming.

    Raises:
        ConfigError: no data sets, a data set that cannot be loaded, or unknown columns.
        DataError: a data set without rows, or data sets whose columns do not match.
    """
    import datasets

    specs = mixture_config.datasets
    if not specs:
        raise ConfigError("datasets is empty: list at least one, such as [{path: train.jsonl}].")
    parts = [_load(spec, i, streaming=mixture_config.streaming) for i, spec in enumerate(specs)]
    if specs[0].fraction is not None:
        parts = _mix(parts, specs)
    try:
        rows: Any = datasets.concatenate_datasets(parts)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"datasets: their columns do not match ({' '.join(str(error).split())}); set columns of each."
        ) from error
    if mixture_config.streaming:
        return datasets.IterableDatasetDict({"train": rows})
    size = mixture_config.test_split_size
    if size is None:
        return datasets.DatasetDict({"train": rows})
    try:
        return rows.train_test_split(test_size=size if size < 1 else int(size), seed=_SPLIT_SEED)
    except ValueError as error:
        raise ConfigError(
            f"test_split_size = {show(size)} of {len(rows)} rows: {' '.join(str(error).split())}"
        ) from error


def _load(spec: DatasetConfig, index: int, *, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"datasets[{index}].path = {show(spec.path)}"
    try:
        if is_folder(spec.path) and any(is_file(Path(spec.path, name)) for name in _SAVED):
            rows: Any = datasets.load_from_disk(spec.path)
            if isinstance(rows, datasets.DatasetDict):
                if spec.split not in rows:
                    raise ConfigError(f"{where}, split = {spec.split!r}: use one of {', '.join(map(str, rows))}.")
                rows = rows[spec.split]
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = datasets.load_dataset(**_load_arguments(spec), split=spec.split, streaming=streaming)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"{where}: cannot be loaded ({' '.join(str(error).split())}); check the path, name and split."
        ) from error
    if spec.columns is None:
        return rows
    if missing := [name for name in spec.columns if name not in (rows.column_names or spec.columns)]:
        raise ConfigError(
            f"datasets[{index}].columns = {show(spec.columns)}: no column {missing[0]!r}; use some of "
            f"{', '.join(rows.column_names)}."
        )
    return rows.select_columns(spec.columns)


def _load_arguments(spec: DatasetConfig) -> dict[str, Any]:
    """Build the arguments of `load_dataset`, which does not take the path of a single file."""
    file = Path(spec.path)
    if is_file(spec.path) and spec.data_files is None and file.suffix in _BUILDERS:
        usual = _DELIMITED.get(file.suffix)
        cells = {} if usual is None else {"delimiter": find_delimiter(file, usual=usual)}
        return {"path": _BUILDERS[file.suffix], "data_files": spec.path, **cells}
    return {"path": spec.path, "name": spec.name, "data_dir": spec.data_dir, "data_files": spec.data_files}


def _mix(parts: Sequence[Any], specs: Sequence[DatasetConfig]) -> list[Any]:
    """Cut each data set to its fraction of the largest mixture that uses no row twice."""
    fractions = [spec.fraction or 0.0 for spec in specs]
    for i, part in enumerate(parts):
        if not len(part):
            raise DataError(f"datasets[{i}].path = {show(specs[i].path)}: no rows; remove it from datasets.")
    total = min(len(part) * sum(fractions) / fraction for part, fraction in zip(parts, fractions, strict=True))
    counts = [round(fraction / sum(fractions) * total) for fraction in fractions]
    return [part.select(range(min(count, len(part)))) for part, count in zip(parts, counts, strict=True)]
