"""The same decoder under several attentions, trained alike and measured on the same text."""

from typing import TYPE_CHECKING

from latentkv.compare.options import CompareOptions
from latentkv.compare.sizes import Sizes
from latentkv.lazy import lazily

if TYPE_CHECKING:
    from latentkv.compare.experiment import PLOT_FILE, REPORT_FILE, TABLE_FILE, compare_attention
    from latentkv.compare.report import Report

__all__ = ["PLOT_FILE", "REPORT_FILE", "TABLE_FILE", "CompareOptions", "Report", "Sizes", "compare_attention"]

__getattr__ = lazily(
    __name__, experiment=("PLOT_FILE", "REPORT_FILE", "TABLE_FILE", "compare_attention"), report=("Report",)
)
