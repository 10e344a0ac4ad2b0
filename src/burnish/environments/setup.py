"""The environments of a run: made by row, described in prompts, certified with the chat template."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from burnish.data.chat import resolve_chat_template
from burnish.data.formats import Message
from burnish.environments.conventions import ToolCall
from burnish.environments.dialogue import Dialogue, certify
from burnish.environments.environment import Environment
from burnish.environments.episodes import Budget, EpisodeEngine, episode_engine
from burnish.environments.formats import describes_tools, tool_format
from burnish.environments.tool_use import ToolEnvironment, public_methods
from burnish.environments.tools import Toolbox
from burnish.errors import ConfigError, DataError
from burnish.rollout.engine import Engine
from burnish.types import Episode

__all__ = ["Environments", "Factory"]

logger = logging.getLogger(__name__)

Factory = Callable[[], Any]
"""Makes an `Environment`, or an object of TRL's protocol: `reset(**row)`, public methods that are tools, and
`get_reward()` where it owns the reward."""

_EMPTY_PROMPT: list[Message] = [{"role": "user", "content": ""}]


class Environments:
    """Makes the environments of a run, and wraps its engine.

    Args:
        tokenizer: with the chat template of the run.
        ends: tokens that end a turn.
        tools: typed functions that every prompt offers.
        factory: makes environments; a dictionary of several is chosen from by the column `environment`.
        chat_template_kwargs: variables of the template.
        choice: key of `TOOL_FORMATS`; None to find it in the template.
        tool_seconds: time limit of a tool call.
        budget: limits of an episode.

    Raises:
        ConfigError: a tool without types, an environment without `reset` or without anything to do, or a template whose
            turns cannot be extended.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[int],
        *,
        tools: Sequence[Callable[..., Any]] = (),
        factory: Factory | Mapping[str, Factory] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        choice: str | None = None,
        tool_seconds: float = 30.0,
        budget: Budget | None = None,
    ) -> None:
        self._tools, self._tool_seconds, self._budget = list(tools), tool_seconds, budget or Budget()
        self.is_mixed = isinstance(factory, Mapping)
        self._factories: dict[str | None, Factory | None] = (
            {**factory} if isinstance(factory, Mapping) else {None: factory}
        )
        self._idle: dict[str | None, list[Environment]] = defaultdict(list)
        self._lock = threading.Lock()
        template = resolve_chat_template(None, tokenizer)
        self.tool_format = tool_format(tokenizer, template, choice)
        probes = {name: self.make({"environment": name}) for name in self._factories}
        self.schemas = {name: list(probe.schemas()) for name, probe in probes.items()}
        self.names = {name: probe.name for name, probe in probes.items()}
        self.rewarding = list(dict.fromkeys(probe.name for probe in probes.values() if _owns_reward(probe)))
        """Names of the environments that give a reward of their own."""
        for probe in probes.values():
            if isinstance(probe, ToolEnvironment):
                probe.close()  # the first episode takes it
        offered = [schema for schemas in self.schemas.values() for schema in schemas]
        is_described = not offered or describes_tools(tokenizer, template, offered)
        if not is_described:
            logger.warning("the chat template does not describe tools: a system message does.")
        self.dialogue = Dialogue(tokenizer, ends=ends, kwargs=chat_template_kwargs, describes_tools=is_described)
        self._certify(offered)

    def _certify(self, schemas: Sequence[dict[str, Any]]) -> None:
        """Prove that turns extend one another; say once what differs from the template's own rendering."""
        call = ToolCall(schemas[0]["function"]["name"], {"x": 1}, id="burnish01") if schemas else None
        text = "5" if call is None else self.tool_format.render([call])
        self.certificate = certificate = certify(self.dialogue, self.tool_format.message, text, schemas)
        logger.info("chat template: %s", certificate)
        if not certificate.extends:
            logger.warning(
                "the chat template renders earlier turns differently from how they are sampled: a server that renders "
                "a conversation anew shows the model other tokens than in training, and must keep the sampled ones."
            )
        elif not certificate.keeps_reasoning:
            logger.warning(
                "the chat template drops the reasoning of earlier turns; episodes keep what was sampled, so a server "
                "must keep it too."
            )

    def make(self, row: Mapping[str, Any]) -> Environment:
        """Return an environment for a row, a used one where there is one."""
        name = row.get("environment") if self.is_mixed else None
        if name not in self._factories:
            names = ", ".join(map(repr, self._factories))
            raise DataError(f"environment = {name!r} is none of those in environment_factory: use one of {names}.")
        with self._lock:
            if self._idle[name]:
                return self._idle[name].pop()
        factory = self._factories[name]
        made = None if factory is None else factory()
        if isinstance(made, Environment):
            made.tool_format = self.tool_format
            return made
        if made is not None and not callable(getattr(made, "reset", None)):
            raise ConfigError(
                f"environment_factory makes a {type(made).__name__} without reset(): derive it from "
                "burnish.environments.Environment, or give it reset() and methods that are tools."
            )

        def recycle(environment: Environment) -> None:
            with self._lock:
                self._idle[name].append(environment)

        tools = self._tools + ([] if made is None else public_methods(made))
        toolbox = Toolbox(tools, timeout_seconds=self._tool_seconds)
        hidden = frozenset({"environment"} if self.is_mixed else ())
        return ToolEnvironment(toolbox, self.tool_format, subject=made, hides=hidden, recycle=recycle)

    def prepared(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row whose prompt offers the tools.

        Raises:
            DataError: its prompt is not a conversation, or it names no environment.
        """
        prompt: Any = row.get("prompt", _EMPTY_PROMPT)
        if not isinstance(prompt, list):
            raise DataError("episodes of several turns need conversational prompts: make prompt a list of messages.")
        name = row.get("environment") if self.is_mixed else None
        if name not in self.schemas:
            names = ", ".join(map(repr, self.schemas))
            raise DataError(f"the column environment holds {name!r}: use one of {names}.")
        messages, tools = self.dialogue.offering(cast("list[Message]", prompt), self.schemas[name])
        prepared: dict[str, Any] = {**row, "prompt": messages}
        return prepared if tools is None else {**prepared, "tools": [*(row.get("tools") or ()), *tools]}

    def engine(self, engine: Engine, ends: Sequence[int], positions: int | None) -> EpisodeEngine:
        """Return the engine that plays episodes over another one."""
        self.dialogue.stop_at(ends)
        return episode_engine(engine, self.dialogue, self.make, dataclasses.replace(self._budget, positions=positions))

    def rewards(self, episodes: Sequence[Episode | None], **columns: Any) -> list[float | None]:
        """Return the environments' own rewards: a criterion."""
        return [None if episode is None else episode.reward for episode in episodes]


def _owns_reward(environment: Environment) -> bool:
    if isinstance(environment, ToolEnvironment):
        return hasattr(environment.exposed, "get_reward")
    return type(environment).reward is not Environment.reward
