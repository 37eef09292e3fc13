"""The same decoder under several attentions, trained alike and measured on the same text."""

from latentkv.compare.arms import Sizes
from latentkv.compare.experiment import PLOT_FILE, REPORT_FILE, TABLE_FILE, compare_attention
from latentkv.compare.options import CompareOptions
from latentkv.compare.report import Report

__all__ = ["PLOT_FILE", "REPORT_FILE", "TABLE_FILE", "CompareOptions", "Report", "Sizes", "compare_attention"]
