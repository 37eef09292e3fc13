"""`latentkv pull`, `list` and `rm`, held to a made-up hub and a cache folder of its form; nobody asks the network."""

from __future__ import annotations

import json
from collections import namedtuple
from hashlib import sha256
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from gguf_models import write_deepseek2
from latentkv.cli import pull as pull_module
from latentkv.llm_options import EMBEDDED_MODEL

COMMIT, OTHER = "a" * 40, "b" * 40
Usage = namedtuple("Usage", "free")


def keep(cache, repo_id, files, *, commit=COMMIT, ref="main"):
    """Put files {name: path or bytes} into a cache folder as the hub's client does."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (repo / part).mkdir(parents=True, exist_ok=True)
    if ref is not None:
        (repo / "refs" / ref).write_text(commit)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        blob = repo / "blobs" / sha256(name.encode() + data).hexdigest()
        blob.write_bytes(data)
        link = repo / "snapshots" / commit / name
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    return repo / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def files(model_folder):
    """The files of a model, by name."""
    return {path.name: path for path in model_folder.iterdir()}


@pytest.fixture
def hub(cache, files, monkeypatch):
    """A hub with one repository, org/tiny; .files may be changed, and .fetched says which were asked for."""
    hub = SimpleNamespace(files={**files, "run.py": b"print()", "pytorch_model.bin": b"x" * 99}, fetched=[], sizes={})

    def model_info(self, repo_id, *, revision, files_metadata, timeout):
        assert repo_id == "org/tiny" and files_metadata
        found = {name: hub.sizes.get(name, len(as_bytes(content))) for name, content in hub.files.items()}
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in found.items()]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns, etag_timeout):
        names = list(
            huggingface_hub.utils.filter_repo_objects(
                hub.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        hub.fetched.append(set(names))
        return str(keep(cache, repo_id, {name: hub.files[name] for name in names}))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def as_bytes(content):
    return content if isinstance(content, bytes) else content.read_bytes()


def test_a_model_is_fetched_without_what_is_not_read_and_then_runs_by_its_name(latentkv, hub, cache):
    result = latentkv("pull", "org/tiny")
    assert result.exit_code == 0, result.stderr
    assert hub.fetched[-1] == hub.files.keys() - {"run.py", "pytorch_model.bin"}
    assert result.stdout.strip() == str(cache / "models--org--tiny" / "snapshots" / COMMIT)
    assert "deepseek_v3, 2 layers" in result.stderr and "weights and cache fit" in result.stderr
    assert "latentkv chat -m org/tiny" in result.stderr
    assert latentkv("generate", "The whale", "-m", "org/tiny", "-n", 2).exit_code == 0
    again = latentkv("pull", "org/tiny")
    assert again.exit_code == 0 and "0 B of them still to fetch" in again.stderr


def test_what_is_no_repository_is_refused(latentkv, hub, model_folder):
    assert "lies on this machine already" in latentkv("pull", model_folder).stderr
    assert "no folder a/b/c" in latentkv("pull", "a/b/c").stderr
    assert not hub.fetched


def test_of_a_model_that_is_not_known_the_config_alone_is_fetched(latentkv, hub):
    hub.files["config.json"] = json.dumps({"model_type": "something_new"}).encode()
    refused = latentkv("pull", "org/tiny")
    assert refused.exit_code == 2
    assert "org/tiny cannot run here: " in refused.stderr and "something_new" in refused.stderr
    assert "Its weights were not fetched; --force fetches them." in refused.stderr
    assert [names - {"config.json", "generation_config.json"} for names in hub.fetched] == [set()]
    assert latentkv("pull", "org/tiny", "--force").exit_code == 0
    assert "model.safetensors" in hub.fetched[-1]


def test_what_does_not_fit_into_memory_is_refused_and_what_fits_when_quantised_is_not(latentkv, hub, monkeypatch):
    from latentkv import plan

    whole = plan.weight_bytes(plan.load_config("org/tiny"), "fp32")
    for free, code, said in (
        (whole // 2, 0, "With --weights int8 they take"),
        (1000, 2, "even in int4, and RAM has 1,000 B free"),
    ):
        monkeypatch.setattr(plan, "machine_memory", lambda free=free: (plan.Memory("RAM", 10**9, free),))
        result = latentkv("pull", "org/tiny")
        assert result.exit_code == code, result.stderr
        assert said in result.stderr
    assert "model.safetensors" not in hub.fetched[-1]


def test_what_does_not_fit_onto_the_disk_is_refused(latentkv, hub, monkeypatch):
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda folder: Usage(free=100))
    refused = latentkv("pull", "org/tiny")
    assert refused.exit_code == 2
    assert "of disk, and" in refused.stderr and "has 100 B left (HF_HUB_CACHE names another folder)" in refused.stderr
    assert latentkv("pull", "org/tiny", "--force").exit_code == 0


def test_one_gguf_file_of_several_is_fetched_with_all_of_its_parts(latentkv, hub, cache, monkeypatch):
    hub.files = {f"big-0000{i}-of-00002.gguf": b"GGUF" for i in (1, 2)} | {"q4.gguf": b"GGUF", "README.md": b""}
    refused = latentkv("pull", "org/tiny")
    assert refused.exit_code == 2
    assert "org/tiny has no safetensors: choose by --file one of big-00001-of-00002.gguf" in refused.stderr
    assert (
        "org/tiny has no GGUF file q5.gguf: choose by --file one of"
        in latentkv("pull", "org/tiny", "--file", "q5.gguf").stderr
    )
    assert "has no GGUF file README.md" in latentkv("pull", "org/tiny", "--file", "README.md").stderr
    assert not hub.fetched
    result = latentkv("pull", "org/tiny", "--file", "big-00002-of-00002.gguf")
    assert result.exit_code == 0, result.stderr
    assert hub.fetched == [{"big-00001-of-00002.gguf", "big-00002-of-00002.gguf"}]
    assert result.stdout.strip().endswith("big-00001-of-00002.gguf")
    hub.sizes["q4.gguf"] = 1 << 60
    assert "its weights take 1,048,576.00 TiB, and RAM has" in latentkv("pull", "org/tiny", "--file", "q4.gguf").stderr


def test_what_the_hub_says_is_one_sentence(latentkv, cache, monkeypatch):
    refused = latentkv("pull", "org/none")
    assert refused.exit_code == 2
    assert "no repo org/none could be fetched: HF_HUB_OFFLINE is set" in refused.stderr


@pytest.fixture
def filled(cache, files, tmp_path):
    """A cache with two revisions of a model, a GGUF file, half a model, another kind of model, and a data set."""
    keep(cache, "org/tiny", files)
    keep(cache, "org/tiny", files, commit=OTHER, ref="v1")
    keep(cache, "org/gguf", {"q8.gguf": write_deepseek2(EMBEDDED_MODEL, tmp_path / "whole.gguf")})
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    keep(
        cache,
        "org/half",
        {"config.json": files["config.json"], "model.safetensors.index.json": json.dumps(index).encode()},
    )
    keep(cache, "org/vision", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"x"})
    keep(cache, "org/data", {"a.json": b"{}"})
    (cache / "models--org--data").rename(cache / "datasets--org--data")
    return cache


def test_models_that_can_be_run_are_listed_by_the_name_that_runs_them(latentkv, filled):
    result = latentkv("list", "--json")
    assert result.exit_code == 0, result.stderr
    found = {model["name"]: model for model in json.loads(result.stdout)}
    assert found.keys() == {"org/gguf", "org/tiny", "org/tiny@v1"}
    tiny = found["org/tiny"]
    assert (tiny["model_type"], tiny["weights"]) == ("deepseek_v3", "fp32")
    assert tiny["bytes"] > 10_000 and tiny["last_used"] > 1.7e9
    assert found["org/gguf"]["path"].endswith("q8.gguf")
    shown = latentkv("list")
    assert "org/tiny@v1" in shown.stdout and "q8.gguf" in shown.stdout
    assert "2 that cannot be run, or are not whole, left out" in shown.stderr


def test_an_empty_cache_says_how_to_fill_it(latentkv, cache):
    assert json.loads(latentkv("list", "--json").stdout) == []
    assert "latentkv pull org/name fetches one" in latentkv("list").stderr


def test_a_model_is_removed_once_it_is_confirmed_and_no_other_that_has_the_same_commit(latentkv, filled):
    repo = filled / "models--org--tiny"
    declined = latentkv("rm", "org/tiny", input="n\n")
    assert declined.exit_code == 1 and "nothing was removed" in declined.stderr
    assert latentkv("rm", "org/tiny").exit_code == 1  # nobody is there to be asked
    assert repo.is_dir()
    one = latentkv("rm", "org/tiny@v1", "--yes")
    assert one.exit_code == 0, one.stderr
    assert not (repo / "snapshots" / OTHER).exists() and (repo / "snapshots" / COMMIT / "config.json").exists()
    whole = latentkv("rm", "org/tiny", input="y\n")
    assert whole.exit_code == 0 and "removed org/tiny" in whole.stderr
    assert not repo.exists()
    assert (filled / "models--org--gguf").is_dir() and (filled / "datasets--org--data").is_dir()


@pytest.mark.parametrize("name", ["org/none", "org/tiny@v9", "org/data"])
def test_what_is_not_there_is_not_removed(latentkv, filled, name):
    refused = latentkv("rm", name, "--yes")
    assert refused.exit_code == 2
    assert f"holds no {name}: latentkv list shows what it holds" in refused.stderr
