"""Codes of 4 bits that stand for the 16 numbers of a table."""

from latentkv.weights.formats.code_format import CodeFormat

FP4 = CodeFormat("fp4", kernel=9, bits=4, lowest=0, levels=(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
"""Twice what E2M1 stands for, the elements of MXFP4 and NVFP4 (OCP microscaling formats, section 5.3.3): integers."""

NL4 = CodeFormat(
    "nl4",
    kernel=10,
    bits=4,
    lowest=0,
    levels=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
)
"""The elements of GGUF's IQ4_NL and IQ4_XS: closer together around zero."""
