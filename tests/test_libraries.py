"""What libraries raise about files becomes one sentence, a panic of Rust too, and Ctrl-C passes."""

from __future__ import annotations

import pytest
import tokenizers

from latentkv.errors import RequestError, TokenizerError
from latentkv.libraries import errors_as


class PanicException(BaseException):
    """As pyo3 names what a panic becomes; that class cannot be imported."""


@pytest.mark.parametrize("reason", [PanicException("index out\nof bounds"), ValueError("index out of bounds")])
def test_an_exception_and_a_panic_are_one_sentence(reason: BaseException):
    said = r"^It cannot be read \(index out of bounds\): fetch the file again\.$"
    with pytest.raises(TokenizerError, match=said), errors_as(TokenizerError, "It cannot be read"):
        raise reason


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), SystemExit(1), RequestError("too long")])
def test_what_is_no_fault_of_the_file_passes(reason: BaseException):
    with pytest.raises(type(reason)), errors_as(TokenizerError, "It cannot be read"):
        raise reason


def test_what_the_library_of_tokenizers_raises_is_caught():
    with pytest.raises(TokenizerError, match="It cannot be read"), errors_as(TokenizerError, "It cannot be read"):
        tokenizers.Tokenizer.from_str('{"version": "2"}')
