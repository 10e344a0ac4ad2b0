"""The Engine protocol, implemented by anything that samples completions, and its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from burnish.errors import ConfigError
from burnish.types import Completion

__all__ = ["Engine", "EngineOver", "OverlappingEngine", "Request", "SamplingParams", "eos_token_ids"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Args:
        max_new_tokens: most tokens of one completion, at least 1.
        temperature: logits are divided by it; 0 means greedy.
        top_p: keep the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: logits of tokens in the prompt or the completion so far are divided by it, or multiplied
            where negative, before temperature (1909.05858); 1 for none.
        stop: strings that end a completion once its text contains one.
        eos_token_ids: tokens that end a completion.

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, ok, fix in (
            ("max_new_tokens", self.max_new_tokens >= 1, "use an integer of at least 1"),
            ("temperature", self.temperature >= 0, "use 0 (greedy) or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "use a number in (0, 1]; 1 keeps every token"),
            ("top_k", self.top_k >= 0, "use 0 (keep all) or a positive integer"),
            ("repetition_penalty", self.repetition_penalty > 0, "use a positive number; 1 for none"),
            ("min_p", 0 <= self.min_p <= 1, "use a number in [0, 1]; 0 keeps every token"),
        ):
            if not ok:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: {fix}.")


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for `num_samples` completions of one prompt.

    Args:
        prompt_ids: at least one token.
        num_samples: G.
        params: how to sample.
        index: the prompt's identity in its source: with (seed, step, sample) it keys the random numbers.
        first_sample: number of the first sample, where the group's earlier ones are sampled elsewhere (another rank).
        is_settled: tells of the text of a completion so far that no continuation changes its reward; the engine may
            then stop it, with `StopReason.SETTLED`. None never stops one.
        row: the data set's columns of this prompt, for engines that play episodes (`burnish.environments`).
        expected_tokens: expected length of a completion, by which an engine may order its work; None if unknown.
        on_done: called with the completions once all of them have finished, at the latest before `generate` returns: at
            most once, in the caller's thread or one of the engine's. It must return quickly; what it raises is raised
            by `generate`. Engines that leave it out lose time, nothing else.
    """

    prompt_ids: Sequence[int]
    num_samples: int
    params: SamplingParams
    index: int = 0
    first_sample: int = 0
    is_settled: Callable[[str], bool] | None = None
    expected_tokens: float | None = None
    row: Mapping[str, Any] = field(default_factory=dict[str, Any])
    on_done: Callable[[list[Completion]], None] | None = None


class Engine(Protocol):
    """A sampler of completions: in-process, a vLLM server, a colocated vLLM.

    An engine that heeds `Request.is_settled` says so by an attribute `stops_settled = True`; `stop_settled` is an error
    with any other.
    """

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        """Sample completions for each request, in order; randomness depends on (seed, step, index, sample) only.

        Each has at least one token and at most `max_new_tokens`, a `StopReason`, and log-probabilities for every token
        or None in all completions; `burnish.rollout.validation` checks this.
        """
        ...

    def sync(self, version: int) -> Mapping[str, float] | None:
        """Sample from the trainer's current weights from now on; return metrics of the transfer, if there is one."""
        ...

    def sleep(self) -> None:
        """Free what only sampling needs until the next `sync` or `generate`; engines without it may leave it out."""

    def close(self) -> None:
        """Free all resources."""
        ...


@runtime_checkable
class OverlappingEngine(Engine, Protocol):
    """An engine that samples while its caller does something else, as servers do."""

    def start(self, requests: Sequence[Request], *, seed: int, step: int) -> Sequence[Future[list[Completion]]]:
        """Begin what `generate` does; return the completions of each request once they are sampled.

        A `sync` in between changes the weights of the tokens sampled after it. The stream `policy_version` of a
        completion holds the version of the weights of each token.
        """
        ...

    def cancel(self, begun: Sequence[Future[list[Completion]]]) -> None:
        """Give up what `start` has begun."""
        ...


class EngineOver(Engine):
    """An engine that samples through another one, to which it leaves all but `generate`."""

    engine: Engine

    def sync(self, version: int) -> Mapping[str, float] | None:
        """Sample from the trainer's current weights from now on."""
        return self.engine.sync(version)

    def sleep(self) -> None:
        """Free what only sampling needs, where the other engine can."""
        if (sleep := getattr(self.engine, "sleep", None)) is not None:
            sleep()

    def close(self) -> None:
        """Close the other engine."""
        self.engine.close()


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the sorted end-of-sequence tokens of the generation config and the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None}))
