"""`burnish pipeline FILE`: measure, imitate, measure, reinforce, measure, report; interrupted, it goes on."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from burnish.cli.config import PipelineFile, load_pipeline_file
from burnish.data import disjoint, load_rows
from burnish.errors import ConfigError
from burnish.evaluate import Evaluation, compare
from burnish.progress import format_seconds, say
from burnish.report import write_report
from burnish.rewards import check_gold

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Check the file, then do what has not been done yet."""
    file = load_pipeline_file(args.file, args.overrides)
    pipeline = Pipeline(file, Path(file.output_dir))
    pipeline.run()


@dataclass(slots=True)
class Pipeline:
    """The stages of one file in one folder; what a folder already holds is not done again."""

    file: PipelineFile
    folder: Path

    def run(self) -> None:
        """All stages, then the report."""
        started = time.monotonic()
        self._claim_folder()
        train, held_out, sft = self._rows()
        stages = [name for name in ("sft", "grpo") if getattr(self.file, name) is not None]
        model = self.file.model
        self._evaluate("raw", model, held_out)
        for name in stages:
            model = self._train(name, model, sft if name == "sft" else train)
            self._evaluate(name, model, held_out)
        self._compare(["raw", *stages])
        page = write_report(
            self.folder,
            Path(self.file.report.path) if self.file.report.path else None,
            max_transcripts=self.file.report.max_transcripts,
        )
        say(f"done in {format_seconds(time.monotonic() - started)}: model in {model}, report in {page}")

    def _claim_folder(self) -> None:
        from burnish.cli.stages import environment, read_json, write_json

        document = {key: value for key, value in self.file.document.items() if key != "report"}
        before = read_json(self.folder / "config.json", None)
        if before is not None and before != _plain(document):
            changed = sorted(key for key in {*before, *document} if before.get(key) != _plain(document).get(key))
            raise ConfigError(
                f"output_dir = {str(self.folder)!r} holds a run with another [{'], ['.join(changed)}]: give another "
                "output_dir, or delete that folder."
            )
        write_json(self.folder / "config.json", document)
        write_json(self.folder / "environment.json", environment())

    def _rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        """Training, held-out and SFT rows; nothing held out is trained on, and the rubric solves its own answers."""
        data = self.file.data
        assert data.eval is not None
        held_out = load_rows(data.eval, "data.eval")
        result: list[list[dict[str, Any]]] = []
        for name in ("train", "sft"):
            source = cast("dict[str, Any]", getattr(data, name) or data.train)
            rows, counts = disjoint(load_rows(source, f"data.{name}"), held_out, keep_repeats=True)
            say(f"{name}: {len(rows)} rows, {counts.num_in_evaluation} left out because they are held out")
            result.append(rows)
        failures = check_gold(self.file.rubric, held_out[:20])
        if failures:
            raise ConfigError(f"[[rubric]] does not accept the data's own answers: {failures[0]}")
        return result[0], held_out, result[1]

    def _train(self, name: str, model: str, rows: list[dict[str, Any]]) -> str:
        from burnish.cli import stages

        folder = self.folder / name
        if (folder / "done").is_file():
            say(f"{name}: done before")
            return str(folder)
        say(f"{name}: training {model}")
        given: dict[str, Any] = getattr(self.file, name)
        training = {"save_total_limit": 2, "logging_steps": 1, "report_to": "none", **given}
        training |= {"output_dir": str(folder), "resume_from_checkpoint": True}
        shared: dict[str, Any] = {"model_init": self._model_init(model), "metrics": self.folder / "metrics.jsonl"}
        # A later stage trains the adapters of the one before it.
        shared["peft"] = self.file.peft if model == self.file.model else None
        if name == "grpo":
            training.setdefault("log_completions", str(self.folder))
        stages.train(name, model, rows, training, rubric=self.file.rubric, **shared)
        (folder / "done").touch()
        return str(folder)

    def _model_init(self, model: str) -> dict[str, Any]:
        """Arguments of from_pretrained; a stage's adapters are put on the base, read as it was for training."""
        return self.file.model_init if model == self.file.model or self.file.peft is not None else {}

    def _evaluate(self, name: str, model: str, rows: list[dict[str, Any]]) -> None:
        from burnish.cli import stages

        target = self.folder / "evaluations" / f"{name}.json"
        if not target.is_file():
            shared: dict[str, Any] = {"name": name, "model_init": self._model_init(model)}
            result = stages.evaluate_model(model, rows, self.file.rubric, self.file.evaluation, **shared)
            stages.write_json(target, result.to_dict())
        result = self._evaluation(name)
        passes = "  ".join(f"pass@{k} {interval}" for k, interval in result.pass_at_k.items())
        say(f"{name}: {passes}  ({len(result.problems)} problems, {result.mean_completion_tokens:.0f} tokens)")

    def _evaluation(self, name: str) -> Evaluation:
        from burnish.cli.stages import read_json

        return Evaluation.from_dict(read_json(self.folder / "evaluations" / f"{name}.json", {}))

    def _compare(self, names: list[str]) -> None:
        """Paired differences between every two stages, printed and written for the report."""
        from burnish.cli.stages import write_json

        results = {name: self._evaluation(name) for name in names}
        comparisons: list[dict[str, Any]] = []
        for metric in [f"pass@{k}" for k in self.file.evaluation.ks]:
            for i, before in enumerate(names):
                for after in names[i + 1 :]:
                    interval = compare(results[before], results[after], metric)
                    comparisons.append(
                        {
                            "before": before,
                            "after": after,
                            "metric": metric,
                            "mean": interval.mean,
                            "low": interval.low,
                            "high": interval.high,
                        }
                    )
                    say(f"{metric} {before} -> {after}: {interval} (paired)")
        summary = {"evaluations": [r.summary() for r in results.values()], "comparisons": comparisons}
        write_json(self.folder / "evaluations.json", summary)


def _plain(document: Any) -> Any:
    return json.loads(json.dumps(document, default=str))
