"""A quantised copy: what changes, what stays, and that nothing is left half-done."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from gguf_checks import copied_tokenizer, save
from quantize_models import CONFIG, LONGCAT, edit_config, random_decoder, save_random, stored
from safetensors.torch import save_file

from forked_program import RETURN_WHAT_IS_FREED, run_forked
from latentkv import LLM
from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError, ConfigError, OpError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.config_reader import read_config
from latentkv.models.loading import load_model
from latentkv.ops.backends import why_not_native
from latentkv.quantize import REPORT_FILE, QuantizationReport, quantize_checkpoint
from latentkv.quantize.gguf import plan_gguf, write_gguf
from latentkv.text import load_tokenizer
from latentkv.weights.formats import INT4, ROUNDED_TO
from latentkv.weights.policy import choose_scheme
from latentkv.weights.weight import quantize_weight

KEPT = ("embed_tokens", "norm", "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "mlp.gate.", "eh_proj")
FORMATS = [("int8", None), ("int8", 32), ("int4", None), ("int4", 32)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    return save_random(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_every_weight_is_quantised_as_the_rule_says_or_kept_bit_for_bit(source, tmp_path, fmt, group):
    quantize_checkpoint(source, tmp_path / "out", fmt, group)
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "out")
    assert set(after.names) == set(before.names)
    for name in before.names:
        original, scheme = before.read(name), choose_scheme(name, before.shape(name), ROUNDED_TO[fmt], group)
        assert (scheme is None) == any(part in name for part in KEPT), name
        assert after.scheme(name) == scheme
        assert after.shape(name) == before.shape(name)
        if scheme is None:
            assert after.dtype(name) == original.dtype and torch.equal(after.read(name), original)
        else:
            expected = quantize_weight(original, scheme.format, scheme.group)
            found = after.quantized(name)
            assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


def test_the_config_says_it_and_the_copy_runs(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", "int4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert "model.layers.1.mlp.gate" in quantization["ignore"]
    assert not any("embed" in name or "norm" in name for name in quantization["ignore"])
    assert [group["weights"]["num_bits"] for group in quantization["config_groups"].values()] == [4, 4, 8]
    exact, rounded = (LLM(folder).logits(list(range(40))) for folder in (source, tmp_path / "out"))
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.5


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_quantising_while_loading_gives_the_same_model(source, tmp_path, fmt):
    if reason := why_not_native(torch.device("cpu")):
        pytest.skip(f"quantised weights need the native kernels, which {reason}")
    quantize_checkpoint(source, tmp_path / "out", fmt)
    on_the_fly, copied = LLM(source, weights=fmt), LLM(tmp_path / "out")
    assert torch.equal(on_the_fly.logits(list(range(40))), copied.logits(list(range(40))))


def test_layers_that_are_two_are_quantised_under_their_own_names_and_run(tmp_path):
    source = save_random(tmp_path / "source", **LONGCAT)
    quantize_checkpoint(source, tmp_path / "out", "int4")
    reader = CheckpointReader(tmp_path / "out")
    assert set(reader.names) == set(CheckpointReader(source).names)
    layer = "model.layers.0."
    for name in ("self_attn.1.o_proj", "mlps.0.up_proj", "mlps.1.down_proj", "mlp.experts.3.gate_proj"):
        assert reader.scheme(f"{layer}{name}.weight").format == INT4, name
    for name in ("self_attn.0.kv_b_proj", "mlp.router.classifier", "mlp.experts.4.gate_proj"):  # of a zero expert
        assert reader.scheme(f"{layer}{name}.weight") is None, name
    assert reader.dtype(f"{layer}mlp.router.classifier.weight") == torch.float32
    tokens = list(range(40))
    copied = LLM(tmp_path / "out").logits(tokens)
    assert 0 < (LLM(source).logits(tokens) - copied).norm() / copied.norm() < 0.5
    if why_not_native(torch.device("cpu")) is None:
        assert torch.equal(LLM(source, weights="int4").logits(tokens), copied)
        rounded = LLM(tmp_path / "out", activations="int8").logits(tokens)
        differences = (rounded - copied).norm(dim=-1) / copied.norm(dim=-1)
        assert 0 < float(differences.median()) < 0.05


def test_transformers_loads_the_copy(source, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    quantize_checkpoint(source, tmp_path / "out", "int4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.arange(40)[None]).logits[0]
    ours = LLM(tmp_path / "out", dtype="fp32").logits(list(range(40)))
    assert (theirs - ours).abs().max() < 1e-2 * theirs.abs().max()  # transformers rounds experts to bf16
    reader = CheckpointReader(tmp_path / "out")
    weights = model.state_dict()
    compared = [name for name in reader.names if name in weights and reader.scheme(name)]
    assert len(compared) > 5
    for name in compared:
        assert torch.equal(weights[name], reader.read(name)), name
    experts = weights["model.layers.1.mlp.experts.gate_up_proj"]
    for index, half in ((0, "gate_proj"), (1, "up_proj")):
        stored_as = f"model.layers.1.mlp.experts.3.{half}.weight"
        assert torch.equal(experts[3].chunk(2)[index], reader.read(stored_as, dtype=torch.bfloat16))


def test_fused_experts_are_stored_one_by_one(tmp_path):
    family = {"model_type": "mistral4", "architectures": None, "num_nextn_predict_layers": None}
    source = save_random(tmp_path / "source", **family)
    assert any(name.endswith("experts.gate_up_proj") for name in CheckpointReader(source).names)
    quantize_checkpoint(source, tmp_path / "out", "int8")
    reader = CheckpointReader(tmp_path / "out")
    fused = stored(source)["model.layers.1.mlp.experts.gate_up_proj"]
    assert not any("gate_up_proj" in name for name in reader.names)
    up = reader.quantized("model.layers.1.mlp.experts.3.up_proj.weight")
    assert torch.equal(up.codes, quantize_weight(fused[3].chunk(2)[1], "int8").codes)
    assert len(LLM(tmp_path / "out").generate([5, 6, 7])[0].token_ids) > 0


def test_a_head_that_is_tied_to_the_embedding_stays_its_copy(tmp_path):
    source = save_random(tmp_path / "source", tie_word_embeddings=True)
    tensors = stored(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out", "int4")
    assert CheckpointReader(tmp_path / "out").scheme("lm_head.weight") is None
    LLM(tmp_path / "out")


def test_a_text_model_in_a_vision_wrapper_keeps_its_names_and_the_vision_tensors(tmp_path):
    source = save_random(tmp_path / "source")
    tensors = {f"language_model.{name}": tensor for name, tensor in stored(source).items()}
    tensors["vision_tower.layers.0.self_attn.q_proj.weight"] = torch.ones(64, 64)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"model_type": "kimi_vl", "text_config": config}))
    quantize_checkpoint(source, tmp_path / "out", "int4")
    reader = CheckpointReader(tmp_path / "out")
    assert reader.scheme("language_model.model.layers.0.self_attn.o_proj.weight").format == INT4
    assert torch.equal(reader.read("vision_tower.layers.0.self_attn.q_proj.weight"), torch.ones(64, 64))
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "vision_tower.layers.0.self_attn.q_proj" in ignored
    LLM(tmp_path / "out")


def test_float8_weights_are_quantised_from_what_they_stand_for(tmp_path):
    source = save_random(tmp_path / "source")
    tensors = stored(source)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight"):
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.003)
        tensors[name] = (tensors[name].float() / 0.003).to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors")
    edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    quantize_checkpoint(source, tmp_path / "out", "int8")
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "out")
    o_proj, kv_b = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight"
    assert torch.equal(after.quantized(o_proj).codes, quantize_weight(before.read(o_proj), "int8").codes)
    assert torch.equal(after.read(kv_b), before.read(kv_b, dtype=torch.bfloat16))
    LLM(tmp_path / "out")


def test_the_report_tells_what_is_in_the_files(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "out", "int4")
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "out")
    assert report.total.parameters == sum(math.prod(before.shape(name)) for name in before.names)
    assert report.total.bytes_before == sum(before.nbytes(name) for name in before.names)
    assert report.total.bytes_after == sum(tensor.nbytes for tensor in stored(tmp_path / "out").values())
    assert report.total.tensors == len(before.names)
    names = [name for name in before.names if "layers.1.mlp.experts" in name]
    error = sum((after.read(name) - before.read(name).float()).square().sum() for name in names)
    norm = sum(before.read(name).float().square().sum() for name in names)
    row = next(row for row in report.rows if (row.layer, row.kind) == (1, "routed experts"))
    assert row.relative_error == pytest.approx(math.sqrt(error / norm), rel=1e-5)
    assert row.bits_per_weight == pytest.approx(4 + 16 / 64 + 128 / (64 * 64))
    assert report.layer_errors[1]["routed experts"] == row.relative_error
    saved = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert QuantizationReport.from_json(saved) == report
    with pytest.raises(ValueError, match="it has no rows"):
        QuantizationReport.from_json(saved | {"by_layer": []})
    assert saved["total"]["relative_error"] == report.total.relative_error
    assert (saved["weights"], saved["group"]) == ("int4", None)


def test_tokenizer_files_come_along_and_nothing_else(source, tmp_path):
    copied = Path(shutil.copytree(source, tmp_path / "source"))
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE")
    for name in (*files, "README.md", "evaluation.json", "pytorch_model.bin"):
        (copied / name).write_text("{}")
    quantize_checkpoint(copied, tmp_path / "out", "int8")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*files, "config.json", "model.safetensors", REPORT_FILE}


class Stop(Exception):
    pass


def test_a_gguf_file_is_quantised_as_the_folder_it_was_made_of(tmp_path):
    folder = copied_tokenizer(
        EMBEDDED_MODEL, save(tmp_path / "source", vocab_size=read_config(EMBEDDED_MODEL).vocab_size)
    )
    write_gguf(plan_gguf(folder, "bf16", "qwen2"), tmp_path / "model.gguf")
    quantize_checkpoint(folder, tmp_path / "of_folder", "int4")
    quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "of_file", "int4")
    expected, found = stored(tmp_path / "of_folder"), stored(tmp_path / "of_file")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name  # routers and norms are float32 in the file
    text = "It was a dark night; the 12 coachmen said: no"
    assert load_tokenizer(tmp_path / "of_file").encode(text) == load_tokenizer(tmp_path / "model.gguf").encode(text)
    ids = torch.randint(500, (1, 12))
    with torch.inference_mode():
        one, other = (load_model(tmp_path / name, dtype=torch.float32) for name in ("of_folder", "of_file"))
        assert torch.equal(one.logits(one.forward_train(ids)), other.logits(other.forward_train(ids)))


def stopping_after(count: int):
    def on_progress(done: int, total: int) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise Stop

    return on_progress


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_goes_on_shard_by_shard_to_the_same_files(source, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize_checkpoint(source, whole, "int4", max_shard_bytes=20_000)
    for stop in (3, 8, 8):
        with pytest.raises(Stop):
            quantize_checkpoint(source, out, "int4", max_shard_bytes=20_000, on_progress=stopping_after(stop))
        assert not (out / "config.json").exists()
    finished = {path: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert 1 < len(finished) < len(list(whole.glob("*.safetensors")))
    done: list[int] = []
    report = quantize_checkpoint(
        source, out, "int4", max_shard_bytes=20_000, on_progress=lambda so_far, total: done.append(so_far)
    )
    assert all(path.stat().st_ino == inode for path, inode in finished.items())
    assert done == sorted(done) and done[0] > 0 and done[-1] == report.total.bytes_before
    assert contents(out) == contents(whole)


def test_a_damaged_resume_state_is_one_sentence_that_names_it_and_the_remedy(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        quantize_checkpoint(source, out, "int4", max_shard_bytes=20_000, on_progress=stopping_after(8))
    claim = out / ".quantizing" / "conversion.json"
    rows = next(path for path in sorted(claim.parent.iterdir()) if path != claim)
    whole = claim.read_bytes()
    for damage in (b"", b"[" * 100_000, whole[:-9]):
        claim.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"conversion\.json is .*: remove the folder of the quantised copy"):
            quantize_checkpoint(source, out, "int4", max_shard_bytes=20_000)
    claim.write_bytes(whole)
    for damage in (b"", b"[" * 100_000, b"{}", b"[{}]", rows.read_bytes().replace(b'"tensors": 1', b'"tensors": "1"')):
        rows.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"safetensors\.json .*: remove it") as refused:
            quantize_checkpoint(source, out, "int4", max_shard_bytes=20_000)
        assert "\n" not in str(refused.value)
    rows.unlink()
    assert quantize_checkpoint(source, out, "int4", max_shard_bytes=20_000).total.bytes_before > 0


def test_a_copy_that_an_earlier_version_began_is_known_by_the_fingerprint_that_it_wrote(source, tmp_path):
    columns = {"model.layers.1.self_attn.o_proj.weight": torch.linspace(1, 2, 64)}
    assert CheckpointReader(source).shape(next(iter(columns)))[1] == 64
    with pytest.raises(Stop):
        quantize_checkpoint(source, tmp_path / "out", "int4", importance=columns, on_progress=stopping_after(3))
    quantize_checkpoint(source, tmp_path / "whole", "int4")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in CheckpointReader(source).files]
    digest = hashlib.sha256(json.dumps([files, config, 2 * 10**9], sort_keys=True).encode())
    for name, counts in columns.items():
        digest.update(name.encode() + counts.numpy().tobytes())
    assert json.loads((tmp_path / "out" / ".quantizing" / "conversion.json").read_text()) == digest.hexdigest()


def test_a_finished_run_given_again_does_nothing(source, tmp_path):
    out = tmp_path / "out"
    report = quantize_checkpoint(source, out, "int4")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert quantize_checkpoint(source, out, "int4") == report
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


KILLED = """
import os, signal, sys
from pathlib import Path
from latentkv.quantize import quantize_checkpoint
calls = 0
def on_progress(done, total):
    global calls
    calls += 1
    if calls == 20:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), "int4", max_shard_bytes=20_000, on_progress=on_progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_killed_run_leaves_whole_files_only_and_goes_on(source, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run_forked(KILLED, source, out)[0] == -signal.SIGKILL
    quantize_checkpoint(source, whole, "int4", max_shard_bytes=20_000)
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (whole / path.name).read_bytes()
    quantize_checkpoint(source, out, "int4", max_shard_bytes=20_000)
    assert contents(out) == contents(whole)


def test_a_folder_that_holds_something_else_is_refused(source, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="occupied exists and is not empty"):
        quantize_checkpoint(source, occupied, "int4")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_checkpoint(source, source, "int4")
    assert contents(occupied) == {"notes.txt": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file exists and is not empty"):
        quantize_checkpoint(source, tmp_path / "file", "int4")


def test_an_unfinished_copy_with_other_options_or_of_another_source_is_refused(source, tmp_path):
    with pytest.raises(Stop):
        quantize_checkpoint(source, tmp_path / "out", "int4", on_progress=stopping_after(3))
    other = Path(shutil.copytree(source, tmp_path / "other", copy_function=shutil.copyfile))
    for folder, fmt, group in ((source, "int8", None), (source, "int4", 32), (other, "int4", None)):
        with pytest.raises(CheckpointError, match="unfinished quantised copy of another source, or with other options"):
            quantize_checkpoint(folder, tmp_path / "out", fmt, group)
    quantize_checkpoint(source, tmp_path / "out", "int4")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_checkpoint(source, tmp_path / "out", "int8")


def test_a_disk_without_room_is_refused_before_anything_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB and its disk has 0\.0 GB free: make room"):
        quantize_checkpoint(source, tmp_path / "out", "int4")
    monkeypatch.undo()
    quantize_checkpoint(source, tmp_path / "out", "int4")


def test_a_disk_that_fails_is_one_sentence_and_the_next_run_goes_on(source, tmp_path):
    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"out cannot be written \(No space left on device\)"):
        quantize_checkpoint(source, tmp_path / "out", "int4", on_progress=full)
    quantize_checkpoint(source, tmp_path / "out", "int4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"])
def test_nan_and_infinity_are_refused_with_the_tensors_name(source, tmp_path, bad, name):
    copied = Path(shutil.copytree(source, tmp_path / "source"))
    tensors = stored(copied)
    tensors[name].view(-1)[7] = bad
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite"):
        quantize_checkpoint(copied, tmp_path / "out", "int4")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_is_quantised_already_is_refused(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match=r"out is quantised already \(.* is int8\): quantise the original"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", "int4")
    assert not (tmp_path / "again").exists()


def test_bad_sources_and_options_are_refused(source, tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        quantize_checkpoint(tmp_path, tmp_path / "out", "int4")
    with pytest.raises(OpError, match="unknown weight format 'int3'"):
        quantize_checkpoint(source, tmp_path / "out", "int3")
    with pytest.raises(OpError, match="groups of 100"):
        quantize_checkpoint(source, tmp_path / "out", "int4", 100)
    copied = Path(shutil.copytree(source, tmp_path / "source"))
    save_file({"model.norm.weight": torch.ones(64)}, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match="no weight that could be quantised"):
        quantize_checkpoint(copied, tmp_path / "out", "int4")
    with pytest.raises(ConfigError, match="bert"):
        quantize_checkpoint(edit_config(copied, model_type="bert"), tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_multi_token_prediction_layers_are_quantised_but_for_their_input(tmp_path):
    source = save_random(tmp_path / "source", num_nextn_predict_layers=1)
    quantize_checkpoint(source, tmp_path / "out", "int4")
    reader = CheckpointReader(tmp_path / "out")
    assert reader.scheme("model.layers.2.mlp.experts.0.up_proj.weight").format == INT4
    assert reader.scheme("model.layers.2.eh_proj.weight") is None
    assert LLM(tmp_path / "out").config.num_mtp_layers == 1


PEAK = """
import sys
from pathlib import Path
from latentkv.checkpoint import reader as module
from latentkv.quantize import quantize_checkpoint

module._MAX_MAPPED_BYTES = 4 * 2**20
def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024

quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]) / "warm", "int4")
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of importing
before = peak()
quantize_checkpoint(Path(sys.argv[3]), Path(sys.argv[2]) / "out", "int4")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is read from /proc")
def test_memory_holds_a_few_tensors_of_many(source, tmp_path):
    large = random_decoder(hidden_size=512, moe_intermediate_size=512, n_routed_experts=64, intermediate_size=512)
    from latentkv.models.loading import save_pretrained

    save_pretrained(large, tmp_path / "large", dtype=torch.bfloat16)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    _, peak, said = run_forked(RETURN_WHAT_IS_FREED + PEAK, source, tmp_path, tmp_path / "large")
    assert size > 100e6
    assert int(peak) < 40e6, said


def test_the_config_of_the_tests_covers_every_kind_of_weight(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "out", "int4")
    kinds = {"attention", "dense mlp", "routed experts", "shared experts", "router", "norms", "embedding", "lm head"}
    assert {row.kind for row in report.rows} == kinds
    assert CONFIG["intermediate_size"] % 64 and not CONFIG["intermediate_size"] % 32  # a smaller group is needed too
