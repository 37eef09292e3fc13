"""A quantised copy of a checkpoint, made tensor by tensor."""

from latentkv.quantize.convert import REPORT_FILE, quantize_checkpoint
from latentkv.quantize.report import QuantizationReport, ReportRow

__all__ = ["REPORT_FILE", "QuantizationReport", "ReportRow", "quantize_checkpoint"]
