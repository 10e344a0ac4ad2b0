"""`--dry-run`: the rows that training would see, with their masks, from the tokenizer alone; nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import burnish
import tiny
from burnish.cli.dry_run import make_stage
from burnish.cli.main import main
from test_nonsense import EVERY, NAMES, build, chat, good, plain
from test_trainers import settings

ONLINE = ("online_dpo", "grpo", "rloo", "ppo")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model without weights."""
    monkeypatch.chdir(tmp_path)
    tiny.model().config.save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    return tmp_path


def write_run(kind: str, rows: list[dict[str, Any]], fields: str = "") -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = 'model = "model"\n[data]\ntrain = "rows.jsonl"\n'
    text += '[[rubric]]\nkind = "exact"\n' if kind in ONLINE else ""
    text += "[training]\nuse_cpu = true\nbf16 = false\nper_device_train_batch_size = 2\n"
    text += "max_completion_length = 4\n" if kind in ONLINE else ""
    text += "num_generations = 2\n" if kind in ONLINE and kind != "ppo" else ""
    Path("run.toml").write_text(text + fields)


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def bare(text: str) -> str:
    """The tiny tokenizer decodes with spaces between its tokens."""
    return text.replace(" ", "")


SEEN = {
    "sft": "row 1: 6 tokens, 2 in the loss\n1+1=[2<eos>]",
    "dpo": "row 1, rejected: 7 tokens, 3 in the loss\n1+1=[no<eos>]",
    "kto": "row 1, completion: 6 tokens, 2 in the loss\n1+1=[2<eos>]",
    "reward": "row 1, worse: 7 tokens, 1 read\n1+1=n[o]<eos>",
}


@pytest.mark.parametrize("kind", [*SEEN, *ONLINE])
def test_three_rows_and_the_plan(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    rows = [{**row, "answer": "2"} if kind in ONLINE else row for row in good(kind)]
    write_run(kind, rows)
    before = files()
    assert main([kind, "--dry-run", "run.toml"]) == 0
    shown = capsys.readouterr().out
    assert files() == before
    expected = SEEN.get(kind, "row 1, prompt: 4 tokens\n1+1=\n\nexact: from '<answer>2</answer>' the rubric reads '2'")
    assert bare(expected) in bare(shown)
    assert "row 2" in shown
    assert "row 3" not in shown
    assert "rows: 6 read, 6 to train on, 0 left out, 0 truncated" in shown
    assert re.search(r"lengths: \d+ to \d+ tokens a (sequence|prompt)", shown)
    assert "writes: the model and its tokenizer in " in shown
    assert "metrics.jsonl" in shown
    assert "no weights were loaded, nothing was written" in shown


def test_masks_are_green_in_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    write_run("sft", [{"messages": [*chat("sft")["prompt"], *chat("sft")["completion"]]}] * 3,
              "assistant_only_loss = true\n")  # fmt: skip
    assert main(["sft", "run.toml", "--dry-run"]) == 0
    assert "<user>0+1=<eos><assistant>\x1b[1;32m1<eos>\x1b[0m" in bare(capsys.readouterr().out)


def test_what_is_cut_and_what_no_rubric_accepts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run("sft", good("sft"), "max_length = 5\n")
    assert main(["sft", "run.toml", "--dry-run"]) == 0
    assert "6 to train on, 0 left out, 6 truncated\nlengths: 5 to 5 tokens" in capsys.readouterr().out
    write_run("grpo", [{**row, "answer": "two"} for row in good("grpo")])
    Path("run.toml").write_text(Path("run.toml").read_text().replace('"exact"', '"numeric"'))
    assert main(["grpo", "run.toml", "--dry-run"]) == 0
    assert "gold answers: 6 of 6 are not accepted, first row 0 by numeric: " in capsys.readouterr().out
    write_run("sft", [{"messages": "x"}])
    assert main(["sft", "run.toml", "--dry-run"]) == 2
    assert "train_dataset: row 0: messages = 'x', a string" in capsys.readouterr().err
    write_run("reward", [*good("reward"), {"prompt": "1+1=", "completions": ["2", "3"], "labels": [True, False]}])
    assert main(["reward", "run.toml", "--dry-run"]) == 2
    assert "train_dataset: row 0 is preference, row 6 is stepwise" in capsys.readouterr().err


PAIRS = [plain("dpo", i) for i in range(6)]


@pytest.mark.parametrize(
    ("stage", "rows", "fields"),
    [
        *((stage, good(stage, make), {}) for stage in EVERY.split() for make in (plain, chat)),
        (
            "sft",
            [{"messages": [*chat("sft")["prompt"], *chat("sft")["completion"]]}] * 2,
            {"assistant_only_loss": True},
        ),
        ("sft", [{"body": "1+1=2"}] * 2, {"dataset_text_field": "body"}),
        ("sft", [{"text": "1+1=2"}] * 2, {"max_length": 3, "truncation_mode": "split"}),
        ("dpo", PAIRS, {"max_length": 5}),
        ("kto", PAIRS, {"max_length": 5}),
        ("reward", [*PAIRS, {**PAIRS[0], "chosen": "2" * 20}], {"max_length": 12}),
        ("grpo", [*good("grpo"), {"prompt": "9" * 20}], {"max_prompt_length": 8}),
    ],
)
def test_rows_are_encoded_as_the_trainer_does(tmp_path: Path, stage: str, rows: Any, fields: Any) -> None:
    trainer = build(stage, tmp_path, rows, tiny.model(), config=fields)
    config = getattr(burnish, f"{NAMES[stage]}Config")(**settings(tmp_path, **fields))
    rubric = getattr(trainer.stage, "rubric", None)
    groups = make_stage(stage, config, trainer.processing_class, rubric).encode(rows, "train_dataset")
    assert list(trainer.train_dataset) == groups


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("fields", ["num_train_epochs = 3\ngradient_accumulation_steps = 2\n", "max_steps = 2\n"])
def test_the_plan_is_that_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, fields: str) -> None:
    rows = [{**row, "answer": "2"} if kind == "grpo" else row for row in good(kind)[:5]]
    write_run(kind, rows, fields)
    assert main([kind, "run.toml", "--dry-run"]) == 0
    plan = re.search(r"^plan: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert plan is not None
    tiny.model().save_pretrained("model")
    assert main([kind, "run.toml", "--training.output_dir=out"]) == 0
    assert f"[burnish] {plan[1]}\n" in capsys.readouterr().err


def test_a_pipeline_shows_each_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.toml").write_text(
        'model = "model"\n[data]\ntrain = "rows.jsonl"\neval = { path = "rows.jsonl", limit = 4 }\n'
        '[[rubric]]\nkind = "exact"\n[sft]\nbf16 = false\n[pairs]\n[dpo]\nbf16 = false\n[grpo]\nbf16 = false\n'
    )
    before = files()
    assert main(["pipeline", "run.toml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert files() == before
    assert [part.split("]")[0] for part in re.split(r"^\[", shown, flags=re.MULTILINE)[1:]] == [
        "sft", "pairs", "dpo", "grpo"
    ]  # fmt: skip
    assert "<user>4+1=<eos><assistant>[5<eos>]" in bare(shown)
    assert "rows: 16 read, 16 to train on" in shown
    assert "rows are sampled from the model of the previous stage" in shown
    assert "transcripts.jsonl in outputs/run" in shown
