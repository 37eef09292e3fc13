"""What config.json leaves open, the files decide: whether the output head is the embedding, and the dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.loading import load_model
from latentkv.models.stored_config import open_checkpoint, stored_dtype
from latentkv.plan import load_config
from stored_models import GQA, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("untied"), GQA)


def stored(source: Path, folder: Path, *, stated: bool | None, holds: str) -> tuple[Path, torch.Tensor]:
    """A copy whose config states this of tying and whose files hold the embedding, the head, or both; its embedding."""
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    embedding = tensors[EMBEDDING]
    if holds != "both, which differ":
        tensors[HEAD] = embedding.clone()
    if holds == "embedding":
        del tensors[HEAD]
    if holds == "head":
        del tensors[EMBEDDING]
    config.pop("tie_word_embeddings", None)
    if stated is not None:
        config["tie_word_embeddings"] = stated
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, embedding


@pytest.mark.parametrize("holds", ["embedding", "head", "both"])
@pytest.mark.parametrize("stated", [True, None])
def test_a_tied_head_is_found_under_either_name(untied: Path, tmp_path: Path, stated: bool | None, holds: str) -> None:
    folder, embedding = stored(untied, tmp_path, stated=stated, holds=holds)
    decoder = load_model(folder)
    assert torch.equal(decoder.model.embed_tokens.weight, embedding)
    assert decoder.config.tie_word_embeddings == (stated is True or holds != "both")
    assert load_config(str(folder)) == decoder.config == open_checkpoint(folder)[0]


def test_what_differs_is_not_tied_where_the_config_does_not_say(untied: Path, tmp_path: Path) -> None:
    folder, _ = stored(untied, tmp_path, stated=None, holds="both, which differ")
    decoder = load_model(folder)
    assert not decoder.config.tie_word_embeddings
    assert torch.equal(decoder.lm_head.weight, load_file(folder / "model.safetensors")[HEAD])


@pytest.mark.parametrize(("holds", "missing"), [("embedding", HEAD), ("head", EMBEDDING)])
def test_half_of_an_untied_pair_is_refused_with_the_remedy(
    untied: Path, tmp_path: Path, holds: str, missing: str
) -> None:
    folder, _ = stored(untied, tmp_path, stated=False, holds=holds)
    with pytest.raises(CheckpointError, match=rf"lacks {missing} .*set tie_word_embeddings to true"):
        load_model(folder)


def test_levels_of_a_wrapper_that_disagree_leave_it_to_the_files(untied: Path, tmp_path: Path) -> None:
    folder, _ = stored(untied, tmp_path, stated=False, holds="both, which differ")
    text = json.loads((folder / "config.json").read_text())
    outer: dict[str, Any] = {"model_type": "wrapper", "text_config": text, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(outer))
    assert not load_model(folder).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("named", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("half", torch.float16),
        ("auto", torch.float16),  # that of the files
        (None, torch.float16),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_the_named_one_or_that_of_the_files(
    untied: Path, tmp_path: Path, key: str, named: str | None, dtype: torch.dtype
) -> None:
    tensors, config = load_file(untied / "model.safetensors"), json.loads((untied / "config.json").read_text())
    norms = {name: tensor for name, tensor in tensors.items() if "norm" in name}  # a few of another dtype
    save_file({name: t.half() for name, t in tensors.items()} | norms, tmp_path / "model.safetensors")
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps({**config, key: named}))
    assert stored_dtype(open_checkpoint(tmp_path)[0]) == dtype
    assert load_model(tmp_path).dtype == dtype


@pytest.mark.parametrize("named", ["float8_e4m3fn", "float64", "int8"])
def test_a_dtype_that_no_model_runs_in_is_refused_with_the_remedy(untied: Path, tmp_path: Path, named: str) -> None:
    config = json.loads((untied / "config.json").read_text()) | {"dtype": named}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((untied / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=rf"{named}.*--dtype bf16"):
        load_model(tmp_path)
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
