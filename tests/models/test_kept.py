"""Weights mapped from a file are those that a start packs anew, of every family and format; nothing stale is mapped."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import FIRST_CASES, KINDS, Case, slow_but
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from test_packing import checkpoint, logits

from gguf_models import write_deepseek2
from latentkv import kernels
from latentkv.checkpoint.reader import CheckpointReader
from latentkv.checkpoint.tensors import open_tensors
from latentkv.llm_options import embedded_model
from latentkv.models import kept
from latentkv.models.decoder import Decoder
from latentkv.models.kept import load_kept
from latentkv.models.loading import load_model
from latentkv.models.packing import Packing
from latentkv.models.stored_config import open_checkpoint
from latentkv.weights.formats import INT4, INT8
from latentkv.weights.packed_file import PackedFile
from latentkv.weights.packed_folder import PackedFolder

pytestmark = pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")

BF16 = Packing()
by_kind = pytest.mark.parametrize("case", slow_but(FIRST_CASES, KINDS), ids=lambda case: case.name)


@pytest.fixture
def folder(tmp_path: Path) -> PackedFolder:
    return PackedFolder(tmp_path / "packed")


def load(
    model: Path, folder: PackedFolder, packing: Packing = BF16, dtype: torch.dtype | None = None
) -> tuple[Decoder, PackedFile]:
    found = load_kept(*open_checkpoint(model), folder, packing, dtype=dtype, max_context=None)
    assert found is not None
    return found


def assert_same(actual: Decoder, expected: Decoder) -> None:
    assert torch.equal(logits(actual), logits(expected))
    state = expected.state_dict()
    assert list(actual.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in actual.state_dict().items())
    assert [name for name, _ in actual.named_modules()] == [name for name, _ in expected.named_modules()]


@by_kind
def test_mapped_weights_are_those_that_are_packed_anew(case: Case, folder: PackedFolder) -> None:
    model = checkpoint(case.name)
    expected = load_model(model, packing=Packing())
    first, _ = load(model, folder)
    assert_same(first, expected)
    written = [file.path.stat().st_ino for file in folder.files()]
    second, _ = load(model, folder)
    assert_same(second, expected)
    assert [file.path.stat().st_ino for file in folder.files()] == written


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize("packing", [Packing(compact=True), Packing(INT8), Packing(INT4), Packing(INT4, 32)], ids=str)
@pytest.mark.parametrize("name", ["v3", "longcat", "hy4", "llama-gqa"])
def test_so_are_they_in_every_format(name: str, packing: Packing, folder: PackedFolder) -> None:
    model = checkpoint(name)
    expected = load_model(model, packing=packing, dtype=torch.bfloat16)
    for _ in range(2):
        assert_same(load(model, folder, packing, torch.bfloat16)[0], expected)
    assert len(folder.files()) == 1


def test_so_are_they_from_gguf(folder: PackedFolder, tmp_path: Path) -> None:
    kinds = itertools.cycle([Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.BF16])
    model = write_deepseek2(
        embedded_model(), tmp_path / "model.gguf", lambda name, shape: Type.F16 if shape[-1] % 32 else next(kinds)
    )
    expected = load_model(model, packing=Packing(), dtype=torch.bfloat16)
    for _ in range(2):
        assert_same(load(model, folder, dtype=torch.bfloat16)[0], expected)
    assert len(folder.files()) == 1


def test_nothing_is_packed_at_a_second_start(folder: PackedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    load(checkpoint("v3"), folder)
    for name in ("_write", "match_decoder"):
        monkeypatch.setattr(kept, name, partial(pytest.fail, f"{name} is called"))
    load(checkpoint("v3"), folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("v3"), tmp_path / "model"))


def test_a_change_of_the_weights_is_noticed_though_size_and_time_stay(model: Path, folder: PackedFolder) -> None:
    before = load(model, folder)[0]
    stored, state = model / "model.safetensors", (model / "model.safetensors").stat()
    content = load_file(stored)
    content["model.norm.weight"][0] += 1
    save_file(content, stored, metadata={"format": "pt"})
    os.utime(stored, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert stored.stat().st_size == state.st_size
    after = load(model, folder)[0]
    assert after.model.norm.weight[0] == before.model.norm.weight[0] + 1
    assert_same(after, load_model(model, packing=Packing()))


def test_a_change_of_the_config_is_noticed(model: Path, folder: PackedFolder) -> None:
    load(model, folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    assert_same(load(model, folder)[0], load_model(model, packing=Packing()))


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": Packing(compact=True)},
        {"packing": Packing(INT8)},
        {"packing": Packing(INT4)},
        {"packing": Packing(INT4, 64)},
        {"dtype": torch.float32},
        {"identity": "other files"},
        {"backend": "portable"},
        {"torch": "2.99.0"},
        {"program": b"other"},
        {"config": "v2-groups"},
    ],
    ids=str,
)
def test_whatever_packed_weights_depend_on_has_a_key_of_its_own(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(
        packing: Packing = BF16, dtype: torch.dtype = torch.bfloat16, identity: str = "files", config: str = "v3"
    ) -> bytes:
        return kept.kept_key(open_checkpoint(checkpoint(config))[0], identity, packing, dtype)

    before = key()
    assert key() == before
    if "backend" in changes:
        with kernels.use_backend(changes["backend"]):
            assert key() != before
    elif "torch" in changes:
        monkeypatch.setattr(torch, "__version__", changes["torch"])
        assert key() != before
    elif "program" in changes:
        monkeypatch.setattr(kept, "program_digest", lambda: changes["program"])
        assert key() != before
    else:
        assert key(**changes) != before


def test_weights_that_change_while_they_are_read_are_not_kept(
    model: Path, folder: PackedFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_part = kept.load_part

    def change(*given: Any) -> None:
        load_part(*given)
        (model / "model.safetensors").touch()

    monkeypatch.setattr(kept, "load_part", change)
    assert load_kept(*open_checkpoint(model), folder, Packing(), dtype=None, max_context=None) is None
    assert list(folder.path.iterdir()) == []
    assert "not kept" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "emptied", "table", "weights", "foreign", "swapped"])
def test_a_damaged_file_is_packed_anew_and_replaced(
    damage: str, model: Path, folder: PackedFolder, caplog: pytest.LogCaptureFixture
) -> None:
    load(model, folder)
    path = folder.files()[0].path
    content = path.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "table": content[:-5] + b"    }",
        "weights": content[:4096] + bytes(range(256)) + content[4352:],
        "foreign": b"something else" * 1000,
    }
    if damage == "swapped":  # a whole file, of another model
        load(checkpoint("v2-groups"), folder)
        other = next(file.path for file in folder.files() if file.path != path)
        other.replace(path)
    else:
        path.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        assert_same(load(model, folder)[0], load_model(model, packing=Packing()))
    assert sum("packed anew" in record.message for record in caplog.records) == 1
    caplog.clear()
    assert_same(load(model, folder)[0], load_model(model, packing=Packing()))
    assert not caplog.records


def test_a_file_that_misses_a_weight_is_packed_anew(
    model: Path, folder: PackedFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole and of the right key, as one that another program wrote might be."""
    config, reader = open_checkpoint(model)
    key = kept.kept_key(config, kept._identity(reader), Packing(), torch.float32)
    with folder.writing(key) as writer:
        writer.add("model.norm.weight", torch.zeros(48))
    assert_same(load(model, folder, dtype=torch.float32)[0], load_model(model, packing=Packing()))
    assert "packed anew" in caplog.text


def test_a_model_that_does_not_fit_is_not_even_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept, "_write", partial(pytest.fail, "it is begun"))
    small = PackedFolder(tmp_path / "small", 1000)
    assert load_kept(*open_checkpoint(model), small, Packing(), dtype=None, max_context=None) is None
    assert "may hold 1,000" in caplog.text


def test_a_full_disk_is_one_warning(
    model: Path, folder: PackedFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from latentkv.weights.packed_file import PackedFileWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PackedFileWriter, "add", full)
    assert load_kept(*open_checkpoint(model), folder, Packing(), dtype=None, max_context=None) is None
    assert [record.message for record in caplog.records] == [
        f"The packed weights of {model} are not kept for the next start: No space left on device."
    ]
    assert list(folder.path.iterdir()) == []


def test_the_files_are_looked_at_before_they_are_opened_to_be_read(
    model: Path, folder: PackedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the reader that was given has open may be a file that had the name before."""
    config, reader = open_checkpoint(model)
    opened: list[Path] = []
    monkeypatch.setattr(CheckpointReader, "reopened", lambda self: (opened.append(self.folder), open_tensors(model))[1])
    load_kept(config, reader, folder, Packing(), dtype=None, max_context=None)
    assert opened == [model]
