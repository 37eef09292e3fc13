"""Strings to token ids and back: below this package nobody sees a string."""

from latentkv.text.loading import has_tokenizer, load_tokenizer
from latentkv.text.stop import StopMatcher
from latentkv.text.stream import StreamDecoder
from latentkv.text.tokenizer import Tokenizer, require_match

__all__ = ["StopMatcher", "StreamDecoder", "Tokenizer", "has_tokenizer", "load_tokenizer", "require_match"]
