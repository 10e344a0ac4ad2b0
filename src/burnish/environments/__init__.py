"""Tools of agents, the formats that models call them in, and episodes of several turns."""

from burnish.environments.formats import (
    TOOL_FORMATS,
    ToolCall,
    ToolFormat,
    describes_tools,
    system_text,
    tool_format,
)
from burnish.environments.tools import Tool, Toolbox, ToolResult

__all__ = [
    "TOOL_FORMATS",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "ToolResult",
    "Toolbox",
    "describes_tools",
    "system_text",
    "tool_format",
]
