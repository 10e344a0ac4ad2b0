"""Read run files, TOML or YAML plus overrides, and check them in full before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from burnish.config import FieldInfo, Kind, check_fields, check_mapping
from burnish.config.files import apply_overrides, read_file
from burnish.config.lora import check_lora
from burnish.config.paths import expanded, folder_problem, is_file, is_folder, missing, path_problem
from burnish.config.sections import EvaluationSection, PairsSection, ReportSection, model_init, section
from burnish.config.stages import FROM_PAIRS, PIPELINE_STAGES, STAGES, stages_with
from burnish.data.sources import as_source, check_source
from burnish.environments.registry import environments_from_config
from burnish.errors import ConfigError, show
from burnish.rewards.registry import rubric_from_config
from burnish.rewards.rubric import Rubric

__all__ = [
    "DataSection",
    "EvaluationSection",
    "FileKind",
    "PairsSection",
    "PipelineFile",
    "ReportSection",
    "RunFile",
    "load_pipeline_file",
    "load_run_file",
]

Factories: TypeAlias = Callable[[], Any] | dict[str, Callable[[], Any]]

FileKind: TypeAlias = Kind
"""A command whose run file describes one stage: a stage, eval or pairs."""


def _check_path(value: str | None, where: str, problem_of: Callable[[str], str | None]) -> None:
    if value is not None and (problem := problem_of(value)) is not None:
        raise ConfigError(f"{where} = {show(value)}: {problem}.")


@dataclass(frozen=True)
class DataSection:
    """The sources of `[data]`, in the form that `burnish.data.load_rows` takes.

    The table's `system_prompt` and `prompt_template` are merged into each source that does not set them.
    """

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    sft: dict[str, Any] | None = None
    """Rows of a pipeline's supervised stage; None means `train`."""


@dataclass(frozen=True)
class RunFile:
    """A checked run file of one stage; `training` holds keyword arguments of the stage's config."""

    path: Path
    kind: FileKind
    model: str
    data: DataSection
    model_init: dict[str, Any] = field(default_factory=dict[str, Any])
    peft: dict[str, Any] | None = None
    rubric: Rubric | None = None
    environment: Factories | None = None
    """Factory of an episode's environment, or several by name: `environment_factory` of the trainer."""
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    evaluation: EvaluationSection | None = None
    pairs: PairsSection | None = None
    document: dict[str, Any] = field(default_factory=dict[str, Any])
    """The file as written with the overrides applied, for the records of the run."""


@dataclass(frozen=True)
class PipelineFile:
    """A checked run file of several stages, with an evaluation after each and a report at the end."""

    path: Path
    model: str
    data: DataSection
    rubric: Rubric
    evaluation: EvaluationSection
    output_dir: str
    """Folder of the run, with a subfolder for each stage."""
    model_init: dict[str, Any] = field(default_factory=dict[str, Any])
    peft: dict[str, Any] | None = None
    environment: Factories | None = None
    """Factory of an episode's environment, or several by name, of the online stages and the evaluations."""
    stages: dict[str, Any] = field(default_factory=dict[str, Any])
    """Stage -> settings, in the order of `PIPELINE_STAGES`."""
    report: ReportSection = field(default_factory=ReportSection)
    document: dict[str, Any] = field(default_factory=dict[str, Any])
    """The file as written with the overrides applied, for the records of the run."""

    @property
    def pairs(self) -> PairsSection | None:
        """Settings of `[pairs]`."""
        return self.stages.get("pairs")


_TABLES = {
    "model": str | dict[str, Any],
    "model_init": dict[str, Any],
    "peft": dict[str, Any],
    "data": dict[str, Any],
    "rubric": list[dict[str, Any]],
    "environment": dict[str, Any] | list[dict[str, Any]],
    "training": dict[str, Any],
    "evaluation": dict[str, Any],
    "pairs": dict[str, Any],
}
_PIPELINE_TABLES = (
    {name: hint for name, hint in _TABLES.items() if name != "training"}
    | dict.fromkeys(PIPELINE_STAGES, dict[str, Any])
    | {"report": dict[str, Any], "output_dir": str}
)


def load_run_file(path: str | Path, overrides: Sequence[str], kind: FileKind) -> RunFile:
    """Read and check a run file of one stage.

    Args:
        path: a .toml, .yaml or .yml file.
        overrides: command-line words, `--training.learning_rate=1e-6` or `--training.learning_rate 1e-6`.
        kind: the command that the file is for.

    Raises:
        ConfigError: an unknown, missing, ill-typed, out-of-range or contradictory entry, with the fix.
    """
    document = apply_overrides(read_file(path), overrides)
    _refuse_pipeline(document, path, kind)
    tables = check_mapping(_infos(_TABLES), document, str(path))
    trains = kind in STAGES
    if not trains and "training" in tables:
        raise ConfigError(f"{path}: `burnish {kind}` does not use [training]; remove it, or run the stage's command.")
    if kind != "pairs" and "pairs" in tables:
        raise ConfigError(f"{path}: `burnish {kind}` does not use [pairs]; remove it, or run `burnish pairs`.")
    run = RunFile(
        path=Path(path),
        kind=kind,
        training=check_fields(kind, tables.get("training", {})) if trains else {},
        **_shared(tables, path, pipeline=False),
        pairs=section(PairsSection, tables.get("pairs", {})) if kind == "pairs" else None,
        document=document,
    )
    if kind == "eval" and run.evaluation is None:
        run = dataclasses.replace(run, evaluation=EvaluationSection())
    given = {"data.train": run.data.train, "data.eval": run.data.eval, "rubric": run.rubric}
    required = {"data.eval" if kind == "eval" else "data.train", *(("data.eval", "rubric") if run.evaluation else ())}
    # An environment may reward its episodes itself, which the trainer finds out.
    required |= {"rubric"} if not trains or (STAGES[kind].online and run.environment is None) else set()
    if run.environment is not None and not (kind == "eval" or (trains and STAGES[kind].online)):
        raise ConfigError(f"{path}: `burnish {kind}` plays no episodes; remove [environment], or run an online stage.")
    _require({name: given[name] for name in sorted(required)}, path)
    _check_solved(run.evaluation, run.rubric)
    _refuse_moved(run.training, "training")
    _check_path(run.training.get("output_dir"), "[training] output_dir", partial(folder_problem, writable=True))
    if trains:
        _check_quantised(run)
    checkpoint = run.training.get("resume_from_checkpoint")
    if isinstance(checkpoint, str) and checkpoint.lower() != "true" and not is_folder(checkpoint):
        raise ConfigError(
            f"[training] resume_from_checkpoint = {show(checkpoint)}: no such folder; name the folder of a checkpoint "
            f"({missing(checkpoint)})."
        )
    return run


def load_pipeline_file(path: str | Path, overrides: Sequence[str]) -> PipelineFile:
    """Read and check the run file of a pipeline; arguments and errors are those of `load_run_file`."""
    document = apply_overrides(read_file(path), overrides)
    _refuse_single_stage(document, path)
    tables = check_mapping(_infos(_PIPELINE_TABLES), document, str(path))
    for kind, name in itertools.product(
        PIPELINE_STAGES, ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
    ):
        if name in tables.get(kind, {}):
            raise ConfigError(
                f"[{kind}] {name} = {tables[kind][name]!r}: a pipeline places and resumes its stages itself; set "
                "output_dir at the top of the file instead."
            )
    stages: dict[str, Any] = {
        kind: section(PairsSection, tables[kind]) if kind == "pairs" else check_fields(kind, tables[kind], kind)
        for kind in PIPELINE_STAGES
        if kind in tables
    }
    _check_order(stages, path)
    shared = _shared(tables, path, pipeline=True)
    if shared["environment"] is not None and (unable := [kind for kind in ("pairs", *FROM_PAIRS) if kind in stages]):
        raise ConfigError(
            f"{path}: [{unable[0]}] with [environment]: pairs are made of single turns; remove one of the two."
        )
    data: DataSection = shared["data"]
    shared["evaluation"] = shared["evaluation"] or EvaluationSection()
    required: dict[str, Any] = {"data.eval": data.eval, "rubric": shared["rubric"]}
    if set(stages) - {"sft", *FROM_PAIRS} or data.sft is None:
        required["data.train"] = data.train
    _require(required, path)
    run = PipelineFile(
        path=Path(path),
        output_dir=tables.get("output_dir", str(Path("outputs", Path(path).stem))),
        **shared,
        stages=stages,
        report=section(ReportSection, tables.get("report", {})),
        document=document,
    )
    _check_solved(run.evaluation, run.rubric)
    _check_path(run.output_dir, "output_dir", partial(folder_problem, writable=True))
    _check_quantised(run)
    for kind, stage in stages.items():
        if kind != "pairs":
            _refuse_moved(stage, kind)
    return run


def _refuse_pipeline(document: Mapping[str, Any], path: str | Path, kind: FileKind) -> None:
    data = document.get("data")
    tables = [f"[{name}]" for name in document if name in PIPELINE_STAGES and name != "pairs"]
    tables += [f"[{name}]" for name in ("report", "output_dir") if name in document and tables]
    if tables or (isinstance(data, Mapping) and "sft" in data):
        raise ConfigError(
            f"{path}: {', '.join(tables) or 'data.sft'} belongs to the file of a pipeline: run `burnish pipeline "
            f"{path}`, or put the fields of `burnish {kind}` in [training]."
        )


def _refuse_single_stage(document: Mapping[str, Any], path: str | Path) -> None:
    if "training" not in document:
        return
    given: Any = document["training"]
    names = list(cast("Mapping[str, Any]", given)) if isinstance(given, Mapping) else []
    fits = [kind for kind in PIPELINE_STAGES if kind != "pairs" and all(kind in stages_with(name) for name in names)]
    raise ConfigError(
        f"{path}: [training] belongs to the file of one stage: run `burnish STAGE {path}` with the stage it is for "
        f"({', '.join(fits) or 'see `burnish --help`'}), or name the table after the stage."
    )


def _check_order(stages: Mapping[str, Any], path: str | Path) -> None:
    if not stages:
        names = ", ".join(f"[{name}]" for name in PIPELINE_STAGES)
        raise ConfigError(f"{path}: no stage; add at least one of {names}, which may be empty.")
    for kind in FROM_PAIRS:
        if kind in stages and "pairs" not in stages:
            raise ConfigError(
                f"{path}: [{kind}] without [pairs], which samples its rows; add [pairs], or run `burnish {kind}` on "
                "your own rows."
            )


def _shared(tables: Mapping[str, Any], path: str | Path, *, pipeline: bool) -> dict[str, Any]:
    """Check the tables that both kinds of file have."""
    if "model" not in tables:
        raise ConfigError(f"{path}: model is missing; give a {_MODEL_SOURCES}.")
    evaluation, folder = tables.get("evaluation"), Path(path).parent
    return {
        "model": _model(tables["model"]),
        "model_init": model_init(tables.get("model_init", {})),
        "peft": check_lora(tables["peft"]) if "peft" in tables else None,
        "data": _data(tables.get("data", {}), pipeline=pipeline),
        "rubric": rubric_from_config(tables["rubric"], folder=folder) if "rubric" in tables else None,
        "environment": environments_from_config(tables["environment"], folder=folder)
        if "environment" in tables
        else None,
        "evaluation": None if evaluation is None else section(EvaluationSection, evaluation),
    }


_MODEL_SOURCES = "folder, a .gguf file, a hub name or the name of an installed package"


def _model(value: str | dict[str, Any]) -> str:
    if isinstance(value, str):
        _check_path(value, "model", path_problem)
        return value
    table = check_mapping(_infos({"path": str, "gguf_file": str}), value, "model")
    if "path" not in table:
        raise ConfigError(f"[model] path is missing; give a {_MODEL_SOURCES}.")
    for name in table:
        _check_path(table[name], f"[model] {name}", path_problem)
    return str(Path(table["path"], table["gguf_file"])) if "gguf_file" in table else table["path"]


def _check_quantised(run: RunFile | PipelineFile) -> None:
    """Refuse quantised weights without adapters, from [peft] or saved with the model."""
    adapters = is_file(expanded(run.model) / "adapter_config.json")
    if "quantization_config" in run.model_init and run.peft is None and not adapters:
        raise ConfigError(
            f"{run.path}: [model_init] quantization_config without [peft]: quantised weights cannot be trained; "
            'begin the file with `peft.target_modules = "all-linear"`.'
        )


def _data(table: Mapping[str, Any], *, pipeline: bool) -> DataSection:
    sources = ("train", "eval", "sft") if pipeline else ("train", "eval")
    types = dict.fromkeys(sources, str | dict[str, Any]) | {"system_prompt": str, "prompt_template": str}
    values = check_mapping(_infos(types), table, "data")
    shared = {name: values.pop(name) for name in ("system_prompt", "prompt_template") if name in values}
    sections = {name: shared | as_source(source) for name, source in values.items()}
    for name, source in sections.items():
        check_source(source, f"data.{name}")
    return DataSection(**sections)


def _require(values: Mapping[str, Any], path: str | Path) -> None:
    for name, given in values.items():
        if given is None:
            value = '[{ kind = "exact" }]' if name == "rubric" else '{ path = "rows.jsonl" }'
            raise ConfigError(f"{path}: {name} is missing; begin the file with `{name} = {value}`.")


def _check_solved(evaluation: EvaluationSection | None, rubric: Rubric | None) -> None:
    if evaluation is None or rubric is None:
        return
    names = ", ".join(rubric.names)
    if evaluation.solved is None and len(rubric.names) > 1:
        raise ConfigError(f"[evaluation] solved is missing; name the deciding criterion: one of {names}.")
    if evaluation.solved is not None and evaluation.solved not in rubric.names:
        raise ConfigError(f"[evaluation] solved = {evaluation.solved!r}: no such criterion; use one of {names}.")


_MOVED = {
    "model_init_kwargs": "a run file has the table [model_init] for them; move them there",
    "reward_weights": "in a run file each [[rubric]] table has its own weight; set it there and remove the field",
}
"""Config fields that a run file sets in another table, which would otherwise be set twice."""


def _refuse_moved(training: Mapping[str, Any], where: str) -> None:
    for name, fix in _MOVED.items():
        if name in training:
            raise ConfigError(f"[{where}] {name} = {training[name]!r}: {fix}.")


def _infos(hints: Mapping[str, Any]) -> dict[str, FieldInfo]:
    return {name: FieldInfo(name, hint) for name, hint in hints.items()}
