"""Sparse attention: dense as long as everything is selected, wherever a prompt is cut, and held to transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import CASES, VOCAB, Case, save_checkpoint
from safetensors.torch import load_file, save_file

from latentkv import ops
from latentkv.errors import CacheError, ConfigError
from latentkv.models.batch import Batch
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.forms import Form
from latentkv.models.loading import load_model, save_pretrained
from latentkv.models.packing import Packing
from latentkv.ops import KVFormat
from latentkv.state import IndexSpec, LatentSpec, LayerSpec, PagedCache

IDS = torch.randint(3, VOCAB, (97,), generator=torch.Generator().manual_seed(4)).tolist()
PAGE = 16
TOLERANCE = 1e-4  # of the largest logit, as of every family
SPARSE_CASES = [
    case for case in CASES if case.name in ("v32", "glm-dsa-types", "axk2", "hy4")
]  # test_parity.py has all


@pytest.fixture(scope="module", params=SPARSE_CASES, ids=lambda case: case.name)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint, and transformers' logits [T, V] of IDS."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    model = save_checkpoint(case, folder)
    with torch.inference_mode():
        return folder, model(torch.tensor([IDS])).logits[0]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose keys can be int8."""
    folder = tmp_path_factory.mktemp("glm")
    save_checkpoint(SPARSE_CASES[1], folder)
    return folder


def test_keys_that_cannot_be_int8_are_refused_by_name() -> None:
    config = read_config({"model_type": "deepseek_v32", **SPARSE_CASES[0].config})
    with pytest.raises(CacheError, match=r"keys of 14 numbers .* power of two"):
        config.specs("int8")


def run(decoder: Decoder, lengths: list[int], form: Form | None = None) -> torch.Tensor:
    """Logits of the first tokens of IDS, read through the cache in steps of these lengths."""
    cache = PagedCache(decoder.config.specs("fp32"), 9, page_size=PAGE)
    cache.pool.allocate(2)
    pages, done = cache.pool.allocate(7)[::-1], 0
    logits: list[torch.Tensor] = []
    with torch.inference_mode():
        for length in lengths:
            batch = Batch.build([IDS[done : done + length]], [done], [pages], page_size=PAGE)
            logits.append(decoder.logits(decoder(batch, cache, form=form)))
            done += length
    return torch.cat(logits)


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize(("cut", "form"), [(1, None), (63, "absorbed"), (64, "expanded"), (65, None)])
def test_a_prompt_cut_anywhere_and_32_steps_give_transformers_logits(
    reference: tuple[Path, torch.Tensor], cut: int, form: Form | None
) -> None:
    folder, expected = reference
    logits = run(load_model(folder), [cut, 65 - cut, *[1] * 32] if cut < 65 else [cut, *[1] * 32], form)
    assert error(logits, expected) <= TOLERANCE
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_no_selection_of_these_tests_hangs_on_rounding(
    reference: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps: list[torch.Tensor] = []
    best_tokens = ops.best_tokens

    def measured(scores: torch.Tensor, count: int) -> torch.Tensor:
        best = scores[..., count:, :].topk(count + 1, dim=-1).values  # of rows that see more than they select
        gaps.append((best[..., -2] - best[..., -1]) / scores[scores.isfinite()].abs().max())
        return best_tokens(scores, count)

    monkeypatch.setattr(ops, "best_tokens", measured)
    decoder = load_model(reference[0])
    with torch.inference_mode():
        decoder.forward_train(torch.tensor([IDS]))
    assert len(gaps) == sum(layer.own_indexer is not None for layer in decoder.config.layers)
    assert float(torch.stack(gaps).min()) > 2e-6


def dense(decoder: Decoder) -> Decoder:
    """The same model without its indexers."""
    layers = tuple(replace(layer, indexer=None, shares_selection=False) for layer in decoder.config.layers)
    other = Decoder(replace(decoder.config, layers=layers)).eval()
    other.load_state_dict({name: t for name, t in decoder.state_dict().items() if ".indexer." not in name})
    return other


def changed(folder: Path, to: Path, **changes: object) -> Path:
    """The checkpoint with another config."""
    for file in folder.glob("*.safetensors"):
        (to / file.name).symlink_to(file)
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return to


@pytest.mark.parametrize("form", ["absorbed", "expanded", None])
def test_up_to_topk_tokens_give_the_bits_of_dense_attention(
    reference: tuple[Path, torch.Tensor], tmp_path: Path, form: Form | None
) -> None:
    decoder = load_model(changed(reference[0], tmp_path, index_topk=40))
    lengths = [20, 17, 1, 1, 1]
    assert torch.equal(run(decoder, lengths, form), run(dense(decoder), lengths, form))
    assert not torch.allclose(run(decoder, [*lengths, 1])[40], run(dense(decoder), [*lengths, 1])[40], atol=1e-4)


def test_rows_before_topk_of_a_longer_prompt_are_dense(reference: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    decoder = load_model(changed(reference[0], tmp_path, index_topk=40))
    sparse, whole = run(decoder, [30, 25]), run(dense(decoder), [30, 25])
    torch.testing.assert_close(sparse[:40], whole[:40], atol=1e-5, rtol=1e-5)


def test_the_rotary_pairs_of_the_indexer_are_its_own(reference: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = reference
    indexer = read_config(folder).layers[0].indexer
    assert indexer is not None
    assert indexer.interleaved == (read_config(folder).model_type == "glm_moe_dsa")
    decoder = load_model(changed(folder, tmp_path, indexer_rope_interleave=not indexer.interleaved))
    assert error(run(decoder, [65, 32]), expected) > TOLERANCE


def test_sequences_on_both_sides_of_topk_share_a_step_without_touching_each_other(
    reference: tuple[Path, torch.Tensor],
) -> None:
    decoder = load_model(reference[0])
    cache = PagedCache(decoder.config.specs("fp32"), 16, page_size=PAGE)
    pages = [cache.pool.allocate(4) for _ in range(4)]
    past, new = [2, 30, 0, 50], [1, 12, 11, 1]
    tokens = [IDS[7 * i :] for i in range(4)]

    def read(rows: list[int], starts: list[int], counts: list[int]) -> torch.Tensor:
        parts = [tokens[i][start : start + n] for i, start, n in zip(rows, starts, counts, strict=True)]
        batch = Batch.build(parts, starts, [pages[i] for i in rows], page_size=PAGE)
        return decoder(batch, cache)

    with torch.inference_mode():
        for i in (0, 1, 3):
            read([i], [0], [past[i]])
        together = read([0, 1, 2, 3], past, new)
        alone = [read([i], [past[i]], [new[i]]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kv_format", "stored"), [("bf16", torch.bfloat16), ("int8", torch.int8)])
@pytest.mark.parametrize("past", [2, 60])
def test_tokens_read_together_or_one_by_one_give_the_same_bits(
    kv_format: KVFormat, stored: torch.dtype, past: int, glm: Path
) -> None:
    decoder = load_model(glm, dtype=torch.bfloat16, packing=Packing())
    cache = PagedCache(decoder.config.specs(kv_format), 9, page_size=PAGE)
    assert cache.view(0).index_keys.dtype == stored
    pages = cache.pool.allocate(5)

    def read(begin: int, end: int) -> torch.Tensor:
        batch = Batch.build([IDS[begin:end]], [begin], [pages], page_size=PAGE)
        return decoder(batch, cache, form="absorbed")

    with torch.inference_mode():
        read(0, past)
        together = read(past, past + 6)
        alone = torch.cat([read(t, t + 1) for t in range(past, past + 6)])
    assert torch.equal(together, alone)


def test_a_prompt_of_one_token_more_than_is_read_is_no_decoding_step(
    reference: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_model(reference[0])
    topk = decoder.config.layers[0].indexer.topk
    rows: list[tuple[int, bool]] = []
    attend = ops.mla_attend

    def recorded(*args: torch.Tensor, int8_products: bool, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append((len(args[0]), int8_products))
        return attend(*args, **options)

    monkeypatch.setattr(ops, "mla_attend", recorded)
    for layer in decoder.model.layers:
        layer.self_attn.int8_products = True
    cache = PagedCache(decoder.config.specs("fp32"), 4, page_size=PAGE)
    pages = [[page] for page in cache.pool.allocate(2)]
    with torch.inference_mode():
        decoder(Batch.build([IDS[:topk]], [0], pages[:1], page_size=PAGE), cache, form="expanded")
        step = Batch.build([IDS[topk : topk + 1], IDS[: topk + 1]], [topk, 0], pages, page_size=PAGE)
        decoder(step, cache, form="expanded")  # which selected tokens are not
    assert set(rows) == {(1, True), (1, False)}  # the token that is decoded, and the prompt's last


def test_the_head_weights_stay_what_the_files_hold(reference: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    exact = load_model(reference[0])
    rounded = load_model(reference[0], dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.indexer.weights_proj.weight"
    assert torch.equal(rounded.get_parameter(name), exact.get_parameter(name))
    save_pretrained(exact, tmp_path)
    assert torch.equal(load_model(tmp_path).get_parameter(name), exact.get_parameter(name))


def test_a_module_that_predicts_further_tokens_has_an_indexer_of_its_own_in_files_too(tmp_path: Path) -> None:
    source = json.loads(json.dumps(SPARSE_CASES[0].config)) | {"num_nextn_predict_layers": 1}
    decoder = Decoder(read_config({"model_type": "deepseek_v32", **source}))
    save_pretrained(decoder, tmp_path)
    loaded = load_model(tmp_path)
    name = "mtp.0.layer.self_attn.indexer.wk.weight"
    assert torch.equal(loaded.get_parameter(name), decoder.get_parameter(name))
    assert loaded.config.specs("bf16", mtp=torch.bfloat16)[-1].index == IndexSpec(14, torch.bfloat16)


def sharing(**said: object) -> list[bool]:
    """Which layers of a GLM with this config share a selection."""
    layers = read_config({"model_type": "glm_moe_dsa", "num_hidden_layers": 6} | said).layers
    assert all(layer.indexer is not None for layer in layers)
    return [layer.shares_selection for layer in layers]


def test_which_layers_share_a_selection() -> None:
    # As https://arxiv.org/abs/2603.12201 names them, in the order in which they count.
    full, types = [False] * 6, ["full", "shared", "shared", "full", "full", "shared"]
    assert sharing() == full
    assert sharing(index_topk_freq=3) == [False, False, True, True, False, True]
    assert sharing(index_topk_freq=2, index_skip_topk_offset=3) == [False, False, False, True, False, True]
    assert sharing(index_topk_freq=3, index_topk_pattern="FSSFFS") == [kind == "shared" for kind in types]
    assert sharing(index_topk_pattern="FFFFFF", indexer_types=types) == [kind == "shared" for kind in types]


@pytest.mark.parametrize(
    "said",
    [
        {"indexer_types": ["shared"] + ["full"] * 5},
        {"indexer_types": ["full"] * 5},
        {"index_topk_pattern": "FFXFFF"},
        {"index_topk_pattern": 3},
    ],
)
def test_layers_that_cannot_share_are_refused_by_name(said: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(said))):
        sharing(**said)


def test_layers_that_share_keep_no_keys_and_ignore_the_indexers_that_files_give_them(tmp_path: Path) -> None:
    case = next(case for case in SPARSE_CASES if "indexer_types" in case.config)
    save_checkpoint(case, tmp_path)
    expected = run(load_model(tmp_path), [40])
    specs = read_config(tmp_path).specs("fp32", mtp=torch.float32)
    assert [spec.index is not None for spec in specs] == [True, False, False, True]  # the last is an MTP module's
    tensors = load_file(tmp_path / "model.safetensors")
    given = {name.replace("layers.0", "layers.2"): t for name, t in tensors.items() if "layers.0.self_attn.ind" in name}
    assert len(given) == 5
    save_file(tensors | {name: t.clone() for name, t in given.items()}, tmp_path / "model.safetensors")
    assert torch.equal(run(load_model(tmp_path), [40]), expected)


def test_a_cache_without_index_keys_is_refused(reference: tuple[Path, torch.Tensor]) -> None:
    decoder = load_model(reference[0])
    cache = PagedCache([LayerSpec(LatentSpec(20, 8, "fp32"))] * 3, 4, page_size=PAGE)
    with pytest.raises(CacheError, match="index keys"):
        decoder(Batch.build([IDS[:3]], [0], [cache.pool.allocate(1)], page_size=PAGE), cache)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"index_head_dim": 6}, "index_head_dim"),
        ({"index_topk": 0}, "index_topk"),
    ],
)
def test_an_indexer_that_cannot_be_is_refused_by_name(change: dict[str, object], named: str) -> None:
    config = {"model_type": "deepseek_v32", **SPARSE_CASES[0].config}
    with pytest.raises(ConfigError, match=named):
        read_config(config | change)


def test_a_batch_is_cut_where_sequences_pass_a_length() -> None:
    batch = Batch.build([[1] * 5, [2], [3] * 4], [0, 9, 4], [[0], [1], [2]], page_size=PAGE)
    cut = batch.cut(3)
    assert (cut.query_lens, cut.kv_lens) == ((3, 2, 1, 4), (3, 5, 10, 8))
    assert cut.q_start.tolist() == [0, 3, 5, 6, 10]
    assert cut.block_table.tolist() == [[0], [0], [1], [2]]
    assert batch.cut(20) is batch
