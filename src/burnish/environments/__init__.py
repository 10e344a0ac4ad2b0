"""Agents: tools, environments of several turns, and the engine that plays their episodes."""

from burnish.environments.dialogue import Certificate, Dialogue, certify
from burnish.environments.environment import Environment, Reply
from burnish.environments.episodes import Budget, EpisodeEngine, episode_engine, share_openings
from burnish.environments.formats import TOOL_FORMATS, ToolCall, ToolFormat, describes_tools, system_text, tool_format
from burnish.environments.rollout_function import RolloutFunctionEngine
from burnish.environments.setup import Environments, Factory
from burnish.environments.tool_use import ToolEnvironment
from burnish.environments.tools import Tool, Toolbox, ToolResult

__all__ = [
    "TOOL_FORMATS",
    "Budget",
    "Certificate",
    "Dialogue",
    "Environment",
    "Environments",
    "EpisodeEngine",
    "Factory",
    "Reply",
    "RolloutFunctionEngine",
    "Tool",
    "ToolCall",
    "ToolEnvironment",
    "ToolFormat",
    "ToolResult",
    "Toolbox",
    "certify",
    "describes_tools",
    "episode_engine",
    "share_openings",
    "system_text",
    "tool_format",
]
