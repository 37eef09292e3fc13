"""docs/reliability.md, line 22: what a library's native code raises is an error like others."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from latentkv.errors import TokenizerError
from latentkv.libraries import errors_as

# A merge whose result the vocabulary lacks, after which tokenizers panics.
PANICS = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}, "pre_tokenizer": null}'


@pytest.mark.parametrize("text", [PANICS, "{", '{"version": "1.0"}'])
def test_line_22_a_panic_and_a_bare_exception_are_one_sentence(text: str) -> None:
    with pytest.raises(BaseException) as caught, errors_as(TokenizerError, "Cannot read it"):
        Tokenizer.from_str(text)
    assert type(caught.value) is TokenizerError
    assert str(caught.value).startswith("Cannot read it (") and "\n" not in str(caught.value)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_passes(ends: type[BaseException]) -> None:
    with pytest.raises(ends), errors_as(TokenizerError, "Cannot read it"):
        raise ends
