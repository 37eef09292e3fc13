import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from latentkv.text.tools.json_text import MAX_DEPTH, JsonReader, is_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(text: str) -> tuple[JsonReader, int, str]:
    """Feeds a text character by character."""
    reader, out, at = JsonReader(), "", 0
    for end in range(1, len(text) + 1):
        at, written = reader.feed(text[:end], at)
        out += written
    reader.finish()
    return reader, at, out


def python_reads(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_every_json_value_comes_out_as_it_went_in(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    reader, at, out = read(text)
    assert (reader.done, at, out) == (True, len(text), text)
    assert is_json(text)


@given(st.text(alphabet='{}[]",:\\u0019.-+eEtrufalsn ', max_size=12).map(str.strip))
def test_what_is_json_is_what_python_reads(text: str) -> None:
    assert is_json(text) == python_reads(text)


@given(VALUES, st.data())
def test_it_stops_behind_the_value(value: Any, data: st.DataObject) -> None:
    text = json.dumps({"a": value})
    rest = data.draw(st.sampled_from(["", "}", " ", "x", ",1"]))
    reader = JsonReader()
    assert reader.feed(text + rest, 0) == (len(text), text)
    assert reader.done


def test_it_breaks_at_the_first_character_that_cannot_be_json() -> None:
    for text, at in (('{"a": nul}', 9), ("[1,]", 3), ("{a", 1), ("01", 1), ('"\\x', 2), ("[-]", 2), ('{"a" 1', 5)):
        reader = JsonReader()
        end, out = reader.feed(text, 0)
        if text == "01":  # a whole value, and something behind it
            assert (reader.done, end) == (True, at)
        else:
            assert (reader.broken, end, out) == (True, at, text[:at])


def test_control_characters_in_strings_are_escaped() -> None:
    reader = JsonReader()
    _, out = reader.feed('{"a": "x\n\t\x01"}', 0)
    assert reader.done
    assert json.loads(out) == {"a": "x\n\t\x01"}


def test_depth_is_bounded() -> None:
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
