"""Converting a model that is far larger than what it may take of memory, and killing it on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentkv.checkpoint.shard import write_shard
from latentkv.llm_options import EMBEDDED_MODEL

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
SIZES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
LAYER_BYTES = 2 * sum(rows * columns for rows, columns in SIZES.values()) + 2 * 2 * 2048
MOST = int(1.5 * LAYER_BYTES) + 10**9


def write_source(folder: Path) -> Path:
    """A random Llama of 32 layers and 4.2 GB."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def values(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            ones = len(shape) == 1
            yield name, (torch.ones(shape) if ones else torch.randn(shape, generator=generator) * 0.02).bfloat16()

    files = {"model-outer.safetensors": {f"{name}.weight": (32000, 2048) for name in ("model.embed_tokens", "lm_head")}}
    files["model-outer.safetensors"]["model.norm.weight"] = (2048,)
    for index in range(32):
        prefix = f"model.layers.{index}."
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": shape for name, shape in SIZES.items()}
        shapes |= {f"{prefix}{name}.weight": (2048,) for name in ("input_layernorm", "post_attention_layernorm")}
        files[f"model-{index}.safetensors"] = shapes
    for file, shapes in files.items():
        write_shard(folder / file, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}, values(shapes))
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED_MODEL / name, folder / name)
    return folder


def convert(source: Path, target: Path, text: Path, *, kill_after_layer: int | None = None) -> int:
    """Convert in a process of its own, which may be killed; the most bytes of anonymous memory that it took."""
    command = ["convert", source, target, "--rank", 448, "--rope-dim", 64, "--calibrate", text, "--threads", 1]
    command += ["--sequences", 8, "--length", 128]
    program = "from latentkv.cli.app import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, command)])
    most = 0
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        if kill_after_layer is not None and (target / f".converting/layer-{kill_after_layer}.json").exists():
            process.kill()
            process.wait()
            return most
        time.sleep(0.02)
    assert process.returncode == 0
    return most


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def digests(folder: Path) -> dict[str, str]:
    """Of every file of a model but the report, which says how long things took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.suffix == ".safetensors" or path.name == "config.json"):
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which is not here")
def test_four_gigabytes_convert_in_one_and_a_half_layers_and_a_gigabyte_and_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path,
):
    source, text = write_source(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("The whale swam on, and the harpooner watched it from the mast.\n" * 400)
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 4e9
    most = convert(source, tmp_path / "whole", text)
    print(f"most anonymous memory: {most / 1e9:.3f} GB of {MOST / 1e9:.3f} GB")
    assert most <= MOST
    convert(source, tmp_path / "killed", text, kill_after_layer=10)
    assert not (tmp_path / "killed" / "config.json").exists()
    convert(source, tmp_path / "killed", text)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) == 34
