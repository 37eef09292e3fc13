"""What is asked: the same for the same seed, of the text, and as long and as deep as it should be."""

from __future__ import annotations

from functools import partial

import pytest

from latentkv.errors import RequestError
from latentkv.evaluate.passages import Text
from latentkv.evaluate.questions import Example
from latentkv.evaluate.tasks.arithmetic import arithmetic_examples
from latentkv.evaluate.tasks.cloze import cloze_examples
from latentkv.evaluate.tasks.copying import copy_examples
from latentkv.evaluate.tasks.lookup import lookup_examples

ANIMALS = ("cat", "dog", "bird", "whale", "horse", "mouse")
PARAGRAPHS = [
    f"The {animal} went to the\nriver number {i}, where it saw the {other} and drank. Then it came home by the long "
    f"way, over the hill and past the mill, and told nobody at all about what it had seen of the {other}!"
    for i, (animal, other) in enumerate((a, b) for a in ANIMALS for b in ANIMALS if a != b)
]
TEXT = Text(("animals.txt",), ("\n\n".join(PARAGRAPHS),))


def words(example: Example) -> int:
    return len(example.as_text().split())


lookup = partial(lookup_examples, TEXT, size=words)
GIVEN = {"samples": 6, "shots": 2, "seed": 1}
MAKE = {
    "copy": lambda **given: copy_examples(TEXT, **given),
    "arithmetic": arithmetic_examples,
    "cloze": lambda **given: cloze_examples(TEXT, **given),
    "lookup": lambda samples, **given: [
        example for i in range(samples) for example in lookup(length=200, depths=(50,), number=i, **given)
    ],
}


@pytest.mark.parametrize("task", MAKE)
def test_the_same_seed_asks_the_same_and_another_one_something_else(task: str):
    first = MAKE[task](**GIVEN)
    assert first == MAKE[task](**GIVEN)
    assert first != MAKE[task](**GIVEN | {"seed": 2})
    assert len(first) == 6
    assert all(len(example.shots) == 2 for example in first)
    assert len({example.question for example in first}) == 6


def test_a_seed_means_the_same_questions_in_every_version_of_python():
    (example,) = arithmetic_examples(samples=1, shots=0, seed=0)
    assert (example.question.opening, example.question.answer) == ("54 + 28 =", "82")


def test_sums_are_right():
    for example in arithmetic_examples(samples=50, shots=3, seed=0):
        for each in (example.question, *example.shots):
            first, plus, second, equals = each.opening.split()
            assert (plus, equals, int(each.answer)) == ("+", "=", int(first) + int(second))


def test_a_copy_is_of_a_whole_sentence_in_one_line():
    for example in copy_examples(TEXT, **GIVEN):
        assert example.question.answer in TEXT.sentences
        assert example.question.answer in example.question.opening
        assert "\n" not in example.question.answer


def test_a_cloze_is_a_paragraph_without_its_last_word():
    whole = [" ".join(paragraph.split()) for paragraph in PARAGRAPHS]
    for example in cloze_examples(TEXT, **GIVEN):
        assert f"{example.question.opening} {example.question.answer}!" in whole


@pytest.mark.parametrize("depth", [0, 30, 100])
def test_the_line_that_is_looked_up_is_hidden_at_its_depth_and_asked_for_at_the_end(depth: int):
    for number in range(3):
        (example,) = lookup(length=300, depths=(depth,), number=number, shots=2, seed=1)
        line = f"{example.question.opening} {example.question.answer}."
        before, found, after = example.context.partition(line)
        assert found
        place = len(before.split()) / len((before + after).split())
        assert place == pytest.approx(depth / 100, abs=0.12)  # of sentences of 15 and 22 words, in which others hide
        assert example.as_text().endswith(f"\n\n{example.question.opening}")
        for shot in example.shots:
            assert f"{shot.opening} {shot.answer}." in example.context


def test_a_prompt_is_as_long_as_asked_up_to_one_sentence():
    for example in lookup(length=300, depths=(100, 50, 0), number=0, shots=2, seed=1):
        assert 300 - 25 < words(example) <= 300


def test_prompts_of_all_depths_differ_by_where_the_line_is_only():
    shallow, deep = lookup(length=300, depths=(0, 100), number=0, shots=2, seed=1)
    assert (shallow.question, shallow.shots) == (deep.question, deep.shots)
    line = f"{deep.question.opening} {deep.question.answer}."
    assert shallow.context.replace(line, "").split() == deep.context.replace(line, "").split()


def test_a_text_or_a_length_that_is_too_short_is_refused_in_a_sentence():
    short = Text(("short.txt",), ("A word or two.",))
    with pytest.raises(
        RequestError, match=r"0 sentences of 12 to 30 words: copy needs 3 and more, so name a longer one"
    ):
        copy_examples(short, **GIVEN)
    with pytest.raises(RequestError, match=r"0 paragraphs of 30 words that end with a word: cloze needs 3 and more"):
        cloze_examples(short, **GIVEN)
    with pytest.raises(RequestError, match=r"--lengths 20 is too short for a question of lookup with 2 shots"):
        lookup(length=20, depths=(50,), number=0, shots=2, seed=1)


def test_a_text_that_is_short_gives_as_many_questions_as_it_has():
    few = Text(("few.txt",), ("\n\n".join(PARAGRAPHS[:4]),))
    assert len(cloze_examples(few, samples=10, shots=1, seed=0)) == 4


def test_sentences_are_cut_where_they_end_and_nothing_is_lost():
    text = Text(("talk.txt",), ('"Who is\nthere?" he said. "I am." Nobody came, e.g. the cat.\n\n\nThe end',))
    assert text.sentences == ['"Who is there?" he said.', '"I am."', "Nobody came, e.g. the cat.", "The end"]
    assert text.paragraphs == ['"Who is there?" he said. "I am." Nobody came, e.g. the cat.', "The end"]
