"""Pairs from samples: the right ones, in the right format, resumable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish import ConfigError, DataError, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from burnish.cli.main import main
from burnish.data import encode_rows, prompt_group
from burnish.evaluation.pairs import best_row, preference_rows, rank_pairs, sample_rows
from burnish.rewards import Rubric
from burnish.rollout import SamplingParams, make_engine
from test_trainers import settings

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
PARAMS = SamplingParams(max_new_tokens=6, eos_token_ids=(0,))


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def sample(text: str, reward: float | None, stop_reason: str = "eos") -> dict[str, Any]:
    return {"text": text, "reward": reward, "criteria": {}, "errors": {}, "stop_reason": stop_reason}


def record(*samples: dict[str, Any], prompt: Any = "p") -> dict[str, Any]:
    return {"index": 3, "prompt": prompt, "row": {"answer": "7"}, "samples": list(samples)}


def test_best_over_worst() -> None:
    made = record(sample("a", 0.5), sample("b", 1.0), sample("c", 0.0), sample("d", 0.4))
    rows = preference_rows(made, pairs_per_prompt=2)
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("b", "c"), ("a", "d")]
    assert rows[0] == {
        "prompt": "p", "answer": "7", "chosen": "b", "rejected": "c", "score_chosen": 1.0, "score_rejected": 0.0,
        "differs_in": [],
    }  # fmt: skip
    assert len(preference_rows(made, pairs_per_prompt=2, min_margin=0.5)) == 1


def test_a_pair_says_what_it_differs_in() -> None:
    criteria = ({"form": 1.0, "right": 1.0, "odd": None}, {"form": 1.0, "right": 0.0, "odd": 2.0})
    made = record(*({**sample(t, r), "criteria": c} for t, r, c in zip("ab", (1.0, 0.0), criteria, strict=True)))
    assert preference_rows(made)[0]["differs_in"] == ["right", "odd"]


def test_ranking_of_pairs() -> None:
    """Three pairs of two problems: scores are lengths of the texts."""
    rows = [
        {"prompt": "p", "chosen": "aaa", "rejected": "a", "differs_in": ["right"]},
        {"prompt": "p", "chosen": "a", "rejected": "a", "differs_in": ["form"]},
        {"prompt": "q", "chosen": "aa", "rejected": "aaaa", "differs_in": ["right"]},
    ]
    found = rank_pairs(lambda prompts, completions: [float(len(c)) for c in completions], rows)
    assert found.ahead == (2.0, 0.0, -2.0)
    assert (found.num_pairs, found.num_problems) == (3, 2)
    assert found.accuracy.mean == pytest.approx((0.5 + 0.0) / 2), "equal scores are wrong; problems count once"
    assert found.accuracy_by_kind["right"].mean == pytest.approx(0.5)
    assert found.accuracy_by_kind["form"].mean == 0.0
    assert found.pairs_by_kind == {"form": 1, "right": 2}
    win = 1 / (1 + math.exp(-2))
    assert found.brier_score == pytest.approx(((1 - win) ** 2 + 0.25 + win**2) / 3)
    longer = rank_pairs(lambda prompts, completions: [float(len(c)) for c in completions], rows[:1])
    assert longer.brier_score == pytest.approx((1 - win) ** 2)
    # Bins of both orders: two at win (one right), two at 1 - win (one right), two at 0.5 (one right).
    assert found.calibration_error == pytest.approx((2 * (win - 0.5) + 2 * (0.5 - (1 - win))) / 6)
    with pytest.raises(DataError, match="at least one pair"):
        rank_pairs(lambda prompts, completions: [], [])


def test_what_makes_no_pair() -> None:
    assert preference_rows(record(sample("a", 1.0), sample("b", 1.0))) == []
    assert preference_rows(record(sample("a", 1.0), sample("a", 0.0))) == [], "equal texts"
    assert preference_rows(record(sample("a", 1.0), sample("b", None))) == [], "a failed reward is no 0"
    assert preference_rows(record(sample("a", 1.0), sample("", 0.0))) == [], "empty"
    for blank in (" ", "\n\n", "\u2028", "\u3000\t"):
        assert preference_rows(record(sample("a", 1.0), sample(blank, 0.0))) == [], "blank"
        assert best_row(record(sample(blank, 1.0))) is None
    assert preference_rows(record(sample("a", 1.0), sample("b", 0.0, "length"))) == [], "cut off"
    assert best_row(record(sample("a", None))) is None
    assert best_row(record(sample("a", 0.4)), min_reward=0.5) is None


def test_conversations_stay_conversations() -> None:
    prompt = [{"role": "user", "content": "?"}]
    made = record(sample("a", 1.0), sample("b", 0.0), prompt=prompt)
    (row,) = preference_rows(made)
    assert row["chosen"] == [{"role": "assistant", "content": "a"}]
    best = best_row(made)
    assert best is not None
    assert best["completion"] == [{"role": "assistant", "content": "a"}]


def sampled(file: Path, rows: Any = ROWS, **changes: Any) -> list[dict[str, Any]]:
    tokenizer = tiny.tokenizer()
    engine = make_engine(tiny.model(), tokenizer)
    options: dict[str, Any] = {"params": PARAMS, "num_samples": 4, "model": "tiny", "prompts_per_round": 2, **changes}
    groups = encode_rows(prompt_group, rows, tokenizer)
    rubric = options.pop("rubric", None) or Rubric.from_functions(digits, None)
    return sample_rows(engine, groups, rubric, file=file, **options)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = sampled(tmp_path / "a.jsonl")
    assert [r["index"] for r in whole] == list(range(6))
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert sampled(tmp_path / "b.jsonl") == whole
    assert sorted((tmp_path / "b.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"num_samples": 5},
        {"seed": 1},
        {"rows": ROWS[:5]},
        {"rows": [{**ROWS[0], "answer": "another"}, *ROWS[1:]]},
        {"rubric": Rubric.from_functions(digits, [2.0])},
        {"rubric": Rubric.from_functions(lambda completions, **_: [1.0] * len(completions))},
    ],
)
def test_samples_of_another_run_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    sampled(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="samples of another model"):
        sampled(tmp_path / "a.jsonl", **changes)


def test_rows_train_the_stages_they_are_for(tmp_path: Path) -> None:
    records = sampled(tmp_path / "samples.jsonl")
    for one in (sample for record in records for sample in record["samples"]):
        one["stop_reason"] = "eos"  # a random model hardly ever ends by itself
    pairs = json.loads(json.dumps([row for one in records for row in preference_rows(one)]))
    assert pairs
    shared = settings(tmp_path, max_steps=1, per_device_train_batch_size=1)
    DPOTrainer(tiny.model(), args=DPOConfig(**shared), train_dataset=pairs, processing_class=tiny.tokenizer()).train()
    best = [row for one in records if (row := best_row(one)) is not None]
    SFTTrainer(tiny.model(), SFTConfig(**shared), train_dataset=best, processing_class=tiny.tokenizer()).train()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.toml").write_text(
        f"""
model = "{tmp_path}/model"
[data]
train = {{ path = "{tmp_path}/rows.jsonl" }}
[[rubric]]
kind = "numeric"
sources = ["last_number"]
[pairs]
output_dir = "{tmp_path}/out"
num_samples = 4
max_completion_length = 6
"""
    )
    status = main(["pairs", str(tmp_path / "run.toml")])
    out = capsys.readouterr()
    assert status == 0, out.err
    assert (tmp_path / "out" / "samples.jsonl").is_file()
    assert (tmp_path / "out" / "best.jsonl").is_file()
    assert main(["pairs", str(tmp_path / "run.toml"), "--pairs.num_samples=1"]) == 2
    assert "a pair needs at least 2" in capsys.readouterr().err
    before = (tmp_path / "out" / "pairs.jsonl").read_bytes()
    tiny.model(seed=1).save_pretrained(tmp_path / "model")  # trained again, of the same name
    assert main(["pairs", str(tmp_path / "run.toml")]) == 2
    assert "holds samples of another model" in capsys.readouterr().err
    assert (tmp_path / "out" / "pairs.jsonl").read_bytes() == before


def test_held_out_prompts_make_no_pairs_and_evaluations_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    text = f"""
model = "{tmp_path}/model"
[data]
train = {{ path = "{tmp_path}/rows.jsonl" }}
eval = {{ path = "{tmp_path}/held.jsonl" }}
[[rubric]]
kind = "numeric"
sources = ["last_number"]
"""
    (tmp_path / "pairs.toml").write_text(
        f'{text}[pairs]\noutput_dir = "{tmp_path}/out"\nnum_samples = 2\nmax_completion_length = 4\n'
    )
    assert main(["pairs", str(tmp_path / "pairs.toml")]) == 0
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == len(ROWS) - 2
    capsys.readouterr()
    (tmp_path / "eval.toml").write_text(f"{text}[evaluation]\nnum_samples = 2\nmax_completion_length = 4\n")
    words = ["eval", str(tmp_path / "eval.toml")]
    assert main([*words, f"--evaluation.compare_with={tmp_path}/a.json"]) == 2
    assert "no such file; evaluation.output writes one" in capsys.readouterr().err
    assert main([*words, f"--evaluation.output={tmp_path}/a.json"]) == 0
    capsys.readouterr()
    assert main([*words, f"--evaluation.compare_with={tmp_path}/a.json"]) == 0
    gain = json.loads(capsys.readouterr().out)["gain_paired"]
    assert gain["over"] == f"{tmp_path}/model"
    assert gain["pass@1"].startswith("0 [0, 0]")
