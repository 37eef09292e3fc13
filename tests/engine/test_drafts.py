import pytest
import torch

from latentkv.engine.drafts import NGramDrafter, Wish
from latentkv.engine.sequence import Sequence


def propose(tokens: list[int], most: int, **options) -> list[int]:
    wish = Wish(Sequence(0, tokens), torch.zeros(1, 1), most, choose=lambda draft, logits: 0)
    return NGramDrafter(**options).propose([wish], 0.0)[0]


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 9, 1, 2, 4, 8, 7, 1, 2], [4, 8, 7]),  # the last place
        ([5, 1, 2, 3, 9, 6, 1, 2, 4, 0, 5, 1, 2], [3, 9, 6]),  # the longest match before it
        ([7, 7, 7], [7]),
        ([1, 2, 3, 4], []),
        ([3, 1, 3], []),  # one token says too little
        ([1], []),
    ],
)
def test_what_followed_the_newest_tokens_is_proposed(tokens: list[int], draft: list[int]) -> None:
    assert propose(tokens, 3) == draft


def test_no_more_than_wanted_and_from_no_further_than_the_window() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 1, 2]
    assert propose(tokens, 2) == [3, 4]
    assert propose(tokens, 0) == []
    assert propose(tokens, 2, window=7) == []
