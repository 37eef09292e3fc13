"""`bench sparse` counts what a step needs, and times no wrong choice."""

from typing import Any

import pytest
import torch

from latentkv import ops
from latentkv.bench.ceilings import CeilingProbe
from latentkv.bench.layer import sparse as module
from latentkv.bench.layer.sparse import CHOICE, CHOSEN, DENSE, SPARSE, SparseReport, measure_sparse
from latentkv.errors import OpError, RequestError
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config

PROBE = CeilingProbe(gemm_size=16, buffer_mib=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FROM_MEMORY", 8000)


def config(**changes: object) -> ModelConfig:
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16}
    index = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 3}
    return read_config(
        {"model_type": "deepseek_v32", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        | sizes
        | index
        | changes
    )


def measured(contexts: list[int], **changes: Any) -> SparseReport:
    return measure_sparse(config(), contexts=contexts, repeats=2, probe=PROBE, **changes)


def test_a_step_is_counted_by_what_it_multiplies_and_reads() -> None:
    row = {row.contender: row for row in measured([100]).rows}
    # Multiply-adds of the weights of q_a, q_b, kv_a, kv_b and o; of an absorbed pair; of wq_b, wk and weights_proj.
    dense = 16 * 32 + 32 * 16 + 40 * 32 + 32 * 32 + 32 * 16
    pair, index, score = 2 * (2 * 32 + 8), 48 * 16 + 16 * 32 + 3 * 32, 3 * 16 * 100
    products = {DENSE: dense + pair * 100, SPARSE: dense + index + pair * 8 + score, CHOICE: score, CHOSEN: pair * 8}
    read = {DENSE: 2 * dense + 80 * 100, SPARSE: 2 * (dense + index) + 80 * 8 + 32 * 100, CHOICE: 3200, CHOSEN: 640}
    for name, own in row.items():
        assert own.gflops == pytest.approx(2 * products[name] / own.ms / 1e6)
        assert own.gbps == pytest.approx(read[name] / own.ms / 1e6)
        assert own.of_dense_time == pytest.approx(row[DENSE].ms / own.ms)


def test_a_wrong_choice_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(*args: Any, topk: int) -> torch.Tensor:
        return args[3][:, :1] * args[2].shape[1] + torch.arange(topk, dtype=torch.int32)

    monkeypatch.setattr(ops, "select_slots", first)
    with pytest.raises(OpError, match="other tokens"):
        measured([100])


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"contexts": []}, "longer than the 8"),
        ({"contexts": [8]}, "longer than the 8"),
        ({"config": read_config({"model_type": "llama"}), "contexts": [100]}, "reads every token"),
        ({"config": read_config({"model_type": "glm5_next"}), "contexts": [9000]}, "pools of tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        measure_sparse(asked.pop("config", config()), **asked, probe=PROBE)
