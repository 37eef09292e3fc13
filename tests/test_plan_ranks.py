"""Plans of models in several processes: bytes are those that ranks really have, speeds those of the bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import run_here as run
from engine_models import BAILING, GLM5, GQA, HY4, KIMI, MTP, SPARSE
from latentkv.errors import ConfigError, RequestError
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import match_decoder
from latentkv.models.parameters import count_mtp_parameters, layer_weight_bytes, weight_bytes
from latentkv.models.shard import Shard
from latentkv.models.stage import Stage
from latentkv.models.stored_config import open_checkpoint
from latentkv.plan import BUILT_IN, load_config
from latentkv.plan.ranks import Network, best_plans, plan_ranks
from latentkv.state import PagedCache
from stored_models import write_model

TEN_GIGABIT = Network.parse("10Gb:50us")


EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}


def planned(config: Any, ranks: int, **changes: Any) -> Any:
    given = {
        "rank_memory": 1 << 40,
        "weights_dtype": "int4",
        "context": 4096,
        "network": TEN_GIGABIT,
        "memory_bandwidth": 100e9,
    }
    return plan_ranks(config, ranks, **(given | changes))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_layers_and_what_is_beside_them_are_the_whole(name: str, dtype: str):
    config = replace(load_config(name), num_mtp_layers=0)
    layers, beside = layer_weight_bytes(config, dtype)
    assert len(layers) == config.num_layers and sum(layers) + beside == weight_bytes(config, dtype)


def test_modules_of_multi_token_prediction_are_the_first_ranks():
    config = load_config("deepseek-v3")
    with_mtp, without = (layer_weight_bytes(each, "fp32")[1] for each in (config, replace(config, num_mtp_layers=0)))
    # The correction bias of its router is no parameter.
    assert with_mtp - without == 4 * (count_mtp_parameters(config) + 256)


@pytest.mark.parametrize("config", [MTP, GQA, SPARSE, HY4, BAILING, GLM5], ids=lambda config: config["model_type"])
def test_a_ranks_bytes_are_those_of_its_tensors_and_of_its_cache(config: dict[str, Any]):
    model = read_config({**config, "indexer_types": None} if config is HY4 else config)
    plan = planned(model, 2, weights_dtype="fp32", context=128, kv_dtype="fp32")
    whole = Decoder(model)
    for row in plan.ranks:
        decoder = Decoder(model)
        decoder.keep_stage(Stage(row.first_layer, row.last_layer + 1, model.num_layers))
        assert row.weights_bytes == sum(tensor.nbytes for tensor in decoder.state_dict().values())
        specs = decoder.stage.own(model.specs("fp32"))
        cache = PagedCache(specs, 2, num_slots=1, model_specs=model.specs("fp32"))
        assert row.cache_bytes == cache.allocated_bytes
    twice = whole.model.norm.weight.nbytes
    if whole.model.hc_head is not None:
        twice += sum(tensor.nbytes for tensor in whole.model.hc_head.state_dict().values())
    assert sum(row.weights_bytes for row in plan.ranks) == twice + sum(
        tensor.nbytes for tensor in whole.state_dict().values()
    )


@pytest.mark.parametrize("config", [MTP, GQA, SPARSE, HY4, KIMI], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("team_size", [2, 4])
def test_bytes_of_shards_are_those_of_their_tensors_and_of_what_their_caches_take_together(
    config: dict[str, Any], team_size: int
):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "linear_num_heads": 4, "vocab_size": 256}
    model = read_config({**config, **heads, **({"indexer_types": None} if config is HY4 else {})})
    plan = planned(model, 4, weights_dtype="fp32", context=128, kv_dtype="fp32", team_size=team_size, ranks_per_box=4)
    for row in plan.ranks:
        shard = Shard(row.rank % team_size, team_size)
        with torch.device("meta"):
            decoder = Decoder(model)
        decoder.keep_stage(Stage(row.first_layer, row.last_layer + 1, model.num_layers).sharded(shard))
        assert row.weights_bytes == sum(tensor.nbytes for tensor in decoder.state_dict().values())
        specs = decoder.stage.own(shard.config(model).specs("fp32"))
        cache = PagedCache(specs, 2, num_slots=1, model_specs=model.specs("fp32"))
        common = sum(2 * spec.common_page_bytes(cache.page_size) for spec in specs)
        assert row.cache_bytes == cache.allocated_bytes - common + common // team_size


@pytest.mark.parametrize(
    ("model", "batch", "shared", "stages"),
    [
        ("deepseek-v2-lite", 1, 153, 92),
        ("deepseek-v2-lite", 32, 549, 549),
        ("glm-4.7-flash", 1, 91, 55),
        ("glm-4.7-flash", 32, 313, 333),
        ("deepseek-v3", 1, 12.7, 6.6),
        ("deepseek-v3", 32, 38, 32),
    ],
)
def test_two_sockets_that_share_layers_out_are_as_fast_as_their_bytes(
    model: str, batch: int, shared: float, stages: float
):
    """Figures of an independent calculation, in which attention is halved and nothing is rounded to whole units."""
    given = {"memory_bandwidth": 150e9, "ranks_per_box": 2, "batches": (batch,)}
    speeds = [planned(load_config(model), 2, team_size=size, **given).speeds[0].pipeline for size in (2, 1)]
    assert speeds == [pytest.approx(shared, rel=0.1), pytest.approx(stages, rel=0.1)]


def test_the_best_cut_comes_first():
    given = {
        "rank_memory": 1 << 40,
        "weights_dtype": "int4",
        "context": 4096,
        "network": TEN_GIGABIT,
        "memory_bandwidth": 150e9,
    }
    two_sockets = best_plans(load_config("deepseek-v3"), 2, ranks_per_box=2, batches=(1,), **given)
    assert [plan.team_size for plan in two_sockets] == [2, 1]
    assert [plan.team_size for plan in best_plans(load_config("deepseek-v3"), 2, batches=(1,), **given)] == [1]
    # Of so many ranks that layers would not be enough for stages, shards remain.
    assert [plan.team_size for plan in best_plans(read_config(MTP | EIGHT), 4, ranks_per_box=4, **given)] == [4]


def test_a_rank_reads_its_own_tensors_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_model(tmp_path / "m", {**MTP, "num_hidden_layers": 5})
    config, reader = open_checkpoint(folder)
    read: list[int] = []
    kind, original = type(reader), type(reader).read

    def noted(self: Any, name: str, *arguments: Any, **named: Any) -> Any:
        read.append(self.nbytes(name))
        return original(self, name, *arguments, **named)

    monkeypatch.setattr(kind, "read", noted)
    from latentkv.models.loading import load_model

    for row in planned(config, 2, weights_dtype="fp32").ranks:
        read.clear()
        load_model(folder, stage=Stage(row.first_layer, row.last_layer + 1, 5))
        assert sum(read) == row.weights_bytes
    assert match_decoder(config, reader, dtype=None, max_context=None, stage=Stage(2, 5, 5))[0].stage.first == 2


@pytest.mark.parametrize(
    ("model", "ranks", "batch", "one", "together"),
    [
        ("deepseek-v3", 4, 1, 4.4, 4.4),
        ("deepseek-v3", 4, 32, 14, 36),
        ("deepseek-v3", 8, 1, 4.4, 4.4),
        ("kimi-k2", 8, 1, 5.1, 5.1),
        ("kimi-k2", 8, 32, 12, 62),
        ("deepseek-v3", 16, 32, 14, None),  # 96 if 61 layers could be shared out evenly
        ("glm-4.7-flash", 2, 1, 36, 36),
        ("glm-4.7-flash", 8, 32, 151, None),
    ],
)
def test_speeds_are_those_of_the_bytes(model: str, ranks: int, batch: int, one: float, together: float | None):
    """Figures of an independent calculation, which rounds to two digits or three and sends float32."""
    speed = planned(load_config(model), ranks, batches=(batch,)).speeds[0]
    assert speed.one_rank == pytest.approx(one, rel=0.05)
    if together is not None:
        assert speed.pipeline == pytest.approx(together, rel=0.05)


def test_one_rank_is_one_process():
    speed = planned(load_config("deepseek-v2-lite"), 1, batches=(8,)).speeds[0]
    assert speed.pipeline == pytest.approx(speed.one_rank) and speed.network_ms == 0


def test_ranks_of_one_machine_need_no_network():
    config = load_config("deepseek-v2-lite")
    apart, together, mixed = (planned(config, 4, ranks_per_box=count).speeds[0].network_ms for count in (1, 4, 2))
    assert together == 0 and mixed == pytest.approx(apart / 2)


@pytest.mark.parametrize(
    ("text", "rate", "hop"), [("10Gb", 1.1e9, 60e-6), ("2.5gbps:35us", 0.275e9, 35e-6), ("1 Gb : 9 us", None, None)]
)
def test_networks_are_read(text: str, rate: float | None, hop: float | None):
    if rate is None:
        with pytest.raises(RequestError, match="is no network"):
            Network.parse(text)
    else:
        network = Network.parse(text)
        assert (network.bytes_per_second, network.hop_seconds) == (pytest.approx(rate), pytest.approx(hop))


def test_the_command_prints_what_each_rank_has_and_what_to_type():
    arguments = ("plan", "deepseek-v3", "--ranks", "4", "--weights-dtype", "int4", "--memory", "128GiB")
    result = run(*arguments, "--context", "4k", "--memory-bandwidth", "100GB")
    assert result.exit_code == 0, result.output
    assert "0-15, embedding, head" in result.output and "81.77 GiB" in result.output
    assert "torchrun --nnodes 4 --nproc-per-node 1" in result.output
    assert "--pipeline-parallel 4" in result.output
    told = run(*arguments, "--ranks-per-box", "4", "--memory-bandwidth", "100GB", "--json")
    assert json.loads(told.stdout)["ranks"]["ranks"][0]["first_layer"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--ranks", "2"], "name it"),
        (["plan", "deepseek-v3", "--ranks", "2", "--network", "fast", "--memory-bandwidth", "1GB"], "is no network"),
        (["plan", "deepseek-v3", "--measure"], "--measure is for --ranks"),
        (["plan", "deepseek-v2-lite", "--ranks", "99", "--memory-bandwidth", "1GB"], "27 stages at most, not 99"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], said: str):
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.output


def test_more_ranks_than_layers_are_refused():
    with pytest.raises(ConfigError, match="at most"):
        planned(load_config("deepseek-v2-lite"), 28)
