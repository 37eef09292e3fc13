"""Questions in both forms, and what counts as an answer."""

from __future__ import annotations

import random

import pytest

from latentkv.evaluate.questions import Example, Question, is_answer, with_shots

SUM, OTHER = Question("What is 1 + 2?", "1 + 2 =", "3"), Question("What is 4 + 5?", "4 + 5 =", "9")


def test_plain_text_ends_where_the_answer_begins():
    assert Example(SUM, (OTHER,), "Sums.").as_text() == "Sums.\n\n4 + 5 = 9\n\n1 + 2 ="
    assert Example(SUM).as_text() == "1 + 2 ="


def test_a_conversation_ends_with_the_question_and_begins_with_the_context():
    assert Example(SUM, (OTHER,), "Sums.").as_messages() == [
        {"role": "user", "content": "Sums.\n\nWhat is 4 + 5?"},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "What is 1 + 2?"},
    ]
    assert Example(SUM).as_messages() == [{"role": "user", "content": "What is 1 + 2?"}]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" 3", "3", True),
        ("3.\nThe next", "3", True),
        ("**3**", "3", True),
        (" 33", "3", False),
        ("It is 3", "3", False),
        ("", "3", False),
        (" the  old\nhouse. Then", "the old house", True),
        ("the old", "the old house", False),
        ("The old house", "the old house", False),
        ("“Whale!” he said", "whale", False),
        ("“whale!” he said", "whale", True),
    ],
)
def test_an_answer_is_right_if_its_words_are_but_for_punctuation_around_them(text: str, answer: str, right: bool):
    assert is_answer(text, answer) is right


def test_no_question_stands_among_its_own_shots_and_none_is_asked_twice():
    questions = [Question(str(i), f"{i}:", str(i)) for i in range(4)]
    examples = with_shots(questions, samples=10, shots=3, rng=random.Random(0))
    assert sorted(example.question.answer for example in examples) == ["0", "1", "2", "3"]
    for example in examples:
        assert len({example.question, *example.shots}) == 4
