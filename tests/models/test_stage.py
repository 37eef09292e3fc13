"""Where a model may be cut, and that its stages one after another give the bits of the whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine_models import CONFIGS, GLM5, HY4, LONGCAT, SPARSE, VOCAB, cache_for, tiny_decoder
from latentkv.errors import ConfigError
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.stage import Stage, Weighed, cut, cuts_of
from latentkv.state import PagedCache

KINDS = ("mla", "gqa", "mtp", "sparse", "bailing mtp", "kimi", "glm5", "ling25 mtp")


def config_of(layers: int, **changes: object) -> ModelConfig:
    return read_config({**CONFIGS["mla"], "num_hidden_layers": layers, **changes})


def stages_of(decoder: Decoder, cache: PagedCache, at: int) -> list[tuple[Decoder, PagedCache]]:
    """The decoder's layers before and from `at` on, each with a cache of its own."""
    found: list[tuple[Decoder, PagedCache]] = []
    for first, last in ((0, at), (at, decoder.config.num_layers)):
        stage = Stage(first, last, decoder.config.num_layers)
        part = Decoder(decoder.config).eval().requires_grad_(False)
        part.load_state_dict(decoder.state_dict())
        part.keep_stage(stage)
        own = PagedCache(
            stage.own(cache.specs),
            cache.num_pages,
            page_size=cache.page_size,
            num_slots=max(cache.num_slots, 1),
            model_specs=cache.specs,
        )
        found.append((part, own))
    return found


@torch.inference_mode()
def read(stages: list[tuple[Decoder, PagedCache]], batch: Batch) -> Tensor:
    x, _ = stages[0][0].inputs(batch)
    for decoder, cache in stages:
        x = decoder.run_layers(x, decoder.rotary(batch.positions), batch, cache)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_stages_give_the_bits_of_the_whole(kind: str):
    decoder = tiny_decoder(kind)
    cache = cache_for(decoder, 8)
    stages = stages_of(decoder, cache, at=1)
    assert sum(each.allocated_bytes for _, each in stages) == cache.allocated_bytes
    assert [each.num_slots for _, each in stages] == [cache.num_slots] * 2
    tokens = torch.randint(3, VOCAB, (2, 30)).tolist()
    for start, end in ((0, 21), (21, 22), (22, 29)):
        uses = [SlotUse(slot, 0, end - start) for slot in (1, 4)] if cache.num_slots else None
        batch = Batch.build(
            [each[start:end] for each in tokens],
            [start, start],
            [[1, 5, 2, 7], [0, 3, 6, 4]],
            page_size=cache.page_size,
            slots=uses,
        )
        with torch.inference_mode():
            whole = decoder(batch, cache)
        assert torch.equal(read(stages, batch), whole)


@pytest.mark.parametrize(
    ("config", "cuts"),
    [
        (config_of(5), (1, 2, 3, 4)),
        (read_config({**LONGCAT, "num_layers": 2}), (2,)),  # a shortcut leads over the others
        (read_config({**HY4, "num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]}), (2,)),
        (read_config(SPARSE), (1,)),
        (read_config(GLM5), (1,)),
    ],
)
def test_a_model_is_cut_only_where_nothing_but_the_residual_stream_leads_on(config: ModelConfig, cuts: tuple[int, ...]):
    assert cuts_of(config) == cuts


@pytest.mark.parametrize(
    ("sizes", "beside", "memories", "firsts"),
    [
        ([10] * 6, 0, [1, 1], [0, 3]),
        ([10] * 6, 20, [1, 1], [0, 2]),  # the embedding and the head weigh as two layers
        ([10] * 6, 0, [100, 50], [0, 4]),  # twice the memory, twice the layers
        ([10] * 6, 0, [100, 97], [0, 3]),  # memories that are nearly alike count as alike
        ([40, 10, 10, 10, 10, 10], 0, [1, 1, 1], [0, 1, 3]),
        ([10] * 6, 0, [1], [0]),
    ],
)
def test_stages_fill_memories_evenly(sizes: list[int], beside: int, memories: list[int], firsts: list[int]):
    stages = cut(config_of(6), Weighed(sizes, beside), memories)
    assert [stage.first for stage in stages] == firsts
    assert stages[-1].last == 6 and all(a.last == b.first for a, b in pairwise(stages))


def test_a_cut_is_the_best_of_all():
    sizes, beside, memories = [7, 1, 9, 2, 2, 8, 3], 5, [100, 60, 80]
    found = cut(config_of(7), Weighed(sizes, beside), memories)

    def fullest(bounds: tuple[int, ...]) -> float:
        held = [sum(sizes[a:b]) for a, b in pairwise(bounds)]
        held[0] += beside
        return max(size / memory for size, memory in zip(held, memories, strict=True))

    every = [fullest((0, a, b, 7)) for a in range(1, 6) for b in range(a + 1, 7)]
    assert fullest((*(stage.first for stage in found), 7)) == min(every)


@pytest.mark.parametrize(
    ("memories", "firsts"),
    [
        ([100, 100], [0, 2]),  # two slow layers take as long as four others
        ([100, 30], [0, 4]),  # four layers do not fit into the second one
        ([30, 100], [0, 2]),
        ([20, 20], [0, 3]),  # nothing fits: as even as can be
    ],
)
def test_the_slowest_stage_is_as_fast_as_fits(memories: list[int], firsts: list[int]):
    size, time = Weighed([10] * 6), Weighed([4, 4, 2, 2, 2, 2])
    assert [stage.first for stage in cut(config_of(6), size, memories, time)] == firsts


def test_more_ranks_than_stages_are_refused():
    with pytest.raises(ConfigError, match="2 stages at most, not 3"):
        cut(config_of(2), Weighed([1, 1]), [1, 1, 1])


def test_a_stage_takes_its_part_of_what_layers_have_and_the_first_what_comes_after_them():
    assert Stage(0, 2, 4).own("abcdm") == ("a", "b", "m")
    assert Stage(2, 4, 4).own("abcdm") == ("c", "d")
    assert str(Stage(2, 4, 4)) == "layers 2-3"


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_has_its_own_tensors_under_their_names(tied: bool):
    decoder = Decoder(replace(config_of(4, num_nextn_predict_layers=1), tie_word_embeddings=tied))
    whole = dict(decoder.state_dict())
    held: list[str] = []
    for first, last in ((0, 1), (1, 3), (3, 4)):
        part = Decoder(decoder.config)
        part.keep_stage(Stage(first, last, 4))
        assert {name.split(".")[0] + "." for name in part.state_dict()} <= {"model.", "lm_head.", "mtp."}
        assert all(part.state_dict()[name].shape == whole[name].shape for name in part.state_dict())
        named = {f"{name}.{leaf}" for name, module in part.parts() for leaf in module.state_dict()}
        assert named == set(part.state_dict())
        held += part.state_dict()
    assert sorted(set(held)) == sorted(whole)
    assert {name for name in held if held.count(name) > 1} == {"model.norm.weight"}
