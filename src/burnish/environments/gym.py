"""reasoning-gym's tasks over several attempts: an answer is graded, and the policy may correct it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from burnish.environments.environment import Environment, Reply
from burnish.errors import ConfigError
from burnish.rewards.verifiers import AnswerVerifier, gym_answer

__all__ = ["GymEnvironment", "gym_environment"]

_KEEPS: dict[str, Callable[[list[float]], float]] = {"best": max, "last": lambda scores: scores[-1]}


def gym_environment(
    *,
    attempts: int = 3,
    attempt_cost: float = 0.1,
    keep: str = "last",
    sources: Sequence[str] = ("tag",),
    tag: str = "answer",
    binary: bool = False,
    timeout_seconds: float = 10.0,
) -> Callable[[], GymEnvironment]:
    r"""Grade each turn with the isolated scorer of a row's task, and ask again until an answer is right.

    .. math:: R = \mathrm{keep}(s_1, \dots, s_n) - c\,(n - 1)

    with s the scores in [0, 1] and c the cost of an attempt after the first. Rows are those of the source
    `reasoning_gym`; their columns are those of the criterion `gym`.

    Args:
        attempts: most answers of an episode.
        attempt_cost: what each answer after the first costs.
        keep: the score that counts: "last", or "best".
        sources: sources of the answer, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        binary: round scores below 1 down to 0.
        timeout_seconds: time limit of grading one answer.

    Returns:
        A factory of environments.

    Raises:
        ConfigError: reasoning-gym is not installed, or an invalid option.
    """
    if attempts < 1:
        raise ConfigError(f"attempts = {attempts}: use at least 1.")
    if attempt_cost < 0:
        raise ConfigError(f"attempt_cost = {attempt_cost:g}: use 0 or more.")
    if keep not in _KEEPS:
        raise ConfigError(f"keep = {keep!r}: use one of {', '.join(_KEEPS)}.")
    verifier = gym_answer(sources=sources, tag=tag, binary=binary, timeout_seconds=timeout_seconds)
    return lambda: GymEnvironment(verifier, attempts=attempts, attempt_cost=attempt_cost, keep=keep)


class GymEnvironment(Environment):
    """A task of reasoning-gym; see `gym_environment` for the arguments."""

    def __init__(self, verifier: AnswerVerifier, *, attempts: int, attempt_cost: float, keep: str) -> None:
        self._verifier, self._attempts = verifier, attempts
        self._cost, self._keep = attempt_cost, _KEEPS[keep]
        self.scores: list[float] = []

    @property
    def name(self) -> str:
        """The kind in run files."""
        return "gym"

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Begin with the row's own prompt."""
        if row.get("gym_task") is None:
            raise ValueError("the row has no gym_task: use rows of the source reasoning_gym")
        self._row, self.scores = row, []

    def step(self, text: str) -> Reply:
        """Grade an answer; say that it is wrong, as long as there is another attempt."""
        verifier, answer = self._verifier, self._verifier.extract(text)
        score: float | Exception = 0.0
        if answer is not None:
            (score,) = verifier.grade([(answer, self._row)])
        if isinstance(score, Exception):
            raise score
        self.scores.append(score)
        left = self._attempts - len(self.scores)
        said = "Your answer is not right" if answer is not None else "No answer was found"
        if 0.0 < score < 1.0:
            said = f"Your answer is partly right (score {score:.2f})"
        where = f" in <{verifier.tag}>...</{verifier.tag}>" if "tag" in verifier.sources else ""
        tries = f"{left} attempt{'s' if left > 1 else ''} left"
        again = f"{said}; {tries}. Think again, and give the answer{where}."
        return Reply([{"role": "user", "content": again}], done=score >= 1.0 or left == 0, reward=score)

    def reward(self) -> float | None:
        """Return the score that counts, minus the cost of further attempts; 0 where no answer was given."""
        return self._keep(self.scores or [0.0]) - self._cost * max(len(self.scores) - 1, 0)
