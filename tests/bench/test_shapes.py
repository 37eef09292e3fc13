import pytest
from torch.utils.flop_counter import FlopCounterMode

from latentkv.bench.layer.contenders import MHA_MATMUL, latentkv_entry, mha_entries
from latentkv.bench.ops.decode_case import DecodeCase
from latentkv.bench.shapes import SHAPES, AttentionShape
from latentkv.kernels import use_backend
from latentkv.models.config import MLAConfig

# H=2, L=4, Dn=3, R=2, Dv=2 on a residual stream of 5.
SMALL = AttentionShape(5, 2, MLAConfig(4, 3, 2, 2))


def test_flops_of_a_small_layer_are_those_counted_by_hand():
    # q: 5 x 2*(3+2) = 50; kv_a: 5 x (4+2) = 30; o: 2*2 x 5 = 20 weights, two FLOPs each.
    projections = 2 * (50 + 30 + 20)
    # W_UK and W_UV of 2 heads: 2 * 4 * (3 + 2) = 40 weights.
    up = 2 * 40
    # A cached token, 2 heads: latents 2*(2*4 + 2) each; expanded 2*(3 + 2 + 2) each.
    assert SMALL.step_flops("absorbed", 7) == projections + up + 7 * 2 * 2 * 10
    assert SMALL.step_flops("re-expanded", 7) == projections + 7 * up + 7 * 2 * 2 * 7
    assert SMALL.step_flops("expanded cache", 7) == projections + up + 7 * 2 * 2 * 7


def test_flops_of_a_query_bottleneck_count_both_of_its_products():
    with_bottleneck = AttentionShape(5, 2, MLAConfig(4, 3, 2, 2, q_lora_rank=3))
    # 5 x 3 + 3 x 10 = 45 weights instead of 50.
    assert SMALL.step_flops("absorbed", 7) - with_bottleneck.step_flops("absorbed", 7) == 2 * (50 - 45)


def test_torch_counts_the_same_flops_in_what_is_run():
    case = DecodeCase.random(AttentionShape(64, 4, MLAConfig(32, 16, 8, 16)), 70)
    with use_backend("torch"):  # whose products can be counted
        runs = {"absorbed": latentkv_entry(case, "bf16"), "expanded cache": mha_entries(case)[MHA_MATMUL]}
        for form, entry in runs.items():
            with FlopCounterMode(display=False) as counter:
                entry.step()
            assert counter.get_total_flops() == case.shape.step_flops(form, 70), form


@pytest.mark.parametrize(
    ("name", "pair_flops", "cache_bytes", "mha_bytes"),
    [("v2-lite", 2176 * 16, 1152, 10240), ("v3", 2176 * 128, 1152, 81920)],
)
def test_published_shapes_cost_what_their_papers_say(name: str, pair_flops: int, cache_bytes: int, mha_bytes: int):
    shape = SHAPES[name]
    assert shape.step_flops("absorbed", 1001) - shape.step_flops("absorbed", 1000) == pair_flops
    plan = shape.plan(8192, "bf16")
    assert {row.attention: row.bytes_per_token for row in plan.cache}.items() >= {
        "MLA": cache_bytes,
        "MHA": mha_bytes,
    }.items()
