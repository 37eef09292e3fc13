import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentkv import kernels
from latentkv.bench.ceilings import CeilingProbe
from latentkv.bench.models import model as module
from latentkv.bench.models.contenders import OtherProgram, OwnDecoder
from latentkv.bench.models.model import LATENTKV, MHA, TRANSFORMERS, Case, ModelReport, compare_logits, measure_model
from latentkv.bench.models.report import model_facts, model_table, plot_decode
from latentkv.bench.models.step_work import decode_flops, prefill_flops, weight_bytes_read, weight_format
from latentkv.bench.models.variants import mha_config, mha_twin
from latentkv.engine.runner import Runner
from latentkv.errors import RequestError
from latentkv.kernels import current_backend
from latentkv.llm import LLM
from latentkv.models.config import GQAConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained
from latentkv.models.packing import Packing, pack_module, packed_weights
from latentkv.state import PagedCache
from latentkv.weights.formats import INT4, INT8

PROBE = CeilingProbe(gemm_size=16, buffer_mib=1)
CONFIG = {
    "model_type": "deepseek_v2",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
LONGCAT = CONFIG | {
    "model_type": "longcat_flash",
    "num_layers": 1,
    "q_lora_rank": 16,
    "n_shared_experts": 0,
    "zero_expert_num": 4,
}
# Answers as benchmarks/llama_cpp/peer.py does, with the logits of a file and made-up times.
PEER = """
import json, sys
print(json.dumps({"name": "echo", "version": "1", "bytes": 7}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "logits":
        logits = json.loads(open(sys.argv[1]).read())
        print(json.dumps({"logits": logits[str(request["token_ids"])]}), flush=True)
    else:
        print(json.dumps({"seconds": 0.25 if request["op"] == "prefill" else 0.5 * request["tokens"]}), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bench") / "tiny"
    save_pretrained(Decoder(read_config(CONFIG)).bfloat16(), path)
    return path


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM(folder)


def test_every_case_has_a_row_for_each_contender(llm: LLM, tmp_path: Path):
    report = measure_model(
        llm,
        name="tiny",
        prompts=[3, 70],
        depths=[0, 100],
        new_tokens=2,
        repeats=2,
        mha=True,
        transformers=True,
        probe=PROBE,
    )
    cases = [("prefill", 3), ("prefill", 70), ("decode", 0), ("decode", 100)]
    names = [LATENTKV, MHA, TRANSFORMERS]
    assert [(row.phase, row.tokens, row.contender) for row in report.rows] == [(*c, n) for c in cases for n in names]
    for row in report.rows:
        assert row.ms > 0
        assert row.tokens_per_second == pytest.approx((row.tokens if row.phase == "prefill" else 1) / row.ms * 1e3)
        assert (row.of_read_ceiling is None) == (row.phase == "prefill" or row.contender == TRANSFORMERS)
    # 2 layers of 16 + 8 latents in 2 bytes; MHA of 2 heads of 16 + 16.
    assert (report.cache_bytes_per_token, report.mha_cache_bytes_per_token) == (96, 256)
    assert report.parameters == sum(p.numel() for p in Decoder(read_config(CONFIG)).parameters())
    assert report.agreement[TRANSFORMERS] > 0.99
    assert (report.outside_kernels_ms is None) == (current_backend() == "torch")
    assert report.peak_rss_bytes > report.allocated_cache_bytes
    assert model_table(report).row_count == len(report.rows)
    assert "96 B a token" in model_facts(report)
    plot_decode([report, report], tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(current_backend() == "torch", reason="the native kernels do not run here")
def test_the_mha_twin_takes_activations_as_the_model_does(folder: Path, monkeypatch: pytest.MonkeyPatch):
    twins: list[Decoder] = []
    monkeypatch.setattr(module, "mha_twin", lambda *given: twins.append(mha_twin(*given)) or twins[-1])
    for activations in ("exact", "int8"):
        llm = LLM(folder, weights="int8", activations=activations)
        asked: dict[str, Any] = {"weights": "int8", "activations": activations, "mha": True, "probe": PROBE}
        measure_model(llm, name="tiny", prompts=[3], depths=[], new_tokens=1, repeats=1, **asked)
    exact, rounding = (
        [weight.rounds_input for weight in packed_weights(twin.model.layers[0].get_submodule("self_attn"))]
        for twin in twins
    )
    assert not any(exact)
    assert any(rounding)


@pytest.mark.skipif(current_backend() == "torch", reason="the native kernels do not run here")
def test_time_outside_kernels_is_a_part_of_the_step(llm: LLM):
    report = measure_model(llm, name="tiny", prompts=[], depths=[4], new_tokens=2, repeats=2, probe=PROBE)
    assert report.outside_kernels_ms is not None
    assert report.outside_kernels_ms > 0
    assert 0 < (report.outside_kernels_share or 0) < 1
    assert "are not kernels" in model_facts(report)


def test_sequences_decode_together_and_count_together(folder: Path, tmp_path: Path):
    llm = LLM(folder, kv_cache_bytes=64 * 96 * 8)
    asked: dict[str, Any] = {"prompts": [3], "depths": [0, 70], "concurrency": [1, 3], "new_tokens": 2, "repeats": 1}
    report = measure_model(llm, name="tiny", mha=True, transformers=True, probe=PROBE, **asked)
    decoded = [(row.tokens, row.sequences, row.contender) for row in report.rows if row.phase == "decode"]
    assert decoded == [
        *((0, 1, name) for name in (LATENTKV, MHA, TRANSFORMERS)),
        *((0, 3, name) for name in (LATENTKV, MHA)),  # transformers decodes one
        *((70, 1, name) for name in (LATENTKV, MHA, TRANSFORMERS)),
        *((70, 3, name) for name in (LATENTKV, MHA)),
    ]
    for row in report.rows:
        if row.sequences > 1:
            assert row.tokens_per_second == pytest.approx(3 / row.ms * 1e3)
            assert row.of_read_ceiling is None
    labels = model_table(report).columns[0]._cells
    assert "decode at 70" in labels and "decode at 70, 3 together" in labels
    plot_decode([report], tmp_path / "decode.png")
    assert llm.cache.pool.free_pages == llm.cache.num_pages
    with pytest.raises(RequestError, match="5 sequences at once need 10 pages of cache, which has 8"):
        measure_model(llm, name="tiny", probe=PROBE, **(asked | {"concurrency": [5]}))
    with pytest.raises(RequestError, match="1 or more"):
        measure_model(llm, name="tiny", probe=PROBE, **(asked | {"concurrency": [0]}))


@torch.inference_mode()
def test_sequences_that_decode_together_are_sequences_of_their_own(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    contender, seen = OwnDecoder(llm.decoder, llm.cache), []
    read = Runner.read
    monkeypatch.setattr(Runner, "read", lambda self, each, counts: (seen.append([*each]), read(self, each, counts))[1])
    contender.decode(40, 2, 3)
    pages = [page for sequence in seen[0] for page in sequence.pages]
    assert len(seen) == 2 and len(set(pages)) == len(pages) == 3
    assert [len(sequence.tokens) for sequence in seen[0]] == [43] * 3


def test_a_peer_that_can_is_asked_for_several_sequences(tmp_path: Path):
    able = PEER.replace('"bytes": 7', '"bytes": 7, "most_sequences": 4')
    (tmp_path / "able.py").write_text(able.replace("0.5 * request", '0.5 * request.get("sequences", 1) * request'))
    peer = OtherProgram(f"{sys.executable} {tmp_path}/able.py")
    try:
        assert (peer.most_sequences, peer.decode(0, 2, 4), peer.decode(0, 2)) == (4, 4.0, 1.0)
    finally:
        peer.close()


def test_all_pages_are_given_back(llm: LLM):
    measure_model(llm, name="tiny", prompts=[3], depths=[], new_tokens=2, repeats=1, probe=PROBE)
    assert llm.cache.pool.free_pages == llm.cache.num_pages
    assert llm.generate([1, 2])


def test_medians_come_from_all_rounds_but_the_first(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    report = with_times(llm, monkeypatch, [9.0, 9.0, 2.0, 0.5, 0.25, 1.0], repeats=3)
    assert report.rows[0].tokens_per_second == pytest.approx(10 / 0.5)
    assert report.rows[0].samples == 3


def test_what_takes_too_long_is_timed_once(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    report = with_times(llm, monkeypatch, [9.0, 9.0, 2.0], repeats=3, limit_seconds=5.0)
    assert (report.rows[0].samples, report.rows[0].ms) == (1, pytest.approx(2000))
    assert "once" in model_table(report).columns[2]._cells[0]


def test_a_step_is_slow_only_where_its_second_is(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    steps = {"prompts": [], "depths": [4], "new_tokens": 1, "repeats": 3, "limit_seconds": 5.0}
    monkeypatch.setattr(module, "_outside_kernels", lambda *_: None)
    row = with_times(llm, monkeypatch, [9.0, 9.0, 2.0, 0.25, 0.5, 0.25, 1.0], **steps).rows[0]
    assert (row.samples, row.ms) == (3, pytest.approx(500))
    row = with_times(llm, monkeypatch, [9.0, 9.0, 2.0, 1.75], **steps).rows[0]
    assert (row.samples, row.ms) == (1, pytest.approx(1750))


def with_times(llm: LLM, monkeypatch: pytest.MonkeyPatch, times: list[float], **asked: Any) -> ModelReport:
    """One prompt of 10 tokens (after two warm-ups and a trial) that takes `times`, one after the other."""
    left = iter(times)
    monkeypatch.setattr(module, "_run", lambda contender, case, new_tokens: next(left))
    return measure_model(llm, **{"name": "tiny", "prompts": [10], "depths": [], "probe": PROBE, **asked})


def test_a_peer_is_timed_by_its_own_clock(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompt = [1, 2, 3]
    monkeypatch.setattr(module, "random_tokens", lambda vocab_size, count: prompt)
    report = measure_model(
        llm,
        name="tiny",
        prompts=[5],
        depths=[20],
        new_tokens=4,
        repeats=1,
        peers=[peer(tmp_path, {str(prompt): llm.logits(prompt)[-1].tolist()})],
        probe=PROBE,
    )
    rows = {row.phase: row for row in report.rows if row.contender == "echo"}
    assert rows["prefill"].tokens_per_second == pytest.approx(5 / 0.25)
    assert rows["decode"].tokens_per_second == pytest.approx(1 / 0.5)
    assert report.agreement["echo"] == pytest.approx(1, abs=1e-3)


def test_a_peer_with_another_model_is_refused(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "random_tokens", lambda vocab_size, count: [1])
    other = peer(tmp_path, {"[1]": (-llm.logits([1])[-1]).tolist()})
    with pytest.raises(RequestError, match="echo computes other logits"):
        measure_model(llm, name="tiny", prompts=[5], depths=[], peers=[other], probe=PROBE)


def peer(folder: Path, logits: dict[str, list[float]]) -> str:
    import json

    (folder / "peer.py").write_text(PEER)
    (folder / "logits.json").write_text(json.dumps(logits))
    return f"{sys.executable} {folder}/peer.py {folder}/logits.json"


def test_a_peer_that_fails_says_why():
    with pytest.raises(RequestError, match="no such interpreter"):
        OtherProgram(f"{sys.executable} -c 'raise SystemExit(\"no such interpreter\")'")
    with pytest.raises(RequestError, match="cannot be started"):
        OtherProgram("/no/such/program")


@pytest.mark.parametrize(
    "asked",
    [
        {"prompts": [], "depths": []},
        {"prompts": [0]},
        {"depths": [250]},
        {"new_tokens": 0},
        {"repeats": 0},
        {"new_tokens": 300},
    ],
)
def test_what_cannot_be_measured_in_a_model_is_refused(llm: LLM, asked: dict[str, object]):
    with pytest.raises(RequestError):
        measure_model(llm, name="tiny", **{"prompts": [2], "depths": [], "probe": PROBE, **asked})


@torch.inference_mode()
def test_decoding_at_a_depth_reads_what_is_cached(llm: LLM):
    contender = OwnDecoder(llm.decoder, llm.cache)
    contender.decode(100, 2)
    for pages in llm.cache.storage:
        assert pages.abs().amax(dim=2).min() > 0  # no token of any page is left empty


def test_step_work_counted_by_hand():
    config = read_config(CONFIG)
    # q 32 x 32, kv_a 32 x 24, kv_b 16 x 48, o 32 x 32; dense 3 x 32 x 48; experts 3 x 32 x 24 each; router 32 x 4.
    attention = 32 * 32 + 32 * 24 + 16 * 48 + 32 * 32
    used = 2 * attention + 3 * 32 * 48 + (2 + 1) * 3 * 32 * 24 + 32 * 4 + 50 * 32
    # A pair and head: 2 (2 L + R) absorbed, 2 (Dn + R + Dv) expanded.
    assert decode_flops(config, 9) == 2 * used + 2 * 2 * 2 * (2 * 16 + 8) * 10
    assert prefill_flops(config, 4) == 2 * (4 * (used - 50 * 32) + 50 * 32) + 2 * 2 * 2 * (8 + 8 + 16) * 10
    index = {
        "model_type": "deepseek_v32",
        "n_group": 1,
        "q_lora_rank": 16,
        "index_topk": 6,
        "index_n_heads": 3,
        "index_head_dim": 10,
    }
    sparse = read_config(CONFIG | index)
    selected = 2 * 2 * (2 * (2 * 16 + 8) * 4 - 3 * 10 * 10)  # 4 of 10 tokens are scored, and not read
    assert decode_flops(read_config(CONFIG | index | {"index_topk": 10}), 9) - decode_flops(sparse, 9) == selected
    norms = 2 * (2 * 32 + 16) + 32
    decoder = Decoder(config).bfloat16()
    assert weight_bytes_read(decoder) == 2 * (used + norms)


def test_step_work_beside_zero_experts_is_an_average():
    config = read_config(LONGCAT)
    # Of two choices among 4 experts and 4 zero experts one computes; the router knows all 8, in float32.
    attention = 32 * 16 + 16 * 32 + 32 * 24 + 16 * 48 + 32 * 32
    used = 2 * (attention + 3 * 32 * 48) + 3 * 32 * 24 + 32 * 8 + 50 * 32
    assert decode_flops(config, 9) == 2 * used + 2 * 2 * 2 * (2 * 16 + 8) * 10
    decoder = Decoder(config).bfloat16()
    decoder.keep_choices_exact()
    norms = 2 * (2 * 32 + 16 + 16) + 32
    assert weight_bytes_read(decoder) == 2 * (used + norms) + 2 * 32 * 8 + 4 * 8


def test_packed_weights_count_once_and_as_they_are_stored():
    config = replace(read_config(CONFIG), hidden_size=128, vocab_size=64)
    plain, packed = Decoder(config).bfloat16(), Decoder(config).bfloat16()
    pack_module(packed, Packing(INT8))
    assert 0.5 < weight_bytes_read(packed) / weight_bytes_read(plain) < 0.85


def test_weights_are_called_what_most_of_them_are_stored_as():
    config = replace(read_config(CONFIG), hidden_size=128, vocab_size=64)
    compact = "bfloat16" if kernels.extension is None else "compact bfloat16"
    ways = {"bfloat16": Packing(), compact: Packing(compact=True), "int4": Packing(INT4, compact=True)}
    for name, packing in ways.items():
        decoder = Decoder(config).bfloat16()
        assert weight_format(decoder) == "bfloat16"
        pack_module(decoder, packing)
        assert weight_format(decoder) == name


@torch.inference_mode()
def test_the_twin_shares_all_but_attention_and_runs():
    decoder = Decoder(read_config(CONFIG)).bfloat16().eval()
    twin = mha_twin(decoder, None)
    assert mha_config(decoder.config).attention == GQAConfig(num_kv_heads=2, head_dim=16)
    own, shared = dict(decoder.named_parameters()), dict(twin.named_parameters())
    assert all(own[name] is shared[name] for name in own if "self_attn" not in name)
    logits = OwnDecoder(twin, PagedCache(twin.config.specs("bf16"), 2)).logits([1, 2, 3])
    assert logits.isfinite().all()
    with pytest.raises(RequestError, match="no latent attention"):
        mha_config(twin.config)


@torch.inference_mode()
def test_the_twin_shares_experts_at_the_end_of_a_shortcut():
    decoder = Decoder(read_config(LONGCAT)).bfloat16().eval()
    twin = mha_twin(decoder, None)
    assert twin.model.layers[1].shortcut is decoder.model.layers[1].shortcut is not None
    assert OwnDecoder(twin, PagedCache(twin.config.specs("bf16"), 2)).logits([1, 2, 3]).isfinite().all()


def test_agreement_leaves_out_the_twin(llm: LLM):
    entry = module.Entry(OwnDecoder(llm.decoder, llm.cache), llm.config)
    with torch.inference_mode():
        assert compare_logits({LATENTKV: entry, MHA: entry}) == {}
    assert entry.bytes_read(Case("decode", 4)) is None
