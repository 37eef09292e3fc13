import json

import huggingface_hub
import pytest
from huggingface_hub import constants

from latentkv.checkpoint import resolve_model
from latentkv.checkpoint.source import local_folder, model_name, resolve_config, resolve_folder, resolve_tokenizer
from latentkv.checkpoint.tensors import open_tensors
from latentkv.errors import CheckpointError, ConfigError


def test_a_local_folder_is_itself_and_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("network asked"))
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


def test_a_file_is_refused_for_its_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "~/nothing-here", ""])
def test_what_cannot_be_a_repository_is_a_missing_folder(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("network asked"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert resolve_model(name).is_dir()  # Path("") is the current folder
        return
    with pytest.raises(ConfigError, match="no folder"):
        resolve_model(name)


def test_a_repository_is_fetched_without_anything_that_runs(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("some-org/some.model") == tmp_path
    assert asked["repo_id"] == "some-org/some.model"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])
    assert "*.safetensors" in asked["allow_patterns"]


def test_offline_and_absent_says_both(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"no folder no-org/no-model, and no repo .* could be fetched: HF_HUB_OFFLINE"
    ):
        resolve_model("no-org/no-model")


def test_any_failure_of_the_download_is_one_sentence(monkeypatch):
    def snapshot_download(repo_id, **options):
        raise OSError("No space left on device\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"could be fetched: No space left on device$"):
        resolve_model("org/name")


COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/1": "c" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache folder with three revisions of org/name, and no network; {revision: its folder}."""
    repo = tmp_path / "hub" / "models--org--name"
    folders = {}
    for revision, commit in COMMITS.items():
        reference, snapshot = repo / "refs" / revision, repo / "snapshots" / commit
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        snapshot.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            blob = repo / "blobs" / f"{commit[0]}-{name}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_text(json.dumps({"revision": revision}))
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        folders[revision] = snapshot
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folders


@pytest.mark.parametrize("resolve", [resolve_model, resolve_config, resolve_tokenizer])
def test_a_repository_and_its_revisions_are_found_in_the_hubs_cache(hub, resolve):
    assert resolve("org/name") == hub["main"]
    assert resolve("org/name@main") == hub["main"]
    assert resolve("org/name@v2") == hub["v2"]
    assert resolve(f"org/name@{COMMITS['v2']}") == hub["v2"]
    assert resolve("org/name@refs/pr/1") == hub["refs/pr/1"]
    for missing in ("org/name@v3", "org/other", "org/name@" + "d" * 40):
        with pytest.raises(ConfigError, match=f"no repo {missing} could be fetched: HF_HUB_OFFLINE is set"):
            resolve(missing)


@pytest.mark.parametrize("name", ["org/name@", "org/name@a b", "org/name@../x/..", "@main", "org/name@a@b"])
def test_what_is_no_revision_is_a_missing_folder(hub, name):
    with pytest.raises(ConfigError, match=r"no folder .*org/name@revision|could be fetched"):
        resolve_model(name)


def test_a_config_file_stands_for_its_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "shape.json").write_text("{}")
    for resolve in (resolve_model, resolve_config, resolve_tokenizer, local_folder):
        assert resolve(tmp_path / "config.json") == resolve(tmp_path) == tmp_path
    assert resolve_config(tmp_path / "shape.json") == tmp_path / "shape.json"  # a shape needs no more than that
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(tmp_path / "shape.json")
    with pytest.raises(ConfigError, match=r"of which .* is to be the config"):
        resolve_model(tmp_path / "gone" / "config.json")


def test_a_gguf_file_is_a_model_but_no_folder_to_copy_or_change(tmp_path):
    file = tmp_path / "x.gguf"
    file.touch()
    for resolve in (resolve_model, resolve_config, resolve_tokenizer):
        assert resolve(file) == file
    assert model_name(file) == "x"
    with pytest.raises(ConfigError, match=r"GGUF file, which can be run and looked at; .* folder with safetensors"):
        resolve_folder(file)
    with pytest.raises(ConfigError, match="not changed where it lies"):
        local_folder(file)
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        open_tensors(file)
    for missing in ("y.gguf", tmp_path / "y-00001-of-00002.gguf"):
        with pytest.raises(ConfigError, match=r"no file .*y.*\.gguf: name an existing \.gguf file"):
            resolve_model(missing)


def test_files_and_links_that_are_no_model_are_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"link is a link to .*gone, which is not there"):
        resolve_model(tmp_path / "link")
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="no folder"):
            resolve_model(name)


def test_only_a_local_folder_is_changed_in_place(hub, tmp_path):
    with pytest.raises(ConfigError, match="no folder org/name: name the local folder"):
        local_folder("org/name")


def test_a_model_is_called_by_its_folder_or_repository(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").touch()
    monkeypatch.chdir(folder)
    for model in (folder, folder / "config.json", ".", "config.json", f"{folder}/"):
        assert model_name(model) == "tiny"
    assert model_name("org/name@v2") == "org/name@v2"
