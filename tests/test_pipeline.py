"""Pipelines of a tiny model: every artefact, nothing done twice, an interrupted run goes on to the same end."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerControl

import tiny
from burnish.cli import stages
from burnish.cli.main import main
from burnish.training.learner import Learner

FILE = """
model = "{model}"
output_dir = "{output}"

[data]
train = {{ path = "{rows}", completion_template = "<think>x</think><answer>{{answer}}</answer>" }}
eval = {{ path = "{held}" }}

[[rubric]]
kind = "format"
weight = 0.5

[[rubric]]
kind = "exact"

[sft]
max_steps = 3
per_device_train_batch_size = 4
learning_rate = 1e-3
bf16 = false
save_strategy = "no"

[grpo]
max_steps = 4
per_device_train_batch_size = 8
num_generations = 4
max_completion_length = 8
learning_rate = 1e-2
bf16 = false
save_steps = 2

[evaluation]
num_samples = 2
ks = [1, 2]
max_completion_length = 8
solved = "exact"
"""


PREFERENCES = """
model = "{model}"
output_dir = "{output}"

[data]
train = {{ path = "{rows}" }}
sft = {{ path = "{rows}", completion_template = "{{answer}}" }}
eval = {{ path = "{held}", completion_template = "{{answer}}" }}

[[rubric]]
kind = "soft_overlong"
max_completion_length = 24
cache = 24

[[rubric]]
kind = "numeric"
sources = ["last_number"]

[sft]
max_steps = 2
per_device_train_batch_size = 4
learning_rate = 1e-3
bf16 = false
save_strategy = "no"
eval_strategy = "steps"
eval_steps = 1
eval_on_start = true

[pairs]
num_samples = 8
pairs_per_prompt = 2
max_completion_length = 24

[reward]
max_steps = 2
per_device_train_batch_size = 4
bf16 = false
save_strategy = "no"
eval_strategy = "steps"
eval_steps = 1

[dpo]
max_steps = 2
per_device_train_batch_size = 4
bf16 = false
save_strategy = "no"
eval_strategy = "steps"
eval_steps = 2

[kto]
max_steps = 1
per_device_train_batch_size = 4
bf16 = false
save_strategy = "no"

[online_dpo]
max_steps = 1
per_device_train_batch_size = 4
max_completion_length = 8
bf16 = false
save_strategy = "no"

[evaluation]
num_samples = 2
max_completion_length = 8
solved = "numeric"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, FILE)


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    return written(tmp_path, PREFERENCES)


def written(tmp_path: Path, template: str) -> Path:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    for name, part in (("rows", rows), ("held", rows[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    text = template.format(
        model=tmp_path / "model", output=tmp_path / "run", rows=tmp_path / "rows.jsonl", held=tmp_path / "held.jsonl"
    )
    path = tmp_path / "file.toml"
    path.write_text(text)
    return path


def test_every_artefact_is_written_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", str(file)]) == 0
    run = file.parent / "run"
    assert "14 rows, 6 left out because they are held out" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(run / "grpo")
    assert torch.isfinite(model(torch.tensor([[3, 4]])).logits).all()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if m["stage"] == "sft"] == [1, 2, 3]
    assert [m["step"] for m in metrics if m["stage"] == "grpo"] == [1, 2, 3, 4]
    transcripts = [json.loads(line) for line in (run / "transcripts.jsonl").read_text().splitlines()]
    assert len(transcripts) == 4 * 8
    assert all(set(t["criteria"]) == {"format", "exact"} for t in transcripts)
    summary = json.loads((run / "evaluations.json").read_text())
    assert [e["name"] for e in summary["evaluations"]] == ["raw", "sft", "grpo"]
    assert len(summary["comparisons"]) == 2 * 3
    page = (run / "report.html").read_text()
    assert "pass@1" in page
    before = {path: path.stat().st_mtime_ns for path in (run / "grpo").iterdir()}
    assert main(["pipeline", str(file)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "grpo").iterdir()} == before


def test_an_interrupted_run_goes_on_to_the_same_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["pipeline", str(file), f"--output_dir={file.parent / 'whole'}"]) == 0

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control: TrainerControl, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if args.kind == "grpo" and state.global_step == 3:
                raise KeyboardInterrupt

    original = Learner.train

    def killing(trainer, *args, **kwargs):  # type: ignore[no-untyped-def]
        trainer.add_callback(Killed())
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(Learner, "train", killing)
    command = ["pipeline", str(file), f"--output_dir={file.parent / 'cut'}"]
    assert main(command) == 130
    monkeypatch.setattr(Learner, "train", original)
    assert main(command) == 0
    for name in ("transcripts.jsonl", "evaluations.json"):
        assert (file.parent / "cut" / name).read_text() == (file.parent / "whole" / name).read_text()
    left, right = (AutoModelForCausalLM.from_pretrained(file.parent / n / "grpo") for n in ("whole", "cut"))
    for name, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[name]), name


def test_stages_of_preferences(preferences: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", str(preferences)]) == 0, capsys.readouterr().err
    run = preferences.parent / "run"
    train, held_out = (read_lines(run / "pairs" / name / "pairs.jsonl") for name in ("train", "held_out"))
    held_prompts = {row["prompt"] for row in read_lines(preferences.parent / "held.jsonl")}
    assert {row["prompt"] for row in held_out} <= held_prompts
    assert not {row["prompt"] for row in train} & held_prompts
    assert all(row["differs_in"] == ["soft_overlong"] or "numeric" in row["differs_in"] for row in train)
    metrics = read_lines(run / "metrics.jsonl")
    for stage, name, steps in (
        ("sft", "eval_loss", [0, 1, 2]),
        ("reward", "eval_accuracy", [1, 2]),
        ("reward", "eval_calibration_error", [1, 2]),
        ("dpo", "eval_rewards/margins", [2]),
        ("kto", "loss", [1]),
        ("online_dpo", "loss", [1]),
    ):
        assert [m["step"] for m in metrics if m["stage"] == stage and name in m] == steps, (stage, name)
    ranking = json.loads((run / "evaluations" / "reward.json").read_text())
    last = next(m for m in reversed(metrics) if "eval_accuracy" in m)
    assert len(ranking["ahead"]) == ranking["num_pairs"] == len(held_out)
    assert sum(value > 0 for value in ranking["ahead"]) / len(held_out) == pytest.approx(last["eval_accuracy"])
    # Trained in fp32, ranked in bf16 where the processor is fast at it: three digits of scores near 0.1.
    assert ranking["calibration_error"] == pytest.approx(last["eval_calibration_error"], abs=1e-3)
    assert ranking["brier_score"] == pytest.approx(last["eval_brier_score"], abs=1e-3)


def test_no_step_begins_while_the_models_of_another_are_there(
    preferences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainers are reference cycles: without the garbage collector nothing frees them by chance."""

    def alive() -> list[Any]:
        return [one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel | Learner)]

    def noting(step: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            steps.append(step.__name__)
            left.extend(type(one).__name__ for one in alive() if one not in known)
            return step(*args, **kwargs)

        return noted

    known, steps, left = weakref.WeakSet(alive()), list[str](), list[str]()
    for name in ("train", "evaluate_model", "make_pairs", "rank_with"):
        monkeypatch.setattr(stages, name, noting(getattr(stages, name)))
    gc.disable()
    try:
        assert main(["pipeline", str(preferences)]) == 0
    finally:
        gc.enable()
    assert len(steps) == 5 + 5 + 2 + 1, "five stages and as many policies, pairs of two kinds of rows, a reward model"
    assert left == []


def test_policies_go_on_from_each_other_and_a_reward_model_is_none(preferences: Path) -> None:
    assert main(["pipeline", str(preferences)]) == 0
    run = preferences.parent / "run"
    summary = json.loads((run / "evaluations.json").read_text())
    assert [e["name"] for e in summary["evaluations"]] == ["raw", "sft", "dpo", "kto", "online_dpo", "reward"]
    assert {c["metric"] for c in summary["comparisons"]} == {"pass@1", "nll"}
    gain = next(c for c in summary["comparisons"] if (c["before"], c["after"], c["metric"]) == ("raw", "sft", "nll"))
    assert gain["high"] < 0, "two steps at 1e-3 lower the loss of these rows"
    assert "Reward model" in (run / "report.html").read_text()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_are_made_once(preferences: Path) -> None:
    words = ["pipeline", str(preferences)]
    assert main(words) == 0
    run = preferences.parent / "run"
    names = (
        "pairs/train/pairs.jsonl",
        "pairs/held_out/pairs.jsonl",
        "reward/model.safetensors",
        "evaluations/reward.json",
    )
    files = [run / name for name in names]
    before = [path.stat().st_mtime_ns for path in files]
    assert main(words) == 0
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--pairs.min_margin=9", "[pairs] min_margin = 9.0: no train prompt has two samples"),
        ("--data.eval.completion_template=null", "[sft] eval_strategy = 'steps': held-out rows have no completion"),
    ],
)
def test_what_stops_a_pipeline_of_preferences(
    preferences: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["pipeline", str(preferences), override]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_holds_one_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", str(file)]) == 0
    assert main(["pipeline", str(file), "--grpo.max_steps=5"]) == 2
    assert "holds a run with another [grpo]" in capsys.readouterr().err


def test_later_stages_train_the_adapters_of_the_first(file: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.model(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(file.parent / "model")
    words = ["--peft={r = 4, target_modules = 'all-linear'}", "--model_init={quantization_config = 'nf4'}"]
    assert main(["pipeline", str(file), *words, "--grpo.beta=0.1", "--grpo.learning_rate=0"]) == 0
    run = file.parent / "run"
    imitated, reinforced = (load_file(run / name / "adapter_model.safetensors") for name in ("sft", "grpo"))
    assert max(float(value.abs().max()) for name, value in imitated.items() if "lora_B" in name) > 1e-3
    assert imitated.keys() == reinforced.keys()
    for name, value in imitated.items():
        assert torch.equal(value, reinforced[name]), "at a learning rate of 0 they are the ones of the stage before"
    saved = json.loads((run / "grpo" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(file.parent / "model")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["kl"] for m in metrics if m["stage"] == "grpo"] == [0.0] * 4, "the reference is the SFT policy"
    summary = json.loads((run / "evaluations.json").read_text())
    assert [e["name"] for e in summary["evaluations"]] == ["raw", "sft", "grpo"]


def test_a_step_is_reused_only_where_all_that_it_was_made_from_is_the_same(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run, words = file.parent, file.parent / "run", ["pipeline", str(file)]
    (folder / "taste.py").write_text("def likes(completions, **_):\n    return [len(c) for c in completions]\n")
    monkeypatch.syspath_prepend(folder)
    file.write_text(file.read_text() + '[[rubric]]\nkind = "python"\nfunction = "taste:likes"\n')
    assert main(words) == 0

    def refused(table: str, step: str, *overrides: str) -> None:
        capsys.readouterr()
        assert main([*words, *overrides]) == 2
        assert f"holds a run with another [{table}], from which {step} was made" in capsys.readouterr().err

    def changed(name: str, before: str, after: str) -> str:
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(before, after))
        return text

    rows = changed("held.jsonl", "0+1=", "00+1=")
    refused("data", "evaluations/raw.json")
    (folder / "held.jsonl").write_text(rows)
    source = changed("taste.py", "len(c)", "-len(c)")
    refused("rubric", "evaluations/raw.json")
    (folder / "taste.py").write_text(source)
    tiny.model(seed=1).save_pretrained(folder / "model")  # trained again, of the same name
    refused("model", "evaluations/raw.json")
    tiny.model().save_pretrained(folder / "model")
    assert main(words) == 0
    # A stage that is trained anew takes with it what came after, unless it ends the same.
    shutil.rmtree(run / "sft")
    assert main(words) == 0
    shutil.rmtree(run / "sft")
    refused("model", "evaluations/sft.json", "--sft.learning_rate=0.5")


def test_a_pipeline_that_failed_on_its_data_does_not_block_the_next_try(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = file.parent / "run", ["pipeline", str(file)]
    assert main([*words, "--data.eval.prompt_template={nothing}"]) == 2
    assert not (run / "config.json").exists()
    # After the first evaluation: what it was made from stays, the rest may change.
    monkeypatch.setattr("burnish.cli.stages.train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(words)
    before = (run / "evaluations" / "raw.json").stat().st_mtime_ns
    monkeypatch.undo()
    assert main([*words, "--data.train.limit=16", "--sft.max_steps=2"]) == 0
    assert (run / "evaluations" / "raw.json").stat().st_mtime_ns == before
    assert json.loads((run / "config.json").read_text())["sft"]["max_steps"] == 2
    assert "holds a run with another" not in capsys.readouterr().err
