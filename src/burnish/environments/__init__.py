"""Agents: tools, environments of several turns, and the engine that plays their episodes."""

from burnish.environments.environment import Environment, Reply
from burnish.environments.formats import TOOL_FORMATS, ToolCall, ToolFormat, describes_tools, system_text, tool_format
from burnish.environments.tools import Tool, Toolbox, ToolResult

__all__ = [
    "TOOL_FORMATS",
    "Environment",
    "Reply",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "ToolResult",
    "Toolbox",
    "describes_tools",
    "system_text",
    "tool_format",
]
