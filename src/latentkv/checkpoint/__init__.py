"""Safetensors <-> parameters: where weights come from, what they are called, how they are quantised."""

from latentkv.checkpoint.filling import Match, match_parameters
from latentkv.checkpoint.names import export_names
from latentkv.checkpoint.reader import CheckpointReader
from latentkv.checkpoint.source import resolve_model
from latentkv.checkpoint.writer import write_checkpoint

__all__ = ["CheckpointReader", "Match", "export_names", "match_parameters", "resolve_model", "write_checkpoint"]
