"""`burnish rewards check`: gold answers, tricks, samples, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.cli.main import main
from burnish.errors import RewardError
from burnish.rewards import Criterion, Rubric, rubric_from_config
from burnish.rewards.check import check_rubric, check_samples
from burnish.types import Completion

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 7)]


def careful() -> Rubric:
    return rubric_from_config([
        {"kind": "exact", "requires": ["format"]},
        {"kind": "format", "tags": ["think", "answer"], "weight": 0.2},
    ])  # fmt: skip


def test_a_careful_rubric_has_no_findings() -> None:
    check = check_rubric(careful(), ROWS)
    assert check.findings == []
    assert check.totals["gold"] == pytest.approx(1.2)
    exact, form = check.criteria
    assert exact.values == {
        "gold": 1.0, "nothing": 0.0, "the prompt": 0.0, "every tag": 0.0, "a sentence repeated": 0.0,
        "every answer": pytest.approx(1 / 6), "another row's answer": 0.0,
    }  # fmt: skip
    assert form.values["another row's answer"] == 1.0
    assert exact.failed == form.failed == 0


def test_a_rubric_that_pays_for_tricks_is_found_out() -> None:
    def hopeful(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(gold in text) for text, gold in zip(completions, answer, strict=True)]

    def long(completions: list[str], **columns: Any) -> list[float]:
        return [min(1.0, len(text) / 100) for text in completions]

    contained = check_rubric(Rubric([Criterion("hopeful", hopeful)]), ROWS)
    assert any(line.startswith("every answer earns 1 ") for line in contained.findings)
    rewarded = check_rubric(Rubric([Criterion("long", long)]), ROWS)
    assert any(line.startswith("a sentence repeated earns 1 ") for line in rewarded.findings)
    assert not any(line.startswith("nothing") for line in rewarded.findings)


def test_broken_golds_and_failing_criteria_are_named() -> None:
    def fragile(completions: list[str], **columns: Any) -> list[Any]:
        return [ValueError("too long") if len(text) > 200 else 0.0 for text in completions]

    rows = [*ROWS, {"prompt": "p", "answer": "many"}]
    rubric = rubric_from_config([{"kind": "numeric"}])
    check = check_rubric(Rubric([*rubric.criteria, Criterion("fragile", fragile, 0.0)]), rows)
    numeric, broken = check.criteria
    assert numeric.failed > 0
    assert "not a number" in str(numeric.first_error)
    assert broken.failed == pytest.approx(1 / 7, abs=0.03)
    assert any("fragile fails on" in line and "too long" in line for line in check.findings)


def test_a_criterion_that_always_fails_does_not_end_the_check() -> None:
    def never(completions: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("no service")

    check = check_rubric(Rubric([*careful().criteria, Criterion("never", never)]), ROWS)
    assert check.criteria[2].failed == 1.0
    assert set(check.totals.values()) == {None}
    assert any("never fails on 100.0%" in line and "no service" in line for line in check.findings)


def samples(*texts: list[str]) -> list[tuple[dict[str, Any], list[Completion]]]:
    return [
        (row, [Completion([0] * len(text), text=text) for text in own]) for row, own in zip(ROWS, texts, strict=False)
    ]


def test_samples_show_ties_and_criteria_that_move_together() -> None:
    def same(completions: list[str], **columns: Any) -> list[float]:
        return [3 * float("<answer>" in text) + 1 for text in completions]

    def constant(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    def tagged(completions: list[str], **columns: Any) -> list[float]:
        return [float("<answer>" in text) for text in completions]

    rubric = Rubric([Criterion("tagged", tagged), Criterion("same", same), Criterion("constant", constant)])
    check = check_samples(rubric, samples(["<answer>", "b"], ["a", "b"], ["a", "a"]))
    assert check.ties == pytest.approx(2 / 3)
    assert check.correlations == {("tagged", "same"): pytest.approx(1.0)}
    assert any(line.startswith("all completions tie on 67%") for line in check.findings)
    assert any(line.startswith("constant: all completions tie on 100%") for line in check.findings)
    assert any(line.startswith("tagged and same move together") for line in check.findings)


def test_nothing_to_check_is_an_error() -> None:
    with pytest.raises(RewardError, match="rows"):
        check_rubric(careful(), [])
    with pytest.raises(RewardError, match="samples"):
        check_samples(careful(), [])


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "m"\n[data]\ntrain = "{tmp_path / "rows.jsonl"}"\n'
        '[[rubric]]\nkind = "exact"\n[[rubric]]\nkind = "format"\ntags = ["answer"]\nweight = 0.2\n'
        f'[training]\noutput_dir = "{tmp_path / "out"}"\n'
    )
    return file


def test_the_command_prints_and_writes(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "check.json"
    picture = tmp_path / "check.svg"
    assert main(["rewards", "check", str(run_file), "--json", str(target), "--svg", str(picture), "--rows", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 prompts, 2 criteria" in out
    assert "another row's answer" in out
    assert "no findings" in out
    found = json.loads(target.read_text())
    assert found["num_prompts"] == 4
    assert found["criteria"][0]["values"]["gold"] == 1.0
    assert "another row" in picture.read_text()


def test_overrides_reach_the_rubric(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "check", str(run_file), "--rubric.0.tag", "result"]) == 0
    assert "exact" in capsys.readouterr().out


def test_the_command_scores_transcripts(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"step": 0, "prompt_index": i, "completion": f"<answer>{text}</answer>", "num_tokens": 3}
        for i in (0, 1)
        for text in ("2", "3")
    ]
    path = tmp_path / "transcripts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["rewards", "check", str(run_file), "--transcripts", str(path)]) == 0
    out = capsys.readouterr().out
    assert "2 prompts" in out
    assert "samples" in out
    path.write_text(json.dumps(records[0] | {"prompt_index": 99}) + "\n")
    assert main(["rewards", "check", str(run_file), "--transcripts", str(path)]) == 2
    assert "prompt_index = 99" in capsys.readouterr().err
    path.write_text("nonsense\n")
    assert main(["rewards", "check", str(run_file), "--transcripts", str(path)]) == 2
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"), [(["--rows", "0"], "--rows"), (["--transcripts", "/none.jsonl"], "--transcripts")]
)
def test_bad_options_are_named(
    words: list[str], named: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rewards", "check", str(run_file), *words]) == 2
    assert named in capsys.readouterr().err
