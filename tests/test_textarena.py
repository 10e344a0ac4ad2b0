"""TextArena's games: seats, opponents, what is shown and rewarded, and that episodes do not share random numbers."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish import GRPOConfig, GRPOTrainer
from burnish.environments.textarena import TextArenaEnvironment, textarena_environment
from burnish.errors import ConfigError
from burnish.types import StopReason
from dialects import speaker
from test_episodes import request, setup

pytest.importorskip("textarena")
ROW: dict[str, Any] = {"prompt": [{"role": "user", "content": ""}]}


def columns(observation: str) -> str:
    """An opponent that fills cells from 3 on."""
    free = observation.rpartition("Available Moves: ")[2]
    return next(f"[{cell}]" for cell in "345678012" if f"'[{cell}]'" in free)


def game(name: str, **options: Any) -> TextArenaEnvironment:
    return textarena_environment(game=name, **options)()


def test_a_known_game_has_a_known_reward_and_shows_what_is_new() -> None:
    make = textarena_environment(game="GuessTheNumber-v0", options={"min_number": 1, "max_number": 4})
    environments, script, engine = setup("chatml", None, factory=make)
    script.turns = lambda index, sample, number: (f"<think>[9]</think>I say [{number + 1}]", StopReason.EOS)
    assert environments.rewarding == ["GuessTheNumber-v0"]
    targets: list[int] = []
    for step in range(4):
        [found] = engine.generate([request(environments, samples=3)], seed=0, step=step)
        turns = {len(c.episode.turns) for c in found if c.episode}
        assert len(turns) == 1  # one game for the whole group
        targets += turns
        for completion in found:
            episode = completion.episode
            assert episode is not None
            assert (episode.error, episode.reward) == (None, 1.0)
            answers = [m["content"] for m in episode.messages if m["role"] == "user"]
            assert answers == ["[GAME] The target number is higher."] * (len(episode.turns) - 1)
            opening = script.tokenizer.decode(episode.opening)
            assert "between 1 and 4 within 10 turns" in opening
            assert "What is 2 + 3?\n\n[GAME] You are Player 0" in opening
        engine.end([])
    assert len(set(targets)) > 1  # and another one in another step


@pytest.mark.parametrize(
    ("moves", "reward", "num_turns"),
    [
        (["[0]", "[1]", "[2]"], 1.0, 3),
        (["[0]", "[1]", "[8]"], -1.0, 3),
        (["[0]", "[0]", "[0]"], -1.0, 3),  # the second invalid move in a row loses
        (["[0]", "none", "[1]", "[2]"], 1.0, 4),
        (["<think>[8]</think> [0]", "[8] is bad</think>[1]", "<think>[7]</think>[2]"], 1.0, 3),
    ],
)
def test_a_function_plays_the_other_seat(moves: list[str], reward: float, num_turns: int) -> None:
    played = game("TicTacToe-v0", opponent=columns, seat=0)
    shown = [played.reset(ROW, 0)[-1]["content"]]
    done = False
    for move in moves:
        reply = played.step(move)
        shown.append(reply.messages[0]["content"])
        if done := reply.done:
            break
    assert done
    assert (played.reward(), len(shown) - 1) == (reward, num_turns)
    assert "[Player 1] [3]\n[GAME] Player 1 placed their symbol (X) in cell 3." in shown[1]
    assert not any("[Player 0]" in text for text in shown)  # its own moves are its turns
    if moves[1] == "none":
        assert "attempted an invalid move. Reason: The submitted move does not follow" in shown[2]
        assert "placed their symbol (X)" not in shown[2]


def test_the_reward_is_that_of_the_policys_seat() -> None:
    played = game("TicTacToe-v0", opponent=columns, seat=1)
    played.reset(ROW, 0)
    assert [played.step(move).done for move in ("[0]", "[8]")] == [False, True]  # against 3, 4 and 5
    assert played.reward() == -1.0


def test_seats_are_drawn_by_seed_and_the_other_may_begin() -> None:
    played = game("TicTacToe-v0", opponent=columns)
    seats = []
    for seed in range(20):
        first = played.reset(ROW, seed)[-1]["content"]
        seats.append(played.seat)
        assert f"You are Player {played.seat}" in first
        assert ("[Player 0] [3]" in first) == (played.seat == 1)
        assert [m["content"] for m in played.reset(ROW, seed)] == [first]
    assert set(seats) == {0, 1}


def _play(name: str, seed: int, players: int = 2) -> tuple[list[str], float | None]:
    played = game(name, opponent="random", players=players)
    shown = [played.reset(ROW, seed)[-1]["content"]]
    for _ in range(60):
        move = played._random_move(played.seat, [shown[-1]])
        reply = played.step(move)
        shown.append(reply.messages[0]["content"])
        if reply.done:
            return shown, played.reward()
    raise AssertionError(f"no end: {shown[-1]}")


@pytest.mark.parametrize(
    ("name", "players"),
    [("TicTacToe-v0", 2), ("Nim-v0", 2), ("KuhnPoker-v0", 2), ("PigDice-v0", 2), ("ThreePlayerTicTacToe-v0", 3)],
)
def test_random_opponents_play_by_the_rules_and_by_the_seed(name: str, players: int) -> None:
    before = random.getstate()
    games = [_play(name, seed, players) for seed in range(6)]
    assert random.getstate() == before  # the trainer's own random numbers are left alone
    assert not any("invalid" in text for shown, _ in games for text in shown)
    assert {reward for _, reward in games} <= {-1.0, 0.0, 1.0}
    assert len({shown[1] for shown, _ in games}) > 1
    with ThreadPoolExecutor(6) as threads:  # interleaved with one another, they are the same games
        assert list(threads.map(lambda seed: _play(name, seed, players), range(6))) == games


def test_a_game_that_a_limit_ends_is_lost() -> None:
    for options, chosen in (({}, -1.0), ({"unfinished_reward": 0.25}, 0.25)):
        played = game("TicTacToe-v0", opponent=columns, seat=0, **options)
        played.reset(ROW, 0)
        played.step("[0]")
        assert played.reward() == chosen


def test_a_move_that_the_game_trips_over_loses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception would exclude the completion, and a policy could look for one instead of losing."""
    played = game("TicTacToe-v0", opponent=columns, seat=0)
    played.reset(ROW, 0)

    def broken(action: str) -> Any:
        raise IndexError(action)

    monkeypatch.setattr(played.game, "step", broken)
    assert played.step("[99]").done
    assert played.reward() == -1.0


def test_an_opponent_without_a_move_fails_its_episode_with_the_fix() -> None:
    make = textarena_environment(game="Chopsticks-v0", opponent="random", seat=1)
    environments, _, engine = setup("chatml", lambda i, s, n: ("[attack]", StopReason.EOS), factory=make)
    [[completion]] = engine.generate([request(environments)], seed=0, step=0)
    assert completion.episode is not None
    assert "set opponent to a function of yours" in (completion.episode.error or "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"game": "TicTacTow-v0", "opponent": "random"}, "use an id of TextArena, such as .*TicTacToe-v0"),
        ({"game": "TicTacToe-v0-train", "opponent": "random"}, "leave out the suffix"),
        ({"game": "TicTacToe-v0"}, "TicTacToe-v0' with players = 1"),
        ({"game": "TicTacToe-v0", "players": 2}, 'set opponent = "random"'),
        ({"game": "TicTacToe-v0", "players": 0}, "players = 0: use at least 1"),
        ({"game": "TicTacToe-v0", "opponent": "random", "seat": 2}, "seat = 2: use 0 to 1"),
        ({"game": "TicTacToe-v0", "opponent": "nowhere.py:play"}, "there is no file"),
        ({"game": "GuessTheNumber-v0", "options": {"most": 3}}, "unexpected keyword argument 'most'"),
    ],
)
def test_what_cannot_be_played_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        textarena_environment(**options)()


def _teach_guessing(model: Any, tokenizer: Any, opening: Any) -> None:
    """Make a model that says a number, so that games end and rewards differ."""
    prompt = tokenizer.apply_chat_template(opening, add_generation_prompt=True, tokenize=False)
    rows = torch.tensor([tokenizer(f"{prompt}[{guess}]<|im_end|>")["input_ids"] for guess in "1234"])
    labels = rows.clone()
    labels[:, : rows.shape[1] - 4] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=rows, labels=labels).loss.backward()
        optimizer.step()


def test_grpo_trains_on_games(tmp_path: Path) -> None:
    tokenizer, end = speaker("chatml")
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": end, "max_position_embeddings": 2048}
    model = tiny.model(**sizes)
    model.generation_config.eos_token_id = end
    options = {"min_number": 1, "max_number": 4, "max_turns": 3}
    make = textarena_environment(game="GuessTheNumber-v0", options=options, unfinished_reward=0.0)
    _teach_guessing(model, tokenizer, make().reset(ROW, 0))
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4, report_to="none",
        max_completion_length=400, log_metrics=str(tmp_path), log_completions=str(tmp_path), bf16=False,
        learning_rate=1e-3, save_strategy="no"
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, args=config, train_dataset=[ROW] * 8, processing_class=tokenizer, environment_factory=make
    )
    trainer.train()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    records = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert len(records) == 24
    for record in records:
        assert "between 1 and 4 within 3 turns" in record["prompt"]
        assert 0.0 <= record["criteria"]["GuessTheNumber-v0"] == record["reward"] <= 1.0
        roles = [message["role"] for message in record["messages"]]
        assert roles == [("assistant", "user")[i % 2] for i in range(len(roles))]
    assert len({record["reward"] for record in records}) > 2
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["episodes/mean_turns"] > 1
    assert last["episodes/failed"] == 0
    assert last["grad_norm"] > 0
