"""int4: weights as integers of 4 bits, by default in groups of 128."""

from latentkv.weights.formats.code_format import CodeFormat

INT4 = CodeFormat("int4", kernel=2, bits=4, lowest=-8, default_group=128)
