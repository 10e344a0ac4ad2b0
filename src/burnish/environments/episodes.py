"""Episodes of several turns over any engine: sample a turn, let the environment answer, go on behind its answer.

`EpisodeEngine` is an engine: it takes the requests of a rollout and returns one completion per episode, which holds
the sampled tokens of all turns, as they were sampled, and between them the environment's, which are not in the loss.
Episodes play concurrently: turns that are waiting are sampled together, while tools of other episodes run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from burnish.data.tokens import decode_text
from burnish.environments.dialogue import Dialogue
from burnish.environments.environment import Environment, Reply, called
from burnish.errors import DataError, contained
from burnish.rewards.calls import shared_loop
from burnish.rollout.collect import generate
from burnish.rollout.engine import Engine, EngineOver, OverlappingEngine, Request
from burnish.rollout.prompts import Shard
from burnish.rollout.sampling import stream_key
from burnish.types import Completion, Episode, Group, StopReason

__all__ = ["Budget", "EpisodeEngine", "OverlappingEpisodeEngine", "episode_engine", "share_openings"]

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 0.1
"""Time that turns wait for those of other episodes, so that they are sampled together."""
_TURN_SAMPLES = 1 << 20
"""Distance of the sample numbers of two turns, which key their random numbers."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of an episode; `max_new_tokens` of its request is the one on tokens, the environment's included.

    Attributes:
        turns: most turns of the policy; None for no limit.
        seconds: most time of an episode, looked at after each turn; None for no limit.
        step_seconds: most time of one call of the environment; None for no limit.
        positions: most tokens of a context, which the model has positions for; None for no limit.
    """

    turns: int | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    positions: int | None = None


@dataclass(slots=True)
class _Play:
    """A running episode: its context before the first turn, and the completion so far."""

    request: Request
    sample: int
    environment: Environment
    schemas: Sequence[dict[str, Any]]
    opening: list[int]
    completion: Completion
    record: Episode
    started: float = field(default_factory=time.monotonic)


class EpisodeEngine(EngineOver):
    """Engine that plays an episode for every sample.

    Args:
        engine: samples the turns.
        dialogue: renders what comes between them.
        make_environment: returns an environment for a row of the data set.
        budget: limits of an episode.
    """

    def __init__(
        self,
        engine: Engine,
        dialogue: Dialogue,
        make_environment: Callable[[Mapping[str, Any]], Environment],
        budget: Budget,
    ) -> None:
        self.engine = engine
        self._dialogue = dialogue
        self._make_environment = make_environment
        self._budget = budget

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        """Play the episodes of each request, in order.

        Raises:
            EngineError: the engine broke its contract.
        """
        turns = _Turns(sum(request.num_samples for request in requests))
        begun = [self._begin(request, turns.ask, turns.finish, seed, step) for request in requests]
        for future in begun:
            future.add_done_callback(turns.give_up_if_failed)
        try:
            while batch := turns.next():
                asked = [request for request, _ in batch]
                found = generate(self.engine, asked, seed=seed, step=step)
                for (_, future), completions in zip(batch, found, strict=True):
                    future.set_result(completions)
            return [future.result() for future in begun]
        finally:
            for future in begun:
                future.cancel()

    def _begin(
        self,
        request: Request,
        ask: Callable[[Request], Future[list[Completion]]],
        finish: Callable[[], None],
        seed: int,
        step: int,
    ) -> Future[list[Completion]]:
        """Start the episodes of one request on the event loop."""

        async def sample(request: Request) -> list[Completion]:
            asked = ask(request)
            try:
                return await asyncio.wrap_future(asked)
            except asyncio.CancelledError:
                self._give_up(asked)
                raise

        async def play_all(opened: list[Environment]) -> list[Completion]:
            plays = await asyncio.gather(
                *(self._open(request, number, seed, step, opened) for number in range(request.num_samples))
            )
            ready = [play for play in plays if play.record.error is None]
            first: list[Completion] = []
            shares = (
                bool(ready) and len(ready) == len(plays) and all(play.opening == ready[0].opening for play in ready)
            )
            if shares:  # they are sampled as one group, whose prompt is read once
                first = await sample(self._turn_of(ready[0], request.num_samples))

            async def go_on(play: _Play, number: int) -> Completion:
                try:
                    turn = first[number] if shares else None
                    while play.record.error is None:
                        if turn is None:
                            turn = (await sample(self._turn_of(play, 1)))[0]
                        if not await self._take(play, turn):
                            break
                        turn = None
                    return await self._end(play)
                finally:
                    finish()

            done = list(await asyncio.gather(*(go_on(play, number) for number, play in enumerate(plays))))
            # An opening of their own changes the completions once all ranks know it.
            if request.on_done is not None and all(play.record.opening is None for play in plays):
                request.on_done(done)
            return done

        async def episodes() -> list[Completion]:
            opened: list[Environment] = []
            try:
                return await play_all(opened)
            except BaseException:  # given up, so that `end` will not hear of them
                await self._close(opened)
                raise

        return asyncio.run_coroutine_threadsafe(episodes(), shared_loop("episodes"))

    def _give_up(self, asked: Future[list[Completion]]) -> None:
        """Stop sampling a turn that nobody waits for; an engine in this process has sampled it by then."""

    async def _open(self, request: Request, number: int, seed: int, step: int, opened: list[Environment]) -> _Play:
        """Make an environment, note it, reset it, and encode the context of the first turn."""
        completion = Completion([], loss_mask=[], sampler_logprobs=[], policy_logprobs=[])
        record = completion.episode = Episode()
        play = _Play(request, number, Environment(), (), list(request.prompt_ids), completion, record)
        try:
            play.environment = await self._called(self._make_environment, request.row)
            opened.append(play.environment)
            record.environment, record.name = play.environment, play.environment.name
            play.schemas = play.environment.schemas()
            # Equal over the samples of a group: they answer the same task.
            chance = int(stream_key(seed, step, request.index, 0)) & 0x7FFFFFFF
            if (messages := await self._called(play.environment.reset, request.row, chance)) is not None:
                play.opening = record.opening = self._dialogue.opening(messages, play.schemas)
            positions = self._budget.positions
            if positions is not None and len(play.opening) >= positions:
                raise DataError(f"its opening has {len(play.opening)} tokens, and the model positions for {positions}")
        except Exception as error:
            record.error = _reason("reset", error)
        return play

    def _turn_of(self, play: _Play, num_samples: int) -> Request:
        """Ask for the next turn of an episode."""
        request, sampled = play.request, play.completion.token_ids
        left = request.params.max_new_tokens - len(sampled)
        if self._budget.positions is not None:
            left = min(left, self._budget.positions - len(play.opening) - len(sampled))
        turn = len(play.record.turns)
        return Request(
            [*play.opening, *sampled],
            num_samples,
            dataclasses.replace(request.params, max_new_tokens=max(left, 1)),
            index=request.index,
            first_sample=request.first_sample + play.sample + turn * _TURN_SAMPLES,
            expected_tokens=request.expected_tokens if turn == 0 else None,
        )

    async def _take(self, play: _Play, turn: Completion) -> bool:
        """Add a sampled turn, and the environment's answer to it; return False once the episode has ended."""
        done, record, budget = play.completion, play.record, self._budget
        start = len(done.token_ids)
        _add_turn(done, turn)
        record.turns.append((start, len(done.token_ids)))
        record.rewards.append(None)
        done.stop_reason = turn.stop_reason
        if turn.stop_reason is StopReason.LENGTH:
            record.messages.append({"role": "assistant", "content": turn.text})
            try:
                await self._called(play.environment.cut, turn.text)
            except Exception as error:
                record.error = _reason(f"turn {len(record.turns)}", error)
            return False
        try:
            text = turn.text
            if turn.stop_reason is StopReason.STOP:  # a stop string may end a tool call, and be part of it
                text = decode_text(self._dialogue.tokenizer, turn.token_ids, self._dialogue.ends)
            message = play.environment.message(text)
            record.messages.append(message)
            reply: Reply = await self._called(play.environment.step, text)
            record.rewards[-1] = reply.reward
            record.num_calls += reply.calls
            record.num_failed_calls += reply.failed_calls
            if reply.done or not reply.messages:
                return False
            ended = turn.token_ids[-1] if turn.stop_reason is StopReason.EOS else None
            answer = self._dialogue.reply(message, reply.messages, play.schemas, stop=ended)
        except Exception as error:
            record.error = _reason(f"turn {len(record.turns)}", error)
            return False
        room = play.request.params.max_new_tokens
        if budget.positions is not None:
            room = min(room, budget.positions - len(play.opening))
        is_late = budget.seconds is not None and time.monotonic() - play.started > budget.seconds
        is_last = budget.turns is not None and len(record.turns) >= budget.turns
        if is_late or is_last or len(done.token_ids) + len(answer) >= room:
            done.stop_reason = StopReason.BUDGET
            return False
        _insert(done, len(done.token_ids), answer)
        record.messages += [dict(said) for said in reply.messages]
        return True

    async def _end(self, play: _Play) -> Completion:
        done, record, tokenizer = play.completion, play.record, self._dialogue.tokenizer
        if record.error is None:
            try:
                record.reward = await self._called(play.environment.reward)
            except Exception as error:
                record.error = _reason("reward", error)
        if not done.token_ids:  # the environment failed before the first turn: an empty turn without a loss
            _insert(done, 0, [self._dialogue.ends[0]])
            done.stop_reason = StopReason.EOS
        assert done.loss_mask is not None
        if len(record.turns) == 1 and all(done.loss_mask):
            done.loss_mask = None
        done.text = decode_text(tokenizer, done.token_ids, self._dialogue.ends)
        return done

    def end(self, groups: Sequence[Group]) -> None:
        """Close the environments of completions that have been scored, so that others can use them."""
        records = [c.episode for group in groups for c in group.completions if c.episode is not None]
        opened = [record.environment for record in records if record.environment is not None]
        asyncio.run_coroutine_threadsafe(self._close(opened), shared_loop("episodes")).result()
        for record in records:
            record.environment = None

    async def _close(self, environments: Sequence[Environment]) -> None:
        async def close(environment: Environment) -> None:
            try:
                await self._called(environment.close)
            except Exception as error:
                logger.warning("%s.close() failed: %s", type(environment).__name__, error)

        await asyncio.gather(*map(close, environments))

    async def _called(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a method of an environment: a plain one in a thread, where it cannot hold up the other episodes."""
        try:
            async with asyncio.timeout(self._budget.step_seconds):
                return await called(function, *args)
        except asyncio.CancelledError:
            raise
        except TimeoutError as error:
            limit = self._budget.step_seconds
            raise error if limit is None else TimeoutError(f"it took longer than {limit:g} s") from error
        except BaseException as error:  # sys.exit() would end the event loop
            raise contained(error) from error


class OverlappingEpisodeEngine(EpisodeEngine, OverlappingEngine):
    """Episodes over an engine that samples by itself, such as a server: every turn begins as soon as it can."""

    engine: OverlappingEngine

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        """Play the episodes of each request, in order."""
        begun = self.start(requests, seed=seed, step=step)
        try:
            return [future.result() for future in begun]
        finally:
            self.cancel(begun)

    def start(self, requests: Sequence[Request], *, seed: int, step: int) -> list[Future[list[Completion]]]:
        """Begin the episodes of each request; a sync in between changes the weights of later tokens."""

        def ask(request: Request) -> Future[list[Completion]]:
            return self.engine.start([request], seed=seed, step=step)[0]

        return [self._begin(request, ask, lambda: None, seed, step) for request in requests]

    def cancel(self, begun: Sequence[Future[list[Completion]]]) -> None:
        """Give up episodes, and the turns that are being sampled for them."""
        for future in begun:
            future.cancel()

    def _give_up(self, asked: Future[list[Completion]]) -> None:
        self.engine.cancel([asked])


def episode_engine(
    engine: Engine,
    dialogue: Dialogue,
    make_environment: Callable[[Mapping[str, Any]], Environment],
    budget: Budget,
) -> EpisodeEngine:
    """Return the engine that plays episodes over another one."""
    kind = OverlappingEpisodeEngine if isinstance(engine, OverlappingEngine) else EpisodeEngine
    return kind(engine, dialogue, make_environment, budget)


class _Turns:
    """Turns that wait to be sampled, asked for by coroutines and taken together by the thread that samples.

    Args:
        num_episodes: episodes that play.
    """

    def __init__(self, num_episodes: int) -> None:
        self._playing = num_episodes
        self._waiting: list[tuple[Request, Future[list[Completion]]]] = []
        self._changed = threading.Condition()

    def ask(self, request: Request) -> Future[list[Completion]]:
        """Ask for a turn of `num_samples` episodes."""
        future: Future[list[Completion]] = Future()
        with self._changed:
            self._waiting.append((request, future))
            self._changed.notify()
        return future

    def finish(self) -> None:
        """Note that an episode has ended."""
        with self._changed:
            self._playing -= 1
            self._changed.notify()

    def give_up_if_failed(self, episodes: Future[list[Completion]]) -> None:
        """Stop waiting once the episodes of a request have raised an error, which their future holds."""
        if episodes.cancelled() or episodes.exception() is not None:
            with self._changed:
                self._playing, self._waiting = 0, []
                self._changed.notify()

    def next(self) -> list[tuple[Request, Future[list[Completion]]]]:
        """Wait for turns to sample together; empty once all episodes have ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._playing)
            # Not for episodes whose tools take long.
            self._changed.wait_for(self._is_full, timeout=_PATIENCE_SECONDS)
            batch, self._waiting = self._waiting, []
            # Episodes of a group side by side: an engine may compute once what their contexts begin with.
            return sorted(batch, key=lambda entry: (entry[0].index, entry[0].first_sample))

    def _is_full(self) -> bool:
        return sum(request.num_samples for request, _ in self._waiting) >= self._playing


def share_openings(shards: Sequence[Shard], gathered: Callable[[list[Any]], list[Any]]) -> None:
    """Make what the openings of a group's episodes have in common its prompt, as one that is in the data set.

    Where openings differ, the rest of each stands before its first turn, outside the loss.

    Args:
        shards: this rank's completions; called on every rank.
        gathered: concatenates the lists of all ranks.
    """
    found = [(s.position, c.episode) for s in shards for c in s.group.completions]
    own = [(position, episode.opening) for position, episode in found if episode is not None]
    openings: dict[int, list[list[int]]] = {}
    for position, opening in gathered([entry for entry in own if entry[1] is not None]):
        openings.setdefault(position, []).append(opening)
    for shard in shards:
        if shard.position not in openings:
            continue
        columns = zip(*openings[shard.position], strict=False)
        shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        shard.group.prompt_ids = shared
        for completion in shard.group.completions:
            episode = completion.episode
            if episode is not None and episode.opening is not None and len(episode.opening) > len(shared):
                rest = episode.opening[len(shared) :]
                _insert(completion, 0, rest)
                episode.turns = [(start + len(rest), end + len(rest)) for start, end in episode.turns]


def _add_turn(done: Completion, turn: Completion) -> None:
    """Append the tokens of a sampled turn, with all that the engine has said of them."""
    assert done.loss_mask is not None
    done.token_ids += turn.token_ids
    done.loss_mask += [True] * len(turn.token_ids)
    done.sampler_logprobs = _joined(done.sampler_logprobs, turn.sampler_logprobs)
    done.policy_logprobs = _joined(done.policy_logprobs, turn.policy_logprobs)
    for name, values in turn.token.items():
        done.token[name] = done.token.get(name, []) + values


def _joined(before: list[float] | None, after: list[float] | None) -> list[float] | None:
    return None if before is None or after is None else before + after


def _insert(done: Completion, place: int, tokens: Sequence[int]) -> None:
    """Insert tokens that were not sampled: they are outside the loss, and their streams are those of a neighbour."""
    mask = done.loss_mask or [True] * len(done.token_ids)
    streams = [values for values in (done.sampler_logprobs, done.policy_logprobs) if values is not None]
    for values in streams:
        values[place:place] = [0.0] * len(tokens)
    for values in done.token.values():
        values[place:place] = [values[max(place - 1, 0)]] * len(tokens)
    done.token_ids[place:place] = tokens
    done.loss_mask = [*mask[:place], *([False] * len(tokens)), *mask[place:]]


def _reason(place: str, error: Exception) -> str:
    return f"{place}: {type(error).__name__}: {error}"
