"""A quantised copy of a checkpoint, made tensor by tensor: a folder, or a GGUF file (`quantize.gguf`)."""

from latentkv.quantize.convert import REPORT_FILE, quantize_checkpoint, require_target
from latentkv.quantize.importance import Importance, column_importance
from latentkv.quantize.report import QuantizationReport, ReportRow

__all__ = [
    "REPORT_FILE",
    "Importance",
    "QuantizationReport",
    "ReportRow",
    "column_importance",
    "quantize_checkpoint",
    "require_target",
]
