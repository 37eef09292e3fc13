"""The formats that weights are kept in, each in a file of its own; whoever needs a list of them takes it from here.

A new one is a file here, a decoder in `csrc/linear_tile.h`, and a row in the tables of tests.
"""

from collections.abc import Mapping

from latentkv.weights.formats.code_format import CodeFormat
from latentkv.weights.formats.fp8 import FP8
from latentkv.weights.formats.int4 import INT4
from latentkv.weights.formats.int8 import INT8
from latentkv.weights.formats.narrow_integers import INT5, INT6, UINT2, UINT4, UINT5
from latentkv.weights.formats.tables import FP4, NL4

BF16, COMPACT = "bf16", "compact"
"""What is not quantised: bfloat16 as it is, and in 12 bits (`weights/compact.py`)."""

CODE_FORMATS: Mapping[str, CodeFormat] = {
    form.name: form for form in (INT8, INT4, FP8, INT6, INT5, UINT5, UINT4, UINT2, FP4, NL4)
}
"""What weights are kept in as codes with scales, by name."""

ROUNDED_TO: Mapping[str, CodeFormat] = {form.name: form for form in (INT8, INT4)}
"""Those that weights are rounded to where somebody asks for it."""

INTEGER_PRODUCTS = CODE_FORMATS.keys() - {FP8.name}
"""Those whose codes stand for integers, so that activations of 8 bits are multiplied by them exactly."""

KERNEL_NUMBERS: Mapping[str, int] = {
    BF16: 0,
    COMPACT: 3,
    **{form.name: form.kernel for form in CODE_FORMATS.values()},
}
"""How `csrc/linear.h` numbers the formats."""


def of_integers(bits: int, *, minima: bool) -> CodeFormat:
    """The format of plain integers of so many bits, beside minima or not."""
    return next(
        form for form in CODE_FORMATS.values() if (form.bits, form.has_minima, form.levels) == (bits, minima, None)
    )


__all__ = [
    "BF16",
    "CODE_FORMATS",
    "COMPACT",
    "FP4",
    "FP8",
    "INT4",
    "INT5",
    "INT6",
    "INT8",
    "INTEGER_PRODUCTS",
    "KERNEL_NUMBERS",
    "NL4",
    "ROUNDED_TO",
    "UINT2",
    "UINT4",
    "UINT5",
    "CodeFormat",
    "of_integers",
]
