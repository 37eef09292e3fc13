"""How good a model is: what it expects of a text, and what it answers where the answer is known, beside another one."""

from typing import TYPE_CHECKING

from latentkv.evaluate.options import EvaluateOptions
from latentkv.lazy import lazily

if TYPE_CHECKING:
    from latentkv.evaluate.folder import PAGE_FILE, REPORT_FILE, EvaluationFolder
    from latentkv.evaluate.passages import Text
    from latentkv.evaluate.report import Report
    from latentkv.evaluate.run import Evaluated, evaluate_model

__all__ = [
    "PAGE_FILE",
    "REPORT_FILE",
    "EvaluateOptions",
    "Evaluated",
    "EvaluationFolder",
    "Report",
    "Text",
    "evaluate_model",
]

__getattr__ = lazily(
    __name__,
    folder=("PAGE_FILE", "REPORT_FILE", "EvaluationFolder"),
    passages=("Text",),
    report=("Report",),
    run=("Evaluated", "evaluate_model"),
)
