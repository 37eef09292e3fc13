"""JSON as it is being written: every character is checked as it comes, none is read twice."""

import re

MAX_DEPTH = 64  # of objects and lists within each other
_SPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
# A number's states: what each kind of character leads to.
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero", "9": "whole"},
    "zero": {".": "point", "e": "exponent"},
    "whole": {"0": "whole", "9": "whole", ".": "point", "e": "exponent"},
    "point": {"0": "fraction", "9": "fraction"},
    "fraction": {"0": "fraction", "9": "fraction", "e": "exponent"},
    "exponent": {"+": "sign", "-": "sign", "0": "power", "9": "power"},
    "sign": {"0": "power", "9": "power"},
    "power": {"0": "power", "9": "power"},
}
_WHOLE_NUMBERS = ("zero", "whole", "fraction", "power")
_NUMBER_STARTS = {"-": "minus", "0": "zero", "9": "whole"}


class JsonReader:
    """Follows one JSON value that comes in pieces, without recursion, at most `MAX_DEPTH` deep.

    Control characters within strings, which JSON forbids and models write, come out escaped; all else comes out as it
    came in. What has come out is always the beginning of a JSON text.

    Attributes:
        done: the value is complete.
        broken: what followed cannot be JSON; nothing more is read.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []  # "{" and "["
        self._expected = "value"  # or "first value", "key", "first key", "colon", "next", "end"
        self._in = ""  # "string", "escape", "literal" or "number"
        self._is_key = False
        self._number = ""
        self._due = ""  # rest of a literal, or a "0" for each hexadecimal digit of an escape

    def feed(self, text: str, start: int) -> tuple[int, str]:
        """Reads on from `start`.

        Returns:
            Where it stopped (the end of the text, of the value, or where it broke), and what is to be written.
        """
        out: list[str] = []
        at = start
        while at < len(text) and not (self.done or self.broken):
            if self._in == "string":
                run = _PLAIN.match(text, at)
                if run and run.end() > at:
                    out.append(run.group())
                    at = run.end()
                    continue
            written = self._character(text[at])
            if written:
                out.append(written)
                at += 1
        return at, "".join(out)

    def finish(self) -> None:
        """The text has ended, which ends a number."""
        if self._in == "number" and self._number in _WHOLE_NUMBERS:
            self._end_value()

    def _character(self, character: str) -> str:
        """What one character is written as; nothing if it was not taken, and then the state has changed."""
        match self._in:
            case "string":
                return self._in_string(character)
            case "escape":
                return self._in_escape(character)
            case "literal":
                if character != self._due[0]:
                    return self._break()
                self._due = self._due[1:]
                if not self._due:
                    self._end_value()
                return character
            case "number":
                after = _NUMBER[self._number].get(_kind(character))
                if after is not None:
                    self._number = after
                    return character
                if self._number not in _WHOLE_NUMBERS:
                    return self._break()
                self._end_value()
                return ""
            case _:
                return character if character in _SPACE else self._between(character)

    def _in_string(self, character: str) -> str:
        if character == "\\":
            self._in = "escape"
        elif character == '"':
            self._in = ""
            if self._is_key:
                self._expected = "colon"
            else:
                self._end_value()
        elif character < " ":
            return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character, f"\\u{ord(character):04x}")
        return character

    def _in_escape(self, character: str) -> str:
        if self._due:
            if character not in "0123456789abcdefABCDEF":
                return self._break()
            self._due = self._due[1:]
        elif character == "u":
            self._due = "0000"
        elif character not in '"\\/bfnrt':
            return self._break()
        if not self._due:
            self._in = "string"
        return character

    def _between(self, character: str) -> str:
        expected = self._expected
        if character == '"' and expected != "next" and expected != "colon":
            self._in, self._is_key = "string", expected in ("key", "first key")
        elif expected == "colon" and character == ":":
            self._expected = "value"
        elif expected == "next" and character == ",":
            self._expected = "key" if self._open[-1] == "{" else "value"
        elif (expected in ("next", "first key") and character == "}" and self._open[-1] == "{") or (
            expected in ("next", "first value") and character == "]" and self._open[-1] == "["
        ):
            self._open.pop()
            self._end_value()
        elif expected in ("value", "first value"):
            return self._begin(character)
        else:
            return self._break()
        return character

    def _begin(self, character: str) -> str:
        if character in "{[":
            if len(self._open) == MAX_DEPTH:
                return self._break()
            self._open.append(character)
            self._expected = "first key" if character == "{" else "first value"
        elif character in _LITERALS:
            self._in, self._due = "literal", _LITERALS[character]
        elif (number := _NUMBER_STARTS.get(_kind(character))) is not None:
            self._in, self._number = "number", number
        else:
            return self._break()
        return character

    def _end_value(self) -> None:
        self._in = ""
        self._expected = "next"
        self.done = not self._open

    def _break(self) -> str:
        self.broken = True
        return ""


def is_json(text: str) -> bool:
    """Whether a text is one JSON value, nothing around it."""
    reader = JsonReader()
    end, _ = reader.feed(text, 0)
    reader.finish()
    return reader.done and end == len(text)


def _kind(character: str) -> str:
    """Characters that mean the same in a number: "9" for 1 to 9, "e" for both cases."""
    if "1" <= character <= "9":
        return "9"
    return "e" if character == "E" else character
