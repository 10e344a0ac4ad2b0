"""What a policy acts on in an online stage: tools, environments, or a function that plays its episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.environments.episodes import Budget
from burnish.environments.rollout_function import RolloutFunctionEngine
from burnish.environments.setup import Environments, Factory
from burnish.errors import ConfigError
from burnish.model.scoring import causal_lm
from burnish.rollout import Engine, SamplingParams
from burnish.training.sampling import known_ends

__all__ = ["Agents", "RolloutFunction"]

RolloutFunction = Callable[[list[Any]], Mapping[str, Sequence[Any]]]


@dataclass(frozen=True, slots=True)
class Agents:
    """A trainer's arguments on episodes of several turns, all None where a completion is a single one.

    Args:
        model: the policy or its name, for the tokens that end a turn.
        tools: typed functions that the policy may call.
        environment_factory: makes the environment of an episode, or several by name.
        rollout_func: returns the completions of a rollout instead of the engine.
    """

    model: Any = None
    tools: Sequence[Callable[..., Any]] | None = None
    environment_factory: Factory | Mapping[str, Factory] | None = None
    rollout_func: RolloutFunction | None = None

    def environments(self, args: Any, tokenizer: Any) -> Environments | None:
        """Make the environments of a run, and certify its chat template.

        Raises:
            ConfigError: something that does not go with episodes, or see `Environments`.
        """
        if not self.tools and self.environment_factory is None:
            return None
        if self.rollout_func is not None:
            raise ConfigError("rollout_func with tools or environment_factory: it plays its episodes itself; drop one.")
        if args.stop_settled:
            raise ConfigError(
                "stop_settled = True with tools or environments: later turns may change the reward; drop it."
            )
        iterations = args.max_tool_calling_iterations
        return Environments(
            tokenizer,
            known_ends(self.model, tokenizer),
            tools=self.tools or (),
            factory=self.environment_factory,
            chat_template_kwargs=args.chat_template_kwargs,
            choice=args.tool_format,
            tool_seconds=args.tool_timeout_seconds,
            budget=Budget(
                turns=None if iterations is None else iterations + 1,
                seconds=args.episode_timeout_seconds,
                # Tools have their own limit, whose end the policy sees.
                step_seconds=args.tool_timeout_seconds + 5.0,
            ),
        )

    def playing(
        self, engine: Engine, environments: Environments | None, model: Any, tokenizer: Any, params: SamplingParams
    ) -> Engine:
        """Return the engine that plays episodes over another one, or asks the user's function, where there are some."""
        if self.rollout_func is not None:
            return RolloutFunctionEngine(engine, self.rollout_func, tokenizer, params)
        if environments is None:
            return engine
        positions = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
        return environments.engine(engine, params.eos_token_ids, positions)
