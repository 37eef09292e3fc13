"""`Adapter`: a LoRA adapter (arXiv 2106.09685) as PEFT writes it, a folder: what it adds to which module's weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from latentkv.checkpoint.locate import open_file
from latentkv.errors import CheckpointError
from latentkv.json_files import read_json
from latentkv.libraries import errors_as
from latentkv.weights.files.dtypes import STORED
from latentkv.weights.files.patterns import match_patterns

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MERGE = "merge it with peft (`merge_and_unload`, then `save_pretrained`), and run the result without an adapter"
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
"""In the name of a weight that PEFT writes beside what is added to it: of an embedding, and of an output head then."""
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(?(kind)|\.weight)")
_OTHER_PART = re.compile(r"\.lora_\w+")

_CHANGES = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "megatron_config", "arrow_config", "kasa_config"),
    "monteclora_config",
)
"""Keys of a config that make something else than W + s B A of the weights."""

_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`, what leaves the model's own weights as they are when training begins."""


@dataclass(frozen=True)
class Update:
    """What is added to a weight W [O, I]: s B A, with A [r, I] and B [O, r]; of an embedding [V, D] its transpose.

    Attributes:
        a: name of A in the file.
        b: of B.
        scale: s.
        transposed: whether W is an embedding.
        shape: of W.
    """

    a: str
    b: str
    scale: float
    transposed: bool
    shape: tuple[int, ...]


def adapter_digest(folder: Path) -> str:
    """What tells an adapter from others: a short digest of its files."""
    return sha256(
        b"".join(sha256((folder / name).read_bytes()).digest() for name in (WEIGHTS_FILE, CONFIG_FILE))
    ).hexdigest()[:12]


class Adapter:
    """The folder of an adapter, its config and header checked; weights are read one by one.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Attributes:
        updates: by the name of the weight that they change, as the adapter calls it.
        replacements: likewise, the names of whole tensors in the file that stand for the model's own, to which updates
            are added (`modules_to_save`, and what PEFT writes beside an embedding's update).

    Raises:
        CheckpointError: it is no such folder, is damaged, or changes weights in a way that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: name the folder of a LoRA adapter, with {CONFIG_FILE}.")
        if not (folder / WEIGHTS_FILE).is_file() and (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{folder} holds its weights in a pickle, which runs what it says: convert it to {WEIGHTS_FILE}."
            )
        self._config = read_json(folder / CONFIG_FILE, CheckpointError)
        self._require_plain()
        self._handle: Any = open_file(folder / WEIGHTS_FILE)
        self._shapes = {str(name): self._shape(str(name)) for name in self._handle.keys()}  # noqa: SIM118
        sides: dict[tuple[str, bool], dict[str, str]] = {}
        self.replacements: dict[str, str] = {}
        for name in self._shapes:
            known_as = name.removeprefix(_PREFIX)
            if part := _PART.fullmatch(known_as):
                sides.setdefault((part["module"], bool(part["kind"])), {})[part["side"]] = name
            elif _OTHER_PART.search(known_as):
                raise self._refused(f"a {name}")
            else:
                self.replacements[known_as.replace(_BASE_LAYER, ".")] = name
        self._require_saved_modules()
        scales = self._scales(
            {module: self._shapes[each["A"]][0] for (module, _), each in sides.items() if "A" in each}
        )
        self.updates: dict[str, Update] = {}
        for (module, transposed), each in sides.items():
            for side in "AB":
                if side not in each:
                    raise CheckpointError(f"{folder / WEIGHTS_FILE} has no lora_{side} of {module}: fetch it again.")
            self.updates[f"{module}.weight"] = self._update(module, each["A"], each["B"], scales[module], transposed)
        if not self.updates and not self.replacements:
            raise CheckpointError(f"{folder / WEIGHTS_FILE} changes no weight: name another adapter.")

    @property
    def files(self) -> tuple[Path, ...]:
        """What its numbers depend on."""
        return self.folder / WEIGHTS_FILE, self.folder / CONFIG_FILE

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the file."""
        return self._shapes[name]

    def delta(self, update: Update) -> Tensor:
        """What is added, in float32.

        Raises:
            CheckpointError: it cannot be read, or is not finite.
        """
        product = self.read(update.b) @ self.read(update.a)
        return (product.T if update.transposed else product) * update.scale

    def read(self, name: str) -> Tensor:
        """A tensor of the file in float32.

        Raises:
            CheckpointError: it cannot be read, or is not finite.
        """
        with errors_as(CheckpointError, f"tensor {name} of {self.folder / WEIGHTS_FILE} cannot be read"):
            tensor = cast(Tensor, self._handle.get_tensor(name)).to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name} of {self.folder} holds NaN or infinite values: fetch it again.")
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        view = self._handle.get_slice(name)
        shape, dtype = tuple(view.get_shape()), str(view.get_dtype())
        if dtype not in STORED or not STORED[dtype].is_float:
            raise CheckpointError(f"tensor {name} of {self.folder} is stored as {dtype}: floating point is needed.")
        if not shape:
            raise CheckpointError(f"tensor {name} of {self.folder} is a single number: fetch the adapter again.")
        return shape

    def _update(self, module: str, a: str, b: str, scale: float, transposed: bool) -> Update:
        of_a, of_b = self._shapes[a], self._shapes[b]
        if len(of_a) != 2 or len(of_b) != 2 or of_a[0] != of_b[1]:
            raise CheckpointError(
                f"{self.folder}: lora_A {list(of_a)} and lora_B {list(of_b)} of {module} do not fit each other: fetch "
                "the adapter again."
            )
        shape = (of_a[1], of_b[0]) if transposed else (of_b[0], of_a[1])
        return Update(a, b, scale, transposed, shape)

    def _scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """By module, what its product is multiplied by.

        Args:
            ranks: of the matrices in the file.
        """
        own_rank, own_alpha = self._number("r", self._config.get("r", 8)), self._config.get("lora_alpha", 8)
        all_ranks, alphas = self._by_pattern("rank_pattern", ranks), self._by_pattern("alpha_pattern", ranks)
        scales: dict[str, float] = {}
        for module, rank in ranks.items():
            said = all_ranks.get(module, own_rank)
            if said != rank or rank < 1:
                raise CheckpointError(
                    f"{self.folder}: {CONFIG_FILE} gives {module} the rank {said:g}, and its lora_A has {rank}: the "
                    "two files belong to different adapters."
                )
            alpha = alphas.get(module, self._number("lora_alpha", own_alpha))
            scales[module] = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return scales

    def _by_pattern(self, key: str, modules: Mapping[str, int]) -> dict[str, float]:
        """What a config gives some modules by a pattern of their names; the first that fits counts, as in PEFT."""
        given = self._config.get(key) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"{self.folder / CONFIG_FILE}: {key} is no object: fetch it again.")
        numbers = {name: self._number(key, value) for name, value in cast("dict[str, Any]", given).items()}
        # As PEFT matches them: the end of a name, from a dot on or from its beginning.
        patterns = {rf"(.*\.)?({name})$": number for name, number in numbers.items()}
        fits = match_patterns(patterns, sorted(modules), f"{self.folder / CONFIG_FILE}: {key}")
        found: dict[str, float] = {}
        for pattern, number in patterns.items():
            for module in fits[pattern]:
                found.setdefault(module, number)
        return found

    def _number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float):
            raise CheckpointError(f"{self.folder / CONFIG_FILE}: {key} has {value!r} for a number: fetch it again.")
        return value

    def _require_plain(self) -> None:
        config = self._config
        if (kind := config.get("peft_type")) != "LORA":
            raise CheckpointError(
                f"{self.folder} holds an adapter of the kind {kind!r}, and LORA alone is merged here."
            )
        if (bias := config.get("bias") or "none") != "none":
            raise self._refused(f"bias {bias!r}")
        if key := next((key for key in _CHANGES if config.get(key)), None):
            raise self._refused(key)
        if (begun := config.get("init_lora_weights", True)) not in _PLAIN_BEGINNINGS:
            raise self._refused(f"init_lora_weights {begun!r}, which changes the model's own weights")

    def _require_saved_modules(self) -> None:
        """That each of `modules_to_save` is in the file."""
        wanted = self._config.get("modules_to_save") or []
        for module in wanted if isinstance(wanted, list) else [wanted]:
            if not any(f".{name}".rpartition(".")[0].endswith(f".{module}") for name in self.replacements):
                raise CheckpointError(
                    f"{self.folder}: modules_to_save names {module!r}, which {WEIGHTS_FILE} lacks: fetch it again."
                )

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder} has {what}, which is not supported here: {_MERGE}.")
