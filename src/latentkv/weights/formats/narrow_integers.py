"""Integers of other widths, which files of others hold: read and kept, never chosen."""

from latentkv.weights.formats.code_format import CodeFormat

UINT2 = CodeFormat("uint2", kernel=4, bits=2, lowest=0, has_minima=True)
UINT4 = CodeFormat("uint4", kernel=5, bits=4, lowest=0, has_minima=True)
UINT5 = CodeFormat("uint5", kernel=6, bits=5, lowest=0, has_minima=True)
INT5 = CodeFormat("int5", kernel=7, bits=5, lowest=-16)
INT6 = CodeFormat("int6", kernel=8, bits=6, lowest=-32)
