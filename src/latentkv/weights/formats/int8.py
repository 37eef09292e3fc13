"""int8: weights as integers of 8 bits. -128 is read, but never chosen."""

from latentkv.weights.formats.code_format import CodeFormat

INT8 = CodeFormat("int8", kernel=1, bits=8, lowest=-128)
