"""Damaged files of every kind: each ends in the right tokens, or in one sentence.

A case is a number: the same number is the same damage. `-k` a target's name and `FIRST` narrow a search down.
"""

from __future__ import annotations

import base64
import faulthandler
import json
import resource
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # stored_models.py and text/ are shared by several folders
sys.path.insert(0, str(Path(__file__).parents[1] / "text"))

from damage import damaged_bytes, damaged_json, wrong_value
from folders_for_text_tests import BUILDERS, kimi
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from gguf_models import write_deepseek2
from latentkv import LLM, SamplingParams
from latentkv.convert.options import ConvertOptions
from latentkv.convert.report import ConversionReport
from latentkv.convert.run import convert_checkpoint
from latentkv.errors import LatentKVError
from latentkv.quantize.convert import quantize_checkpoint
from latentkv.server.settings import ServerSettings, read_keys
from latentkv.text.loading import load_tokenizer
from latentkv.train.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from stored_models import GQA, MLA, write_model

CASES, SLOW_CASES = 500, 20_000
CPU_SECONDS = 5
GROWTH = 96 << 20
"""Memory that a case may take whatever its file's size: libraries loaded at their first use, a model, its cache."""

TOKENS = [3, 4, 5, 6]
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
TEXT = "The whale's 12 tails, naïve 鲸鱼!\n"

# Keys that decide nothing about the first tokens of a tiny model.
HARMLESS = {"architectures", "bos_token_id", "eos_token_id", "initializer_range", "num_nextn_predict_layers"}
HARMLESS |= {"max_position_embeddings", "pad_token_id", "transformers_version", "dtype", "tie_word_embeddings"}
OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("rope_theta", "routed_scaling_factor", "rms_norm_eps", "latent_norm_eps", "scale_emb"), 1.0),
    **dict.fromkeys(("attention_bias", "mlp_bias", "norm_topk_prob", "rope_interleave", "use_sliding_window"), False),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "topk_method", "scoring_func", "hidden_act", "head_dim")),
    **dict.fromkeys(("layer_types", "mlp_layer_types", "moe_layer_freq", "sliding_window", "max_window_layers")),
    **dict.fromkeys(("pad_token_id", "torch_dtype", "quantization_config", "text_config", "foo_config")),
    **dict.fromkeys(("num_nextn_predict_layers", "index_topk", "use_mla", "scale_depth", "dim_model_base")),
    **dict.fromkeys(("original_max_position_embeddings", "partial_rotary_factor", "quantization", "model_type")),
}
ROPE: dict[str, Any] = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True, "attention_factor": None, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "llama_4_scaling_beta": 0.1},
}


class Files:
    """Undamaged folders, made once; `fresh` is a copy to damage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = {
            "mla": write_model(root / "mla", MLA),
            "gqa": write_model(root / "gqa", GQA),
            "packed": root / "packed",
            "floats": root / "floats",
        }
        shutil.copytree(self.models["gqa"], root / "wide")
        write_model(root / "wide", GQA | {"hidden_size": 64, "intermediate_size": 64})
        quantize_checkpoint(root / "wide", root / "packed", "int8")
        _as_float8(root / "wide", root / "floats")
        published = MLA | {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "norm_topk_prob": True, "rope_scaling": None}
        source = write_model(root / "published", published | {"routed_scaling_factor": 1.0, "q_lora_rank": None})
        (root / "gguf").mkdir()
        self.gguf = write_deepseek2(
            source, root / "gguf" / "small.gguf", lambda _, shape: Type.BF16 if shape[-1] % 32 else Type.Q8_0
        )
        self.gguf_header = min(int(tensor.data_offset) for tensor in GGUFReader(self.gguf).tensors)
        assert tokens_of(self.gguf)
        self.tokens = {name: tokens_of(folder) for name, folder in self.models.items()}
        self.tokenizers = [build(root / build.__name__) for build in (*BUILDERS, kimi)]
        self.encoded = {folder: load_tokenizer(folder).encode(TEXT, add_bos=False) for folder in self.tokenizers}
        self._number = 0

    def fresh(self, folder: Path) -> Path:
        self._number += 1
        copy = self.root / f"case-{self._number}"
        shutil.copytree(folder, copy)
        return copy


def _as_float8(source: Path, target: Path) -> None:
    """A copy as compressed-tensors stores float8 by channels."""
    shutil.copytree(source, target)
    path, tensors = next(target.glob("*.safetensors")), {}
    for name, weight in load_file(path).items():
        scale = weight.abs().amax(-1, keepdim=True) / 448
        coded = {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        tensors |= coded if "_proj.weight" in name else {name: weight}
    save_file(tensors, path)
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def tokens_of(folder: Path, **options: Any) -> list[int]:
    llm = LLM(folder, kv_cache_bytes=1 << 20, max_context=256, dtype="fp32", **options)
    try:
        return llm.generate(TOKENS, GREEDY)[0].token_ids
    finally:
        llm.close()


def fuzz_safetensors(random: Random, files: Files) -> None:
    name = random.choice(list(files.models))
    folder = files.fresh(files.models[name])
    path = next(folder.glob("*.safetensors"))
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, act = json.loads(data[8:start]), random.random()
    if act < 0.5:
        changed = damaged_json(random, header)
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[start:])
    elif act < 0.7:
        length = random.choice((0, 1, 7, start, len(data), 2**31, 2**62, 2**64 - 1))
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
    else:
        path.write_bytes(data[: random.randrange(len(data))])
    # A header that is accepted describes the same weights, unless two of one shape were exchanged: one change cannot.
    assert tokens_of(folder) == files.tokens[name]


def fuzz_gguf(random: Random, files: Files) -> None:
    folder = files.fresh(files.gguf.parent)
    path = folder / files.gguf.name
    data, act = bytearray(path.read_bytes()), random.random()
    header = files.gguf_header
    if act < 0.35:
        for _ in range(random.choice((1, 1, 2, 8))):
            data[random.randrange(header)] = random.randrange(256)
    elif act < 0.7:
        at = random.randrange(header - 8)
        size = random.choice((4, 8))
        data[at : at + size] = random.choice((0, 1, 2**31, 2**62, 2**64 - 1)).to_bytes(8, "little")[:size]
    elif act < 0.8:
        del data[random.randrange(len(data)) :]
    elif act < 0.9:
        at = random.randrange(header)
        del data[at : at + random.randrange(1, 40)]
    else:
        for _ in range(8):
            data[random.randrange(header, len(data))] = random.choice((0x7C, 0xFF, random.randrange(256)))
    path.write_bytes(data)
    # Numbers in a header and weights have no checksum: whatever is read must run.
    found = tokens_of(path)
    assert len(found) == 4 and all(token >= 0 for token in found)


def fuzz_config(random: Random, files: Files) -> None:
    name = random.choice(("mla", "gqa"))
    folder = files.fresh(files.models[name])
    path = folder / "config.json"
    config, act, key = json.loads(path.read_text()), random.random(), ""
    if act < 0.6:
        key = random.choice(list(config | OPTIONAL))
        config[key] = wrong_value(random)
        path.write_text(json.dumps(config))
    elif act < 0.85:
        rope = ROPE | {"rope_type": random.choice(("yarn", "linear", "longrope", "llama3", "dynamic"))}
        rope[random.choice(list(ROPE))] = wrong_value(random)
        path.write_text(json.dumps(config | {"rope_scaling": rope}))
    else:
        path.write_bytes(damaged_json(random, config))
    found = tokens_of(folder)
    assert len(found) == 4
    assert all(0 <= token < 61 for token in found)
    if key in HARMLESS:
        assert found == files.tokens[name]


def fuzz_generation_config(random: Random, files: Files) -> None:
    folder = files.fresh(files.models["gqa"])
    (folder / "generation_config.json").write_bytes(damaged_json(random, {"eos_token_id": [2, 3], "bos_token_id": 1}))
    assert tokens_of(folder) == files.tokens["gqa"]


def fuzz_quantization_config(random: Random, files: Files) -> None:
    kind = random.choice(("packed", "floats"))
    folder = files.fresh(files.models[kind])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    changed = damaged_json(random, config["quantization_config"])
    path.write_bytes(json.dumps(config | {"quantization_config": 0}).encode()[:-2] + changed + b"}")
    assert tokens_of(folder) == files.tokens[kind]


def fuzz_packed_tensors(random: Random, files: Files) -> None:
    kind = random.choice(("packed", "floats"))
    folder = files.fresh(files.models[kind])
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = random.choice([name for name in tensors if name.endswith(("_packed", "_scale", "_shape"))])
    act = random.randrange(5)
    if act == 0:
        del tensors[name]
    elif act == 1:
        tensors[name] = tensors[name].flatten()[: random.randrange(tensors[name].numel())].clone()
    elif act == 2:
        tensors[name] = tensors[name].reshape(-1, 1).clone()
    elif act == 3 and name.endswith("_shape"):
        tensors[name].fill_(random.choice((-1, 0, 1, 2**31, 2**62)))
    else:
        tensors[random.choice((name + "x", name.replace("_packed", "_zero_point")))] = tensors.pop(name)
    save_file(tensors, path)
    assert tokens_of(folder) == files.tokens[kind]


def fuzz_tokenizer(random: Random, files: Files) -> None:
    base = random.choice(files.tokenizers)
    folder = files.fresh(base)
    names = [path.name for path in sorted(folder.iterdir())]
    name = random.choice([*names, "special_tokens_map.json", "added_tokens.json", "chat_template.json"])
    path = folder / name
    if name.endswith(".json"):
        value = json.loads(path.read_text()) if path.exists() else {"bos_token": "<s>", "eos_token": {"content": "x"}}
        path.write_bytes(damaged_json(random, value))
    else:
        path.write_bytes(damaged_bytes(random, path.read_bytes()))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(TEXT, add_bos=False)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    tokenizer.decode(ids)
    tokenizer.encode(TEXT, add_bos=False, allow_special=True)
    tokenizer.decode(list(range(0, tokenizer.vocab_size, 7)), skip_special=False)
    assert tokenizer.longest_token >= 0
    assert tokenizer.adds_bos in (True, False)
    if name in ("chat_template.json", "special_tokens_map.json"):
        assert ids == files.encoded[base]


def fuzz_added_tokens(random: Random, files: Files) -> None:
    base = files.tokenizers[-1] if random.random() < 0.5 else random.choice(files.tokenizers)
    folder = files.fresh(base)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    ids = random.sample(["0", "5", "256", "300", "301", "9999", "5000000", "99999999999", "-1", "x", "١"], 2)
    entries = [{"content": random.choice(("", "a", "zz", " ", "\0", "<|x|>", wrong_value(random)))} for _ in ids]
    config["added_tokens_decoder"] = dict(zip(ids, entries, strict=True))
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size < 200_000
    tokenizer.decode(tokenizer.encode(TEXT, add_bos=False))


def fuzz_ranks(random: Random, files: Files) -> None:
    folder = files.fresh(files.tokenizers[-1])
    path = folder / "tiktoken.model"
    lines = path.read_bytes().splitlines()
    at = random.randrange(len(lines))
    token = random.choice((b"", b"=", b"YQ==", base64.b64encode(b"a" * 5000), b"\xff", b"zzz"))
    rank = random.choice((b"-1", b"0", b"5000000", b"9" * 5000, b"x", b"1.5", b"", str(at).encode()))
    lines[at] = token + b" " + rank
    path.write_bytes(b"\n".join(lines))
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode(TEXT, add_bos=False))


def fuzz_settings(random: Random, files: Files) -> None:
    path = files.root / "keys"
    path.write_bytes(damaged_bytes(random, b"# keys\nkey-number-one\nkey-number-two\n"))
    environment = random.choice((None, "", ",", "a,b", "\ud800" * 9, "key-number-three", "x" * 100_000, "ключ" * 4))
    keys = read_keys(path, environment)
    assert ServerSettings(api_keys=keys).api_keys == keys
    assert all(len(key) >= 8 and key.isascii() for key in keys)


def fuzz_pages(random: Random, files: Files) -> None:
    store = files.root / "store"
    prompt = TOKENS * 40
    if not store.exists():
        _complete(files, prompt, store)
    folder = files.fresh(store)
    folder.chmod(0o700)
    for path in random.sample(sorted(folder.iterdir()), 2):
        act = random.random()
        if act < 0.1:
            path.unlink()
            path.mkdir()
        elif act < 0.2:
            path.unlink()
            path.symlink_to(random.choice(("/dev/zero", "/nowhere", "secret")))
        elif path.suffix == ".json" and act < 0.6:
            path.write_bytes(damaged_json(random, json.loads(path.read_bytes())))
        else:
            path.write_bytes(damaged_bytes(random, path.read_bytes()))
    assert _complete(files, prompt, folder) == files.tokens.setdefault("pages", _complete(files, prompt, None))


def _complete(files: Files, prompt: list[int], store: Path | None) -> list[int]:
    llm = LLM(files.models["mla"], kv_cache_bytes=1 << 20, max_context=256, dtype="fp32", cache_dir=store)
    try:
        return llm.generate(prompt, GREEDY)[0].token_ids
    finally:
        llm.close()


def fuzz_quantize_state(random: Random, files: Files) -> None:
    target = files.fresh(files.models["packed"])
    path = target / "quantization.json"
    names = [path.name for path in target.iterdir() if path.suffix == ".json"]
    path = target / random.choice(sorted(names))
    path.write_bytes(damaged_json(random, json.loads(path.read_bytes())))
    report = quantize_checkpoint(files.root / "wide", target, "int8")
    assert report.as_json()


def fuzz_conversion_state(random: Random, files: Files) -> None:
    begun = files.root / "conversion"
    if not begun.exists():
        with suppress(KeyboardInterrupt):
            _convert(files, begun, on_progress=_interrupt)
    target = files.fresh(begun)
    path = random.choice(sorted(path for path in target.rglob("*") if path.is_file()))
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(damaged_json(random, json.loads(data)))
    else:
        path.write_bytes(data[: random.randrange(len(data))])
    report = _convert(files, target)
    assert len(report.layers) == GQA["num_hidden_layers"]
    assert len(tokens_of(target)) == 4


def _convert(files: Files, target: Path, **how: Any) -> ConversionReport:
    text = torch.arange(64).reshape(2, 32) % GQA["vocab_size"]
    return convert_checkpoint(files.models["gqa"], target, text, ConvertOptions(rank=8, rope_dim=4), **how)


def _interrupt(what: str, done: int, total: int) -> None:
    if (what, done) == ("convert", 1):
        raise KeyboardInterrupt


def fuzz_training_state(random: Random, files: Files) -> None:
    weights = {"a": load_file(next(files.models["gqa"].glob("*.safetensors")))["model.norm.weight"]}
    folder = save_checkpoint(files.fresh(files.models["gqa"]), 3, Checkpoint(weights, weights, {"step": 3, "x": [1]}))
    path = random.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    path.write_bytes(damaged_json(random, json.loads(data)) if path.suffix == ".json" else damaged_bytes(random, data))
    assert isinstance(load_checkpoint(folder).state, dict)


TARGETS: dict[str, tuple[Callable[[Random, Files], None], int]] = {
    "safetensors": (fuzz_safetensors, 70),
    "gguf": (fuzz_gguf, 50),
    "config": (fuzz_config, 100),
    "generation_config": (fuzz_generation_config, 15),
    "quantization_config": (fuzz_quantization_config, 40),
    "packed_tensors": (fuzz_packed_tensors, 25),
    "tokenizer": (fuzz_tokenizer, 80),
    "added_tokens": (fuzz_added_tokens, 30),
    "ranks": (fuzz_ranks, 20),
    "settings": (fuzz_settings, 15),
    "pages": (fuzz_pages, 25),
    "quantize_state": (fuzz_quantize_state, 10),
    "conversion_state": (fuzz_conversion_state, 10),
    "training_state": (fuzz_training_state, 10),
}
"""What is damaged, and how many of 500 cases are of it."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_end_in_the_right_tokens_or_in_one_sentence(files: Files, name: str) -> None:
    run_cases(name, TARGETS[name][1], files)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_by_the_thousand(files: Files, name: str) -> None:
    run_cases(name, TARGETS[name][1] * SLOW_CASES // CASES, files)


def test_the_shares_make_as_many_cases_as_are_promised() -> None:
    assert sum(share for _, share in TARGETS.values()) == CASES


def run_cases(name: str, cases: int, files: Files) -> None:
    failed: dict[str, str] = {}
    for case in range(cases):
        before, kept = set(files.root.iterdir()), peak_bytes()
        try:
            with limited():
                TARGETS[name][0](Random(zlib.crc32(f"{name}-{case}".encode())), files)
        except LatentKVError as error:
            if "\n" in str(error).strip() or not str(error):
                failed[f"{name}-{case}"] = f"no sentence: {error!r}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed[f"{name}-{case}"] = f"{_where(error)}: {error!r:.200}"
        new = set(files.root.iterdir()) - before
        size = sum(path.stat().st_size for each in new for path in each.rglob("*") if path.is_file())
        if peak_bytes() - kept > GROWTH + 2 * size:
            failed[f"{name}-{case} memory"] = f"{(peak_bytes() - kept) >> 20} MiB"
        for path in new:
            if path.name.startswith("case-"):
                shutil.rmtree(path)
    assert not failed, "\n".join(f"{case}: {how}" for case, how in failed.items())


def _where(error: BaseException) -> str:
    frames, trace = [], error.__traceback__
    while trace:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(frames[-4:])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class HangError(BaseException):
    """A case took too much of the processor."""


@contextmanager
def limited() -> Iterator[None]:
    """Ends a case after `CPU_SECONDS` of its own processor time; the process, if it only waits."""

    def give_up(*_: object) -> None:
        raise HangError(f"more than {CPU_SECONDS} s")

    previous = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    faulthandler.dump_traceback_later(300, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        faulthandler.cancel_dump_traceback_later()
