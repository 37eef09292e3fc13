"""Two tiny llamas with one tokenizer, and a text that is long enough to ask about."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentkv import LLM
from latentkv.evaluate import Text
from latentkv.text.bpe_trainer import save_tokenizer, train_bpe
from stored_models import GQA, write_model

WORDS = ("whale", "ship", "mast", "sea", "captain", "harpoon", "night", "storm", "crew", "boat", "deck", "island")
PARAGRAPHS = [
    f"The {WORDS[i % 12]} and the {WORDS[(i * 5 + 1) % 12]} were seen by the {WORDS[(i * 7 + 2) % 12]} that day. "
    f"Nobody on the {WORDS[(i * 3 + 4) % 12]} had spoken of it before the evening came over the water. "
    f"Then the {WORDS[(i + 6) % 12]} was gone, and what was left of it all was only the {WORDS[(i * 11 + 3) % 12]}."
    for i in range(60)
]


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models, `source` and `model`, with the same tokenizer; and `other`, which has another one."""
    found: dict[str, Path] = {}
    for seed, (name, vocab) in enumerate((("source", 320), ("model", 320), ("other", 290))):
        config = {**GQA, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": None}
        found[name] = write_model(tmp_path_factory.mktemp(name) / name, config, seed=seed)
        save_tokenizer(train_bpe(PARAGRAPHS, vocab), found[name])
    return found


@pytest.fixture(scope="package")
def source(folders: dict[str, Path]) -> LLM:
    return LLM(folders["source"], kv_cache_bytes=1 << 20)


@pytest.fixture(scope="package")
def model(folders: dict[str, Path]) -> LLM:
    return LLM(folders["model"], kv_cache_bytes=1 << 20)


@pytest.fixture(scope="package")
def text() -> Text:
    return Text(("ships.txt",), ("\n\n".join(PARAGRAPHS),))
