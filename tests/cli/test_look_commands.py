"""`latentkv plan`, `inspect` and `doctor` print what they find, for people and as JSON."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentkv import LLM, kernels
from latentkv.cli import self_test
from latentkv.cli.advice import platform_advice, torch_advice
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained
from latentkv.ops import rms_norm
from latentkv.ops.native.team import live_teams, release_team
from latentkv.plan import BUILT_IN, load_config


def as_json(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_plan_as_json_has_every_size(latentkv):
    options = ["--context", "128k", "--batch", 8, "--kv-dtype", "fp8", "--memory", "1TiB"]
    plan = as_json(latentkv("plan", "deepseek-v2", *options, "--json"))
    own, mha, grouped, single = plan["cache"]
    assert plan["context"] == 131_072 and plan["batch"] == 8
    assert own["bytes_per_token"] == 60 * 656
    assert own["cache_bytes"] == 8 * 131_072 * 60 * 656
    assert mha["bytes_per_token"] == 60 * 128 * (192 + 128) * 2
    assert (grouped["kv_heads"], single["kv_heads"]) == (8, 1)
    assert plan["kv_dtypes"]["bf16"] == 69_120
    assert plan["weights_dtype"] == "bf16"
    room = 2**40 - plan["weights_bytes"]
    assert own["longest_context"]["memory given"] == room // (8 * 60 * 656 * 64) * 64


def test_plan_reads_as_a_table(latentkv):
    result = latentkv("plan", "deepseek-v3", "--context", "64k")
    assert result.exit_code == 0, result.stderr
    for words in (
        "671B",
        "MLA (this model)",
        "GQA, 8 KV heads",
        "MQA",
        "70,272",
        "4,997,120",
        "1/71.1",
        "192 key + 128 value",
    ):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("memory", "words"), [("1GiB", "weights alone do not fit"), ("12GiB", "too much"), ("2TiB", "fit, ")]
)
def test_plan_says_what_fits(latentkv, memory, words):
    result = latentkv("plan", "minicpm3-4b", "--context", "1M", "--memory", memory)
    assert words in result.stdout.replace("\n", " ")


def test_plan_without_a_model_compares_the_built_in_shapes(latentkv, tmp_path):
    result = latentkv("plan", "--plot", tmp_path / "kv.png")
    assert result.exit_code == 0
    for name, per_token in (("deepseek-v3", "70,272"), ("minicpm3-4b", "35,712"), ("ling-3.0-tiny", "+ 19.27 MiB")):
        assert any(name in line and per_token in line for line in result.stdout.splitlines())
    assert (tmp_path / "kv.png").read_bytes().startswith(b"\x89PNG")
    plans = as_json(latentkv("plan", "--kv-dtype", "int8", "--json"))
    assert [plan["model"] for plan in plans] == [n for n in BUILT_IN if "MLA" in str(load_config(n).cached_attention)]


def test_plot_of_one_model_is_refused(latentkv, tmp_path):
    result = latentkv("plan", "deepseek-v3", "--plot", tmp_path / "kv.png")
    assert result.exit_code == 2 and "--plot" in result.stderr


def test_plan_help_names_the_built_in_shapes(latentkv):
    words = latentkv("plan", "--help").stdout.replace("│", " ").split()
    assert set(BUILT_IN) <= {word.strip(",.") for word in words}


def test_plan_of_a_folder_is_what_the_loaded_model_allocates(latentkv, model_folder):
    plan = as_json(latentkv("plan", model_folder, "--kv-dtype", "fp32", "--json"))
    llm = LLM(model_folder)
    assert plan["cache"][0]["bytes_per_token"] == llm.cache.bytes_per_token
    assert plan["cache"][0]["cache_bytes"] == llm.cache.allocated_bytes
    assert plan["parameters"] == sum(p.numel() for p in llm.decoder.parameters())
    assert plan["weights_bytes"] == sum(t.nbytes for t in llm.decoder.state_dict().values())


def test_inspect_counts_what_the_files_hold(latentkv, model_folder):
    facts = as_json(latentkv("inspect", model_folder, "--json", "--tensors"))
    stored = load_file(model_folder / "model.safetensors")
    assert {t["name"] for t in facts["tensors"]} == set(stored)
    assert sum(t["bytes"] for t in facts["tensors"]) == sum(t.nbytes for t in stored.values())
    assert sum(k["tensors"] for k in facts["by_kind"].values()) == len(stored)
    assert facts["by_dtype"]["float32"]["tensors"] == len(stored)
    assert facts["parameters_stored"] == facts["parameters"]
    assert facts["attention"]["kind"] == "MLA" and facts["attention"]["kv_lora_rank"] == 16
    assert facts["moe"]["num_experts"] == 4
    assert facts["cache_bytes_per_token"] == 2 * (16 + 8) * 2
    assert facts["tokenizer"]["chat_template"] == "plain"
    assert facts["mtp_layers_stored"] == 0
    assert set(facts["by_kind"]) == {
        *("embedding", "lm head", "norms", "attention", "dense mlp", "router", "routed experts", "shared experts")
    }


def test_inspect_reads_as_text(latentkv, model_folder):
    result = latentkv("inspect", model_folder, "--tensors")
    assert result.exit_code == 0, result.stderr
    for words in (
        "deepseek_v3",
        "MLA: 4 heads, kv_lora_rank 16",
        "2 of 4 routed",
        "a plain one",
        "model.embed_tokens.weight",
    ):
        assert words in result.stdout
    assert "will not load" not in result.stdout
    assert "model.embed_tokens.weight" not in latentkv("inspect", model_folder).stdout


def test_inspect_tells_of_mtp_layers_stored_and_counted(latentkv, edit_config):
    folder = edit_config(num_nextn_predict_layers=1)
    assert "0 of the 1 multi-token-prediction" in latentkv("inspect", folder).stdout
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(tensors, folder / "model.safetensors")
    assert "1 of the 1 multi-token-prediction" in latentkv("inspect", folder).stdout


LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        (
            "qwen2_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40},
            "and a gated one of 40, of width 24,",
        ),
        ("glm4_moe", {"n_routed_experts": 8}, "16 of a head's 32 dimensions, half-split"),
        ("olmoe", {"num_experts": 8}, "key/value heads of 32, QK-norm over all heads"),
        (
            "deepseek_v32",
            {**LATENT, "n_routed_experts": 8, "index_topk": 1024, "index_n_heads": 4, "index_head_dim": 24},
            "sparse: 1,024 tokens selected by 4 index heads of 24 in 2 layers",
        ),
        (
            "longcat_flash",
            {**LATENT, "num_layers": 2, "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3},
            "3 of 8 routed and 4 zero experts (softmax) and none shared, of width 24, in 2 layers, beside dense blocks",
        ),
        (
            "hy_v4",
            {**LATENT, "q_lora_rank": 12, "n_routed_experts": 8, "index_n_heads": 4, "index_head_dim": 24},
            "gated by element, a sink a head; sparse: 2,048 tokens selected by 4 index heads of 24 in 2 layers",
        ),
        (
            "hy_v4",
            {**LATENT, "q_lora_rank": 12, "n_routed_experts": 8, "index_n_heads": 4, "hc_mult": 3},
            "3 streams, added to by each block (hyper-connections)",
        ),
    ],
)
def test_inspect_tells_what_models_with_experts_attend_with(latentkv, tmp_path, model_type, changes, words):
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 24, "eos_token_id": 1}
    save_pretrained(Decoder(read_config({"model_type": model_type, **sizes, **heads, **changes})), tmp_path)
    result = latentkv("inspect", tmp_path)
    assert words in result.stdout.replace("\n", " ")
    assert "will not load" not in result.stdout


def test_inspect_warns_of_weights_that_the_config_does_not_imply(latentkv, edit_config):
    assert "will not load" in latentkv("inspect", edit_config(moe_intermediate_size=24)).stdout


def test_inspect_of_a_wrapped_text_model_leaves_vision_out(latentkv, copied_model):
    tensors = load_file(copied_model / "model.safetensors")
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    wrapped["vision_tower.patch.weight"] = torch.zeros(3, 3)
    save_file(wrapped, copied_model / "model.safetensors")
    facts = as_json(latentkv("inspect", copied_model, "--json"))
    assert facts["parameters_stored"] == facts["parameters"]
    assert facts["by_kind"]["other"]["parameters"] == 9


def test_doctor_finds_every_op_right(latentkv):
    report = as_json(latentkv("doctor", "--json"))
    assert report["passed"]
    assert {op["dtype"] for op in report["ops"]} == {"float32", "bfloat16"}
    for op in report["ops"]:
        assert op["passed"] and 0 <= op["error"] <= op["tolerance"] and op["backend"]
    assert {"mla_attend", "gqa_attend", "mla_prefill", "moe_experts"} <= {op["op"] for op in report["ops"]}
    machine = report["machine"]
    assert machine["cores"] >= 1 and machine["torch"] == torch.__version__
    assert machine["memory"][0]["total"] >= machine["memory"][0]["free"] > 0
    assert sum("torch" in path for path in machine["openmp"]) == 1  # a package of the tests may bring another


def test_doctor_finds_one_team_where_this_thread_has_computed_too_and_two_where_another_does(latentkv):
    before = torch.get_num_threads()
    release_team()
    others = live_teams()  # of models that other tests serve

    def compute() -> None:
        compute_much()
        computed.set()
        leave.wait(60)

    computed, leave = threading.Event(), threading.Event()
    other = threading.Thread(target=compute)
    try:
        torch.set_num_threads(2)
        compute_much()
        assert as_json(latentkv("doctor", "--json"))["machine"]["teams"] == others + 1
        other.start()
        computed.wait(60)
        assert as_json(latentkv("doctor", "--json"))["machine"]["teams"] == others + 2
        assert "teams share the cores" in " ".join(latentkv("doctor").stdout.split())
    finally:
        leave.set()
        torch.set_num_threads(before)


def compute_much() -> torch.Tensor:
    """Work that is worth a team of threads."""
    return rms_norm(torch.ones(512, 512), torch.ones(512), 1e-6)


def test_doctor_reads_as_a_table(latentkv):
    result = latentkv("doctor")
    assert result.exit_code == 0, result.stderr
    for words in ("CPU ", "Memory ", "torch ", "mla_attend", "checks pass"):
        assert words in result.stdout


def test_doctor_says_loudly_that_kernels_are_missing_and_how_to_get_them(latentkv, monkeypatch):
    monkeypatch.setattr(kernels, "extension", None)
    monkeypatch.setattr(kernels, "_import_error", "No module named 'latentkv._native'")
    monkeypatch.setattr(kernels, "available_backends", lambda: ("torch",))
    result = latentkv("doctor")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("Kernels"))
    assert "torch computes everything, several times slower" in line and "install a C++ compiler" in line


def test_doctor_names_a_cuda_build_without_a_gpu_and_a_system_that_is_not_tested(latentkv, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("platform.system", lambda: "Windows")
    windows, cuda = as_json(latentkv("doctor", "--json"))["machine"]["advice"]
    assert "Windows is not supported" in windows and "WSL 2" in windows
    assert "CUDA 13.0" in cuda and "whl/cpu" in cuda
    assert "Note     Windows is not supported" in latentkv("doctor").stdout


def test_advice_is_silent_where_there_is_nothing_better():
    assert platform_advice("Linux") is torch_advice(None, 0) is torch_advice("13.0", 1) is None
    assert "macOS" in str(platform_advice("Darwin")) and "FreeBSD" in str(platform_advice("FreeBSD"))


@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_doctor_exits_with_1_when_an_op_is_wrong(latentkv, monkeypatch, wrong):
    rms_norm = self_test.ops.rms_norm
    monkeypatch.setattr(self_test.ops, "rms_norm", lambda *args: rms_norm(*args) * wrong)
    result = latentkv("doctor")
    assert result.exit_code == 1
    checks = len(self_test.self_test(torch.device("cpu")))
    assert f"2 of {checks} checks fail" in result.stdout and "wrong" in result.stdout
