from latentkv.text.tools.source import Source

MARKERS = ("<tool_call>", "<|end|>")


def test_text_is_taken_up_to_a_marker_or_what_may_become_one() -> None:
    source = Source()
    source.push("a <tool")
    assert source.take_until(MARKERS) == ("a ", None)
    source.push("s> <tool_call><|e")
    assert source.take_until(MARKERS) == ("<tools> ", "<tool_call>")
    assert source.take(11) == "<tool_call>"
    assert source.take_until(MARKERS) == ("", None)
    assert source.taken() == "a <tools> <tool_call>"
    source.ended = True
    assert source.take_until(MARKERS) == ("<|e", None)
    assert source.exhausted


def test_no_more_is_taken_than_asked_for() -> None:
    source = Source()
    source.push("abcdef<|end|>")
    assert source.take_until(MARKERS, most=4) == ("abcd", None)
    assert source.take_until(MARKERS, most=4) == ("ef", "<|end|>")


def test_text_that_was_taken_is_not_kept_with_what_comes() -> None:
    source = Source()
    for _ in range(100):
        source.push("some text <")
        source.take_until(MARKERS)
        source.forget()
        text, at = source.peek()
        assert len(text) - at == 1
        assert len(text) <= len("<some text <")
    assert source.taken() == ""
