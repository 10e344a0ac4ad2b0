"""The report: what it embeds, what it says of incomplete runs, and that a run's text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import ConfigError, DataError
from burnish.report import write_report
from burnish.report.records import MetricRow, Transcript, finite, read_run
from burnish.report.series import ema, histograms, pack_transcripts, sample_evenly, stage_curves

HOSTILE = '</script><img src=x onerror=alert(1)><!-- <script> & \u2028 \ud800 \x00 ]]> \'" onfocus=alert(2) x="'


class Page(HTMLParser):
    """The elements of a page as a browser's tokenizer sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._open.append(dict(attrs).get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "title"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.blocks[self._open[-1]] = self.blocks.get(self._open[-1], "") + data
        else:
            self.text += data

    def json(self, name: str) -> Any:
        return json.loads(self.blocks[name])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric(stage: str, step: int, **values: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "time": 1000.0 + 60 * step, **values}


def transcript(step: int, reward: float | None = 1.0, stage: str = "grpo", **changes: Any) -> dict[str, Any]:
    row = {
        "stage": stage, "step": step, "prompt_index": 7, "sample": 0, "prompt": "2+2?", "completion": "4",
        "stop_reason": "eos", "num_tokens": 3, "reward": reward, "criteria": {"correct": reward}, "errors": {},
        "advantage": 0.5,
    }  # fmt: skip
    return row | changes


def record(step: int, reward: float | None = 1.0, stage: str = "grpo", sample: int = 0) -> Transcript:
    return Transcript(stage, step, 0, sample, "p", "c", "eos", 1, reward, {"correct": reward}, {}, None)


def evaluation(name: str, mean: float) -> dict[str, Any]:
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
    return {
        "name": name, "num_problems": 40, "num_samples": 8, "pass_at_k": {"4": interval, "1": interval},
        "criteria": {"correct": interval}, "mean_tokens": 12.5, "truncated_fraction": 0.25,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A whole run: two stages, two evaluations."""
    path = tmp_path / "run"
    path.mkdir()
    sft = [metric("sft", step, loss=3.0 - step) for step in (1, 2)]
    grpo = [metric("grpo", step, reward=0.1 * step, **{"rewards/correct/mean": 0.2}) for step in (1, 2, 3)]
    write_lines(path / "metrics.jsonl", sft + grpo)
    write_lines(path / "transcripts.jsonl", [transcript(step, reward=step / 4) for step in (1, 2, 3)])
    comparisons = [
        {"before": "raw", "after": "grpo", "metric": "pass@1", "mean": 0.3, "low": 0.2, "high": 0.4},
        {"before": "raw", "after": "grpo", "metric": "pass_at_4", "mean": -0.02, "low": -0.05, "high": 0.01},
        {"before": "raw", "after": "grpo", "metric": "correct", "mean": -0.5, "low": -0.6, "high": -0.4},
    ]
    document = {"evaluations": [evaluation("raw", 0.2), evaluation("grpo", 0.5)], "comparisons": comparisons}
    (path / "evaluations.json").write_text(json.dumps(document), encoding="utf-8")
    (path / "config.json").write_text('{"model_name_or_path": "tiny", "task": "sums", "seed": 1}', encoding="utf-8")
    (path / "environment.json").write_text('{"torch": "2.13"}', encoding="utf-8")
    return path


def test_offline_run(run_dir: Path) -> None:
    """No transcripts are missed, a lower loss is better, a reward model has figures without pass@k."""
    write_lines(run_dir / "metrics.jsonl", [metric("sft", 0, eval_loss=2.0), metric("reward", 1, eval_accuracy=0.8)])
    (run_dir / "transcripts.jsonl").unlink()
    judge = {"name": "reward", "criteria": {"pairs ranked right": {"mean": 0.8, "low": 0.7, "high": 0.9}}}
    nll = {"before": "raw", "after": "sft", "metric": "nll"}
    comparisons = [
        {**nll, "mean": -0.3, "low": -0.4, "high": -0.2},
        {**nll, "mean": 0.2, "low": 0.1, "high": 0.3},
    ]
    document = {"evaluations": [evaluation("raw", 0.2), judge], "comparisons": comparisons}
    (run_dir / "evaluations.json").write_text(json.dumps(document), encoding="utf-8")
    source = write_report(run_dir).read_text(encoding="utf-8")
    assert "transcripts.jsonl" not in source.split("<script")[0]
    assert [source.count(f'<li class="{kind}">') for kind in ("better", "worse")] == [1, 1]
    assert source.index('<li class="better">') < source.index('<li class="worse">')
    assert "pairs ranked right" in source


def test_complete_run(run_dir: Path) -> None:
    path = write_report(run_dir)
    page = Page(path)
    assert path == run_dir / "report.html"
    assert [p.name for p in run_dir.glob("report*")] == ["report.html"]
    assert page.blocks["title"] == "tiny · sums · burnish report"
    assert "Complete" in page.text
    assert "Read first" not in page.text
    assert "2 SFT + 3 GRPO" in page.text
    assert "2 min 00 s" in page.text  # 1060 to 1180 s
    assert "All 3 completions" in page.text
    assert '"seed": 1' in page.text
    assert '"torch": "2.13"' in page.text


def test_summary_says_whether_intervals_exclude_zero(run_dir: Path) -> None:
    text = Page(write_report(run_dir)).text
    assert "pass@1, 95% CI 40.0 to 60.0" in text
    gains = text[text.index("Paired differences") : text.index("Training reward")].replace("\N{MINUS SIGN}", "-")
    assert "+30.0 pp[+20.0 to +40.0]interval excludes 0" in gains
    assert "-2.0 pp[-5.0 to +1.0]interval includes 0" in gains
    assert "-0.5[-0.6 to -0.4]interval excludes 0" in gains
    source = Page(run_dir / "report.html").source
    assert [source.count(f'<li class="{kind}">') for kind in ("better", "unclear", "worse")] == [1, 1, 1]


def test_embedded_json_is_the_run(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    charts, transcripts = page.json("charts-data"), page.json("transcripts-data")
    assert [(stage["name"], stage["steps"]) for stage in charts["curves"]] == [("sft", [1, 2]), ("grpo", [1, 2, 3])]
    reward = charts["curves"][1]["panels"][0]
    assert (reward["title"], reward["series"][0]["raw"]) == ("Reward, total", [0.1, 0.2, 0.1 * 3])
    assert charts["curves"][1]["panels"][1]["title"] == "correct"
    assert charts["evaluations"][1]["pass"]["1"] == [0.5, 0.4, 0.6]
    assert transcripts["total"] == 3
    assert transcripts["prompts"] == ["2+2?"]
    assert transcripts["rows"][2] == [0, 3, 7, 0, 0, "4", 0, 3, 0.75, 0.5, [0.75], {}]


def test_page_needs_nothing_else(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "data", "action", "style"} & attributes.keys(), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
    assert not any(word in page.blocks["style"] for word in ("url(", "@import"))
    assert not any(word in page.blocks["script"] for word in ("fetch(", "import(", "XMLHttpRequest", "innerHTML"))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text(run_dir: Path) -> None:
    clean = [tag for tag, _ in Page(write_report(run_dir)).tags]
    row = transcript(1, prompt=HOSTILE, completion=HOSTILE, stop_reason=HOSTILE, errors={HOSTILE: HOSTILE})
    write_lines(run_dir / "transcripts.jsonl", [row | {"stage": HOSTILE, "criteria": {HOSTILE: 1.0}}])
    write_lines(run_dir / "metrics.jsonl", [metric(HOSTILE, 1, **{HOSTILE: math.nan, "loss": 1.0})])
    document = {
        "evaluations": [evaluation(HOSTILE, 0.2) | {"criteria": {HOSTILE: {"mean": 1}}}],
        "comparisons": [{"before": HOSTILE, "after": HOSTILE, "metric": HOSTILE, "mean": 1, "low": 0, "high": 2}],
    }
    (run_dir / "evaluations.json").write_text(json.dumps(document), encoding="utf-8")
    (run_dir / "config.json").write_text(json.dumps({"model": HOSTILE, "task": HOSTILE}), encoding="utf-8")
    page = Page(write_report(run_dir))
    assert [tag for tag, _ in page.tags if tag == "script"] == [tag for tag in clean if tag == "script"]
    assert not [tag for tag, attributes in page.tags if tag == "img" or any(name[:2] == "on" for name in attributes)]
    assert "<" not in page.blocks["transcripts-data"] + page.blocks["charts-data"]
    embedded = page.json("transcripts-data")
    assert embedded["rows"][0][5] == HOSTILE
    assert embedded["prompts"] == embedded["criteria"] == embedded["stages"] == embedded["stops"] == [HOSTILE]
    assert "<img src=x onerror=alert(1)>" in page.text  # escaped in the source, so read back as text


def test_interrupted_run_says_what_is_missing(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        content = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(content + '{"stage": "grpo", "step": 9, "completion": "é'.encode()[:-1])
    (run_dir / "evaluations.json").write_text('{"evaluations": [', encoding="utf-8")
    (run_dir / "environment.json").unlink()
    run = read_run(run_dir)
    assert (len(run.metrics), len(run.transcripts)) == (5, 3)
    assert run.notes == [
        "environment.json: missing.",
        "metrics.jsonl: line 6, the last, is cut and left out (the run stopped as it wrote).",
        "transcripts.jsonl: line 4, the last, is cut and left out (the run stopped as it wrote).",
        "evaluations.json: cut or not a JSON object; left out.",
    ]
    text = Page(write_report(run_dir)).text
    assert all(note in text for note in run.notes)
    assert "See the notes (4)" in text


def test_a_file_that_may_not_be_read_is_a_note(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.read_text

    def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert read_run(run_dir).notes == ["config.json: cannot be read (Permission denied)."]


def test_empty_directory_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    for name in ("metrics.jsonl", "transcripts.jsonl", "evaluations.json", "config.json", "environment.json"):
        assert f"{name}: missing." in page.text
    assert page.blocks["title"] == f"{tmp_path.name} · burnish report"
    assert page.json("charts-data")["curves"] == []
    assert page.json("transcripts-data")["rows"] == []


def test_odd_lines_are_counted_not_fatal(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    lines = ["[1]", deep, '{"step": 1, "loss": NaN, "kl": "high"}', '{"loss": 3}', '{"step": 1, "grad_norm": 2}', ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    chat = [{"role": "user", "content": "hi"}]
    write_lines(tmp_path / "transcripts.jsonl", [{"step": 2, "prompt": chat, "reward": "x", "criteria": [1]}])
    (tmp_path / "evaluations.json").write_text('{"evaluations": [{"pass_at_k": {"one": 1}}, 3]}', encoding="utf-8")
    run = read_run(tmp_path)
    assert run.metrics == [MetricRow("train", 1, None, {"loss": None, "grad_norm": 2.0})]
    assert json.loads(run.transcripts[0].prompt) == chat
    assert run.transcripts[0].reward is None
    assert run.transcripts[0].criteria == {}
    assert "metrics.jsonl: 2 lines are not JSON objects and are left out; the first is line 1." in run.notes
    assert "metrics.jsonl: 1 lines have no step and are left out." in run.notes
    assert "metrics.jsonl: loss of train is not finite (NaN or infinite), first at step 1." in run.notes
    series = Page(write_report(tmp_path)).json("charts-data")["curves"][0]["panels"][0]["series"][0]
    assert (series["raw"], series["bad"], series["count"]) == ([None], [1], 0)


def test_resumed_steps_are_merged_and_the_later_value_wins(tmp_path: Path) -> None:
    rows = [metric("sft", step, loss=loss) for step, loss in ((1, 1.0), (3, 9.0), (2, 2.0), (3, 3.0))]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert [(row.step, row.values["loss"]) for row in read_run(tmp_path).metrics] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_last_stage_without_evaluation_is_a_note(run_dir: Path) -> None:
    (run_dir / "evaluations.json").write_text(json.dumps({"evaluations": [evaluation("raw", 0.2)]}), encoding="utf-8")
    assert read_run(run_dir).notes == ["evaluations.json: no evaluation of grpo, the last stage that logged metrics."]


@pytest.mark.parametrize(
    ("run", "output", "limit", "error", "words"),
    [
        ("nowhere", None, 1, DataError, ("run_dir", "nowhere", "does not exist", "metrics.jsonl")),
        ("file", None, 1, DataError, ("run_dir", "is a file", "output directory")),
        (".", None, -1, ConfigError, ("max_transcripts = -1", "0 (embed none)")),
        (".", ".", 1, ConfigError, ("output", "it is a folder", "name a file")),
    ],
)
def test_user_errors_name_field_value_and_fix(
    tmp_path: Path, run: str, output: str | None, limit: int, error: type[Exception], words: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    target = None if output is None else tmp_path / output
    with pytest.raises(error) as raised:
        write_report(tmp_path / run, target, max_transcripts=limit)
    assert all(word in str(raised.value) for word in words)


def test_output_and_cap(run_dir: Path, tmp_path: Path) -> None:
    path = write_report(str(run_dir), tmp_path / "new" / "page.html", max_transcripts=2)
    page = Page(path)
    assert path == tmp_path / "new" / "page.html"
    assert "2 of 3 completions, sampled evenly over the steps (max_transcripts = 2)" in page.text
    assert len(page.json("transcripts-data")["rows"]) == 2
    assert page.json("transcripts-data")["total"] == 3
    assert page.json("charts-data")["histograms"][0]["late"]["last"] == 3  # over all three, not the two embedded


def test_sample_evenly() -> None:
    many = [record(step, sample=i) for step, count in ((1, 2), (2, 10), (3, 10)) for i in range(count)]
    kept = sample_evenly(many, 12)
    assert [sum(t.step == step for t in kept) for step in (1, 2, 3)] == [2, 5, 5]
    assert [t.sample for t in kept if t.step == 2] == [0, 2, 4, 6, 8]
    assert sample_evenly(many, 22) == many
    assert sample_evenly(many, 0) == []
    assert [t.step for t in sample_evenly([record(step) for step in range(10)], 5)] == [0, 2, 4, 6, 8]
    for limit in range(23):
        assert len(sample_evenly(many, limit)) == limit


def test_ema_by_hand() -> None:
    # span 3: decay 1/2, so 4 is (0.5 * 1 + 7) / (0.5 + 1) at the second value: 7.5 / 1.5 = 5
    assert ema([1.0, 7.0], 3) == [1.0, 5.0]
    assert ema([None, 2.0, None, 2.0], 5) == [None, 2.0, 2.0, 2.0]
    assert ema([3.0, 8.0], 1) == [3.0, 8.0]


def test_panels_are_ordered_and_nothing_is_dropped() -> None:
    timed = ["seconds/update", "seconds/sampling", "tokens/update"]
    names = ["mystery", *timed, "loss", "rewards/b/mean", "rewards/a/mean", "reward", "epoch"]
    (stage,) = stage_curves([MetricRow("grpo", 1, None, dict.fromkeys(names, 1.0))])
    shown = [(panel["group"], panel["title"], len(panel["series"])) for panel in stage["panels"]]
    assert shown == [
        ("Rewards", "Reward, total", 1),
        ("Rewards", "b", 1),
        ("Rewards", "a", 1),
        ("Optimisation", "Loss", 1),
        ("Speed", "Where the time of a step goes", 2),
        ("Speed", "Tokens of a step", 1),
        ("Other metrics", "mystery", 1),
    ]
    (time,) = (panel for panel in stage["panels"] if panel["stacked"])
    assert [line["label"] for line in time["series"]] == ["sampling", "update"]


def test_long_runs_are_thinned_with_extremes_over_all() -> None:
    rows = [MetricRow("sft", step, None, {"loss": 50.0 if step == 2 else 1.0}) for step in range(1, 4001)]
    (stage,) = stage_curves(rows)
    (line,) = stage["panels"][0]["series"]
    assert (stage["stride"], stage["num_steps"], len(stage["steps"]), len(line["raw"])) == (3, 4000, 1334, 1334)
    assert max(line["raw"]) == 1.0
    assert (line["max"], line["count"]) == ((50.0, 2), 4000)


def test_histogram_by_hand() -> None:
    # twenty steps: a fifth is four; 0 and 1 are the first and the last of 20 bins
    rows = [record(step, reward=float(step > 10)) for step in range(1, 21)]
    rows += [record(1, reward=1.0), record(2, reward=None)]
    (bins,) = histograms(rows)
    assert bins["early"] == {"first": 1, "last": 4, "count": 5, "shares": [0.8, *[0.0] * 18, 0.2]}
    assert bins["late"] == {"first": 17, "last": 20, "count": 4, "shares": [*[0.0] * 19, 1.0]}
    assert histograms([record(1)]) == []
    assert histograms([record(1), record(2)])[0]["late"]["shares"][0] == 1.0


def test_packed_transcripts_keep_failures() -> None:
    failed = Transcript("grpo", 1, None, 2, "p", "c", "", None, None, {"a": None}, {"b": "boom"}, None)
    packed = pack_transcripts([failed, record(2)], 9)
    assert packed["criteria"] == ["a", "b", "correct"]
    assert packed["rows"][0] == [0, 1, None, 2, 0, "c", 0, None, None, None, [None, None, None], {"b": "boom"}]
    assert packed["rows"][1][10] == [None, None, 1.0]


@pytest.mark.parametrize("value", [True, "1", None, math.nan, -math.inf, 10**400, [1]])
def test_finite_refuses(value: object) -> None:
    assert finite(value) is None
