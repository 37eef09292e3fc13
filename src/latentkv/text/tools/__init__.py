"""Tool calls and reasoning: what a chat request may ask for, and how a model's text becomes an assistant's message."""

from latentkv.text.tools.deltas import (
    AssistantMessage,
    Content,
    Delta,
    Reasoning,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    join_deltas,
)
from latentkv.text.tools.formats import CALL_FORMATS, OutputFormat, choose_format, reasoning_is_open
from latentkv.text.tools.grammar import call_grammar, json_after_reasoning
from latentkv.text.tools.parser import OutputParser
from latentkv.text.tools.specs import Tool, ToolChoice, read_tool_choice, read_tools

__all__ = [
    "CALL_FORMATS",
    "AssistantMessage",
    "Content",
    "Delta",
    "OutputFormat",
    "OutputParser",
    "Reasoning",
    "Tool",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallStart",
    "ToolChoice",
    "call_grammar",
    "choose_format",
    "join_deltas",
    "json_after_reasoning",
    "read_tool_choice",
    "read_tools",
    "reasoning_is_open",
]
