"""TextArena's games as environments: the policy takes a seat, and the other seats are played by functions."""

from __future__ import annotations

import contextvars
import copy
import difflib
import importlib
import logging
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from burnish.data.formats import Message
from burnish.environments.environment import Environment, Reply
from burnish.environments.turns import behind_prompt, without_reasoning
from burnish.errors import ConfigError, show
from burnish.rewards.calls import accepted
from burnish.rewards.functions import python_function
from burnish.rewards.verifiers import require

__all__ = ["TextArenaEnvironment", "textarena_environment"]

logger = logging.getLogger(__name__)

_MOST_MOVES = 10_000
"""Moves of other seats in a row after which a game is given up: it would never come back to the policy."""
_MOST_TRIES = 500
_generator: contextvars.ContextVar[random.Random | None] = contextvars.ContextVar("generator", default=None)


class _EpisodeRandom:
    """The module `random` as TextArena sees it: in an episode, the episode's own generator.

    Its games seed and use the global one, which episodes would share with one another and with the trainer.
    """

    def __getattr__(self, name: str) -> Any:
        generator = _generator.get()
        return getattr(random if generator is None or not hasattr(generator, name) else generator, name)


_RANDOM = _EpisodeRandom()


def textarena_environment(
    *,
    game: str,
    opponent: str | Callable[..., str] | None = None,
    players: int | None = None,
    seat: int | None = None,
    unfinished_reward: float = -1.0,
    options: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Callable[[], TextArenaEnvironment]:
    """Play a game of TextArena, one seat of which is the policy's; the reward is the game's own.

    Its observations are messages of the user, without the policy's own moves; a turn without its `<think>...</think>`
    is the action. All episodes of a prompt play the same game: the same seed, the same seat, the same opponent.

    Args:
        game: id without a suffix such as "-train", for example "TicTacToe-v0".
        opponent: who plays the other seats: "random" for moves that the game accepts, drawn at random, or a function
            `f(observation) -> move` by "file.py:name", which may also take `rng`, the episode's random.Random.
        players: number of seats; None for 1, or 2 with an opponent.
        seat: the policy's seat; None to draw it for each prompt.
        unfinished_reward: reward of a game that a limit ended: that of a lost one, or a policy could stall.
        options: arguments of the game, such as {max_number = 10}.
        folder: folder of the run file, which the path of a function is relative to.

    Returns:
        A factory of environments.

    Raises:
        ConfigError: TextArena is not installed, or an invalid option. The game itself is first made with the trainer.
    """
    require("textarena", "textarena", "textarena")
    players = players if players is not None else 1 if opponent is None else 2
    if re.search(r"-(raw|train)$", game):
        raise ConfigError(f"game = {game!r}: leave out the suffix; observations and actions are those of the raw game.")
    if players < 1:
        raise ConfigError(f"players = {players}: use at least 1.")
    if players > 1 and opponent is None:
        raise ConfigError(f'players = {players} without an opponent: set opponent = "random", or to a function.')
    if seat is not None and not 0 <= seat < players:
        raise ConfigError(f"seat = {seat}: use 0 to {players - 1}, or leave it out to draw one for each prompt.")
    if isinstance(opponent, str) and opponent != "random":
        opponent = cast("Callable[..., str]", python_function(function=opponent, folder=folder))

    checked: list[bool] = []

    def make() -> TextArenaEnvironment:
        made = TextArenaEnvironment(game, opponent, players, seat, unfinished_reward, options)
        if not checked:
            made.begin(0)
            checked.append(True)
        return made

    return make


class TextArenaEnvironment(Environment):
    """A game of TextArena; see `textarena_environment` for the arguments."""

    def __init__(
        self,
        game: str,
        opponent: str | Callable[..., str] | None,
        players: int,
        seat: int | None,
        unfinished_reward: float,
        options: Mapping[str, Any] | None,
    ) -> None:
        self._game, self._options, self._players, self._fixed_seat = game, dict(options or {}), players, seat
        self._opponent, self._unfinished = opponent, unfinished_reward

    @property
    def name(self) -> str:
        """The id of the game."""
        return self._game

    def begin(self, seed: int) -> None:
        """Make the game and deal.

        Raises:
            ConfigError: TextArena does not know the game, or cannot begin it.
        """
        arena: Any = importlib.import_module("textarena")
        self._generator, self._rng = random.Random(seed), random.Random(seed)
        self.seat = self._rng.randrange(self._players) if self._fixed_seat is None else self._fixed_seat
        self._seen: list[list[tuple[int, str, Any]]] = [[] for _ in range(self._players)]
        self._num_shown, self._is_done = 0, False
        try:
            self.game = self._call(arena.make, f"{self._game}-raw", **self._options)
            _use_episode_random()
            self._call(self.game.reset, num_players=self._players, seed=seed)
        except Exception as error:
            known = sorted(name.removesuffix("-raw") for name in arena.envs.registration.ENV_REGISTRY if "-raw" in name)
            fix = "look at players and options; word games need nltk's data (python -m nltk.downloader words)"
            if self._game not in known:
                close = difflib.get_close_matches(self._game, known, n=3) or known[::40]
                fix = f"use an id of TextArena, such as {', '.join(close)}"
            if isinstance(error, SyntaxError):
                fix = "the source of this game needs a newer Python"
            raise ConfigError(
                f"game = {self._game!r} with players = {self._players}, options = {show(self._options)}: TextArena "
                f"cannot begin it ({type(error).__name__}: {' '.join(str(error).split())[:200]}); {fix}."
            ) from error

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        token = _generator.set(self._generator)
        try:
            return function(*args, **kwargs)
        finally:
            _generator.reset(token)

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Begin a game; its first observation follows the prompt of the row."""
        self.begin(seed)
        self._play_others()
        return behind_prompt(row, self._news())

    def step(self, text: str) -> Reply:
        """Move, and let the others move until it is the policy's turn again."""
        try:
            self._is_done = self._call(self.game.step, action=without_reasoning(text))[0]
        except Exception as error:  # games trip over moves that they do not expect, and a policy could hide in that
            logger.info("%s failed on a move, which ends the game as unfinished: %r", self._game, error)
            return Reply(done=True)
        self._play_others()
        return Reply([{"role": "user", "content": self._news()}], done=self._is_done)

    def reward(self) -> float:
        """Return the reward that the game gives the policy's seat."""
        if not self._is_done:
            return self._unfinished
        given = cast("Mapping[int, float] | None", self._call(self.game.close)[0])
        return self._unfinished if given is None else float(given[self.seat])

    def _play_others(self) -> None:
        """Let other seats move until it is the policy's turn, or the game has ended."""
        for _ in range(_MOST_MOVES):
            if self._is_done:
                return
            player, messages = self._call(self.game.get_observation)
            self._seen[player] += messages
            if player == self.seat:
                return
            if self._opponent == "random":
                move = self._random_move(player, [message for _, message, _ in messages])
            else:
                function = cast("Callable[..., str]", self._opponent)
                shown = "\n".join(self._line(sender, message) for sender, message, _ in self._seen[player])
                move = function(shown, **accepted(function, {"rng": self._rng}))
            self._is_done = self._call(self.game.step, action=move)[0]
        raise RuntimeError(f"{self._game} has not come back to seat {self.seat} in {_MOST_MOVES} moves")

    def _news(self) -> str:
        """Write what the policy has not seen yet, as TextArena does, without the policy's own moves."""
        news, self._num_shown = self._seen[self.seat][self._num_shown :], len(self._seen[self.seat])
        return "\n".join(
            self._line(sender, message)
            for sender, message, kind in news
            if not (sender == self.seat and kind.name == "PLAYER_ACTION")
        )

    def _line(self, sender: int, message: str) -> str:
        name = "GAME" if sender == -1 else self.game.state.role_mapping.get(sender, f"Player {sender}")
        return f"[{name}] {message}"

    def _random_move(self, player: int, news: Sequence[str]) -> str:
        """Draw a move that the game accepts: one that it lists, or one like its examples, tried on a copy of it."""
        listed = list(dict.fromkeys(re.findall(r"\[[^\[\]\n]{1,40}\]", "\n".join(news))))
        self._rng.shuffle(listed)
        for move in listed:
            if self._is_accepted(player, move):
                return move
        text = "\n".join(message for _, message, _ in self._seen[player])
        examples = list(dict.fromkeys(re.findall(r"\[[^\[\]\n]{0,40}\d[^\[\]\n]{0,40}\]", text)))
        largest = min(max(map(int, re.findall(r"\d{1,3}", text)), default=9), 99)
        for _ in range(_MOST_TRIES if examples else 0):
            example = self._rng.choice(examples)
            move = re.sub(r"\d+", lambda _: str(self._rng.randint(0, largest)), example)
            if self._is_accepted(player, move):
                return move
        raise RuntimeError(
            f'opponent = "random" found no move that {self._game} accepts: set opponent to a function of yours'
        )

    def _is_accepted(self, player: int, move: str) -> bool:
        """Return True if a copy of the game takes a move as a valid one."""
        token = _generator.set(random.Random(0))
        try:
            trial = copy.deepcopy(self.game)
            errors = getattr(trial.state, "error_count", 0)
            trial.step(action=move)
            is_invalid = trial.state.game_info[player].get("invalid_move", False)
            return not is_invalid and getattr(trial.state, "error_count", 0) <= errors
        except Exception:  # games trip over moves that they do not expect
            return False
        finally:
            _generator.reset(token)


def _use_episode_random() -> None:
    """Give every loaded module of TextArena the generators of episodes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("textarena.") and vars(module).get("random") is random:
            vars(module)["random"] = _RANDOM
