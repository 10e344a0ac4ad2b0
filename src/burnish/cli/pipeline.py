"""`burnish pipeline FILE`: run the stages of one file, evaluate each and write a report; resumable."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.cli.config import PipelineFile, load_pipeline_file
from burnish.cli.steps import StepInputs, model_identity
from burnish.config.stages import FROM_PAIRS, ONLINE
from burnish.data import disjoint, load_rows
from burnish.errors import ConfigError
from burnish.evaluation.evaluate import Evaluation, compare
from burnish.progress import format_seconds, say
from burnish.report import write_report
from burnish.rewards import check_gold
from burnish.rewards.identity import rubric_identity
from burnish.runs.evaluations import Interval
from burnish.runs.files import read_json, write_json
from burnish.runs.lock import locked
from burnish.runs.processes import refuse_ranks
from burnish.runs.status import RunStatus

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Check the run file and run the remaining steps."""
    refuse_ranks("pipeline")
    file = load_pipeline_file(args.file, args.overrides)
    if args.dry_run:
        Pipeline(file, Path(file.output_dir)).look()
        return
    with locked(file.output_dir):
        Pipeline(file, Path(file.output_dir)).run()


Rows = list[dict[str, Any]]

_GRADED = (*ONLINE, "pairs", "evaluation")
"""Tables of steps that use the rubric."""


@dataclass(frozen=True, slots=True)
class _Data:
    """Rows by purpose."""

    train: Rows
    """Prompts to sample from."""
    sft: Rows
    """Demonstrations."""
    held_out: Rows
    """Evaluation problems, which are not trained on; with a completion_template also demonstrations."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Preference rows sampled from one model."""

    train: Rows
    held_out: Rows
    """Pairs of held-out problems; empty if no stage uses them."""


@dataclass(slots=True)
class Pipeline:
    """Stages of one file in one folder; completed steps are not repeated."""

    file: PipelineFile
    folder: Path
    inputs: StepInputs = field(init=False)
    status: RunStatus = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = StepInputs(self.folder)
        self.status = RunStatus(self.folder, "pipeline")

    def run(self) -> None:
        """Run all stages and write the report."""
        with self.status.recording():
            self._run()

    def _run(self) -> None:
        started = time.monotonic()
        data = self._rows()
        self._claim_folder(data)
        self.status.begin("starting", max_steps=len(self.file.stages))
        model, pairs, policies = self.file.model, _Pairs([], []), ["raw"]
        self._evaluate("raw", model, data.held_out)
        for step, name in enumerate(self.file.stages, 1):
            self.status.update(step=step)
            if name == "pairs":
                pairs = self._sample_pairs(model, data)
                continue
            trained = self._train(name, model, *_rows_of(name, data, pairs))
            if name == "reward":  # the next stage continues from the same policy
                self._rank(trained, pairs.held_out)
                continue
            model = trained
            self._evaluate(name, model, data.held_out)
            policies.append(name)
        self._summarise(policies)
        self.status.finish()
        page = write_report(
            self.folder,
            Path(self.file.report.path) if self.file.report.path else None,
            max_transcripts=self.file.report.max_transcripts,
        )
        say(f"done in {format_seconds(time.monotonic() - started)}: model in {model}, report in {page}")

    def look(self) -> None:
        """Print a dry run of each stage, with the tokenizer of the first model; nothing is written."""
        from burnish.cli import stages

        data = self._rows()
        for name in self.file.stages:
            print(f"[{name}]")
            if name == "pairs" or name in FROM_PAIRS:
                print("rows are sampled from the model of the previous stage: nothing to show yet\n")
                continue
            rows, held_out = _rows_of(name, data, _Pairs([], []))
            eval_rows = held_out if self._evaluates(name) else None
            shared: dict[str, Any] = {"rubric": self.file.rubric, "model_init": self.file.model_init}
            shared["environment"] = self.file.environment
            stages.train(
                name, self.file.model, rows, self._settings(name), eval_rows=eval_rows, only_look=True, **shared
            )
            print()
        print(f"evaluations of {len(data.held_out)} held-out rows, report.html and one folder a stage: {self.folder}")

    def _claim_folder(self, data: _Data) -> None:
        """Refuse to continue from steps that were made from other inputs; write the configuration."""
        from burnish.training.environment import environment

        for name in ("raw", *self.file.stages):
            if name == "pairs":
                for part, rows in (("train", self._prompts(data)), ("held_out", data.held_out)):
                    self.inputs.check(f"pairs/{part}", self._made_from("pairs", data=rows))
                continue
            if name != "reward":
                self.inputs.check(f"evaluations/{name}.json", self._made_from("evaluation", data=data.held_out))
            if name != "raw":
                rows = {} if name in FROM_PAIRS else {"data": _rows_of(name, data, _Pairs([], []))}
                self.inputs.check(name, self._made_from(name, **rows))
        write_json(self.folder / "config.json", {k: v for k, v in self.file.document.items() if k != "report"})
        write_json(self.folder / "environment.json", environment())

    def _made_from(self, table: str, **rows: Any) -> dict[str, Any]:
        """Return the inputs of a step by table, as far as the file determines them."""
        settings = self.file.evaluation if table == "evaluation" else self.file.stages[table]
        found: dict[str, Any] = {
            table: asdict(settings) if table in ("pairs", "evaluation") else settings,
            "model_init": self.file.model_init,
        }
        if table in _GRADED:
            found["rubric"] = rubric_identity(self.file.rubric)
            if self.file.environment is not None:
                found["environment"] = self.file.document["environment"]
        if table not in ("pairs", "evaluation"):
            found["peft"] = self.file.peft
        return found | rows

    def _rows(self) -> _Data:
        """Load training, SFT and held-out rows, drop held-out prompts from training, and check the gold answers."""
        data = self.file.data
        assert data.eval is not None
        held_out = load_rows(data.eval, "data.eval")
        if self._evaluates("sft") and any("completion" not in row for row in held_out):
            raise ConfigError(
                f"[sft] eval_strategy = {self._stage('sft')['eval_strategy']!r}: held-out rows have no completion to "
                "score; give [data.eval] a completion_template, or set eval_strategy = 'no'."
            )
        found: dict[str, Rows] = {}
        for name in ("train", "sft"):
            source = getattr(data, name) or data.train or data.sft
            assert source is not None
            rows, counts = disjoint(load_rows(source, f"data.{name}"), held_out, keep_repeats=True)
            say(f"{name}: {len(rows)} rows, {counts.num_in_evaluation} left out because they are held out")
            found[name] = rows
        failures = check_gold(self.file.rubric, held_out[:20])
        if failures:
            raise ConfigError(f"[[rubric]] does not accept the gold answers of data.eval: {failures[0]}")
        return _Data(found["train"], found["sft"], held_out)

    def _stage(self, name: str) -> dict[str, Any]:
        return self.file.stages.get(name, {})

    def _evaluates(self, name: str) -> bool:
        """Return True if a stage evaluates on held-out rows during training."""
        return str(self._stage(name).get("eval_strategy", "no")) != "no"

    def _begin(self, doing: str, part: str = "") -> None:
        """Begin a step that loads a model: release what the steps before it have left."""
        from burnish.training.process_memory import release_memory

        self.status.update(doing=doing, part=part)
        release_memory()

    def _sample_pairs(self, model: str, data: _Data) -> _Pairs:
        """Sample pairs of the current model on training prompts, and on held-out ones if a stage uses them."""
        train = self._pairs_in("train", model, self._prompts(data))
        measured = "reward" in self.file.stages or self._evaluates("dpo") or self._evaluates("kto")
        return _Pairs(train, self._pairs_in("held_out", model, data.held_out) if measured else [])

    def _prompts(self, data: _Data) -> Rows:
        return disjoint(data.train, data.held_out)[0]

    def _pairs_in(self, name: str, model: str, prompts: Rows) -> Rows:
        from burnish.cli import stages

        assert self.file.pairs is not None
        self._begin(f"sampling pairs ({name})")
        folder = self.folder / "pairs" / name
        made_from = self._made_from("pairs", data=prompts, model=model_identity(model))
        self.inputs.begin(f"pairs/{name}", made_from)
        if (folder / "done").is_file():
            say(f"pairs, {name}: already done")
        else:
            say(f"pairs, {name}: sampling {model}")
            section = replace(self.file.pairs, output_dir=str(folder))
            counts = stages.make_pairs(model, prompts, self.file.rubric, section, model_init=self._model_init(model))
            say(f"pairs, {name}: {counts[str(folder / 'pairs.jsonl')]} pairs of {len(prompts)} prompts")
            if not counts[str(folder / "pairs.jsonl")]:
                raise ConfigError(
                    f"[pairs] min_margin = {section.min_margin!r}: no {name} prompt has two samples whose rewards "
                    "differ by more; lower it, raise num_samples, or use problems that the model sometimes solves."
                )
            (folder / "done").touch()
        return load_rows({"path": str(folder / "pairs.jsonl")}, f"pairs.{name}")

    def _rank(self, model: str, rows: Rows) -> None:
        """Rank pairs of held-out problems with the reward model."""
        from burnish.cli import stages

        self._begin("ranking pairs with the reward model")
        target = self.folder / "evaluations" / "reward.json"
        self.inputs.begin("evaluations/reward.json", {"data": rows, "reward": model_identity(model)})
        if not target.is_file():
            ranking = stages.rank_with(model, rows)
            write_json(target, {**asdict(ranking), "summary": asdict(ranking.summary("reward"))})
        for name, figure in read_json(target, {})["summary"]["criteria"].items():
            say(f"reward: {name} {Interval(**figure)}")

    def _train(self, name: str, model: str, rows: Rows, eval_rows: Rows) -> str:
        from burnish.cli import stages

        self._begin(f"training {name}", part=name)
        folder = self.folder / name
        self.inputs.begin(name, self._made_from(name, data=(rows, eval_rows), model=model_identity(model)))
        if (folder / "done").is_file():
            say(f"{name}: already done")
            return str(folder)
        say(f"{name}: training {model}")
        shared: dict[str, Any] = {"model_init": self._model_init(model)}
        # Later stages continue training the adapters of the previous one.
        shared["peft"] = self.file.peft if model == self.file.model else None
        shared["eval_rows"] = eval_rows if self._evaluates(name) else None
        shared |= {"rubric": self.file.rubric, "environment": self.file.environment}
        stages.train(name, model, rows, self._settings(name), **shared)
        (folder / "done").touch()
        return str(folder)

    def _settings(self, name: str) -> dict[str, Any]:
        """Return the keyword arguments of a stage's config."""
        settings = {"save_total_limit": 2, "logging_steps": 1, "report_to": "none", "log_metrics": str(self.folder)}
        settings |= {"log_completions": str(self.folder)} if name in ONLINE else {}
        return settings | self._stage(name) | {"output_dir": str(self.folder / name), "resume_from_checkpoint": True}

    def _model_init(self, model: str) -> dict[str, Any]:
        """Return arguments of from_pretrained: with adapters, the base model is loaded as for training."""
        return self.file.model_init if model == self.file.model or self.file.peft is not None else {}

    def _evaluate(self, name: str, model: str, rows: list[dict[str, Any]]) -> None:
        from burnish.cli import stages

        self._begin(f"evaluating {name}")
        target = self.folder / "evaluations" / f"{name}.json"
        self.inputs.begin(
            f"evaluations/{name}.json", self._made_from("evaluation", data=rows, model=model_identity(model))
        )
        if not target.is_file():
            shared: dict[str, Any] = {"name": name, "model_init": self._model_init(model)}
            if self.file.environment is not None:
                episodes = next((stage for kind, stage in self.file.stages.items() if kind in ONLINE), {})
                shared |= {"environment": self.file.environment, "episodes": episodes}
            result = stages.evaluate_model(model, rows, self.file.rubric, self.file.evaluation, **shared)
            write_json(target, result.to_dict())
        result = self._evaluation(name)
        passes = "  ".join(f"pass@{k} {interval}" for k, interval in result.pass_at_k.items())
        say(f"{name}: {passes}  ({len(result.problems)} problems, {result.mean_completion_tokens:.0f} tokens)")

    def _evaluation(self, name: str) -> Evaluation:
        return Evaluation.from_dict(read_json(self.folder / "evaluations" / f"{name}.json", {}))

    def _summarise(self, names: list[str]) -> None:
        """Print and write all evaluations, and paired differences between every two policies."""
        results = {name: self._evaluation(name) for name in names}
        comparisons: list[dict[str, Any]] = []
        metrics = [f"pass@{k}" for k in self.file.evaluation.ks]
        for metric in [*metrics, *(["nll"] if all("nll" in r.criteria for r in results.values()) else [])]:
            for i, before in enumerate(names):
                for after in names[i + 1 :]:
                    interval = compare(results[before], results[after], metric)
                    named = {"before": before, "after": after, "metric": metric}
                    comparisons.append(named | asdict(interval))
                    say(f"{metric} {before} -> {after}: {interval} (paired)")
        summaries = [asdict(result.summary()) for result in results.values()]
        if "reward" in self.file.stages:
            summaries.append(read_json(self.folder / "evaluations" / "reward.json", {})["summary"])
        write_json(self.folder / "evaluations.json", {"evaluations": summaries, "comparisons": comparisons})


def _rows_of(name: str, data: _Data, pairs: _Pairs) -> tuple[Rows, Rows]:
    """Return the training and held-out rows of a stage."""
    if name == "sft":
        return data.sft, data.held_out
    return (pairs.train, pairs.held_out) if name in FROM_PAIRS else (data.train, data.held_out)
