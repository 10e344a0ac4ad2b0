"""reasoning-gym's tasks over several attempts, graded by the isolated scorer."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.data import load_rows
from burnish.environments.gym import gym_environment
from burnish.errors import ConfigError
from burnish.types import StopReason
from test_episodes import request, setup

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return load_rows({"source": "reasoning_gym", "task": "chain_sum", "size": 1, "seed": 3})[0]


def play(row: dict[str, Any], turns: list[str], **options: Any) -> Any:
    environments, script, engine = setup("chatml", None, factory=gym_environment(**options))
    script.turns = lambda index, sample, number: (turns[number], StopReason.EOS)
    assert environments.rewarding == ["gym"]
    [[completion]] = engine.generate([request(environments, **row)], seed=0, step=0)
    return completion.episode


def answered(value: Any) -> str:
    return f"It is <answer>{value}</answer>"


@pytest.mark.parametrize(
    ("wrong", "options", "reward"),
    [
        (0, {}, 1.0),
        (1, {}, 0.9),
        (2, {}, 0.8),
        (2, {"attempts": 4, "attempt_cost": 0.25}, 0.5),
        (1, {"attempt_cost": 0.0, "keep": "best"}, 1.0),
    ],
)
def test_an_answer_may_be_corrected_at_a_cost(
    row: dict[str, Any], wrong: int, options: dict[str, Any], reward: float
) -> None:
    turns = [*["Hm." if i == 1 else answered(f"{i} or so") for i in range(wrong)], answered(row["answer"])]
    episode = play(row, turns, **options)
    assert episode.error is None
    assert len(episode.turns) == wrong + 1  # a right answer ends the episode
    assert episode.reward == pytest.approx(reward)
    assert episode.rewards == [*episode.rewards[:-1], 1.0]
    assert all(score < 1 for score in episode.rewards[:-1])
    said = [message["content"] for message in episode.messages if message["role"] == "user"]
    left = options.get("attempts", 3) - 1
    assert [f"{left - i} attempt" in text for i, text in enumerate(said)] == [True] * wrong
    if wrong == 2:
        assert said[1].startswith("No answer was found; ")
        assert said[1].endswith("give the answer in <answer>...</answer>.")


def test_the_last_score_counts_or_the_best(row: dict[str, Any]) -> None:
    close = answered(f"{row['answer']} or more")  # a part of its score
    turns = [close, "Nothing.", "Nothing."]
    first = play(row, turns, attempt_cost=0.0, keep="best")
    assert 0.0 < first.rewards[0] < 1.0
    assert first.reward == first.rewards[0]
    assert play(row, turns, attempt_cost=0.0, keep="last").reward == 0.0
    assert play(row, turns, attempt_cost=0.0, keep="best", binary=True).reward == 0.0
    assert "partly right (score 0." in first.messages[1]["content"]


def test_answers_never_run_in_this_process(row: dict[str, Any], tmp_path: Any) -> None:
    target = tmp_path / "written"
    play(row, [answered(f"open({str(target)!r}, 'w')")], attempts=1)
    assert not target.exists()


def test_rows_of_other_sources_are_refused(row: dict[str, Any]) -> None:
    episode = play({}, ["Hm."])
    assert "use rows of the source reasoning_gym" in episode.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attempts": 0}, "attempts = 0: use at least 1"),
        ({"attempt_cost": -1.0}, "attempt_cost = -1: use 0 or more"),
        ({"keep": "first"}, "keep = 'first': use one of best, last"),
        ({"sources": ["tags"]}, "use names out of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gym_environment(**options)
