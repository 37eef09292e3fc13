"""What can read a prompt and decode after it: our decoder, transformers, and other programs that speak JSON lines."""

from __future__ import annotations

import importlib
import json
import random
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from torch import Tensor

from latentkv import ops
from latentkv.engine.runner import PREFILL_CHUNK, Runner
from latentkv.engine.sequence import Sequence as TokenSequence
from latentkv.errors import RequestError
from latentkv.models.decoder import Decoder
from latentkv.state import PagedCache, Slot
from latentkv.state.spec import LatentSpec

_FILLED_PAGES = 32
"""Pages that random numbers are drawn for; the others repeat them, for what a cache holds costs no time."""


class ModelContender(Protocol):
    """What is cached before a measurement costs no time of it."""

    @property
    def most_sequences(self) -> int:
        """How many can decode together."""
        ...

    def prefill(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens and choose the next."""
        ...

    def decode(self, depth: int, tokens: int, sequences: int = 1) -> float:
        """Seconds of `tokens` steps of a token a sequence; the first finds `depth` tokens of each in the cache."""
        ...

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Those [V] that follow the last of `token_ids`, for comparison."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class OwnDecoder:
    """Our decoder over a paged cache that is filled once, its pages in no order, as after hours of serving.

    Args:
        decoder: the model.
        cache: made of its specs; all of its pages are taken, and the slots that sequences need.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        self.decoder, self.cache = decoder, cache
        self._runner = Runner(decoder, cache)
        self._pages = cache.pool.allocate(cache.num_pages)
        self._slots: list[Slot] = []
        fill_cache(cache)
        random.Random(0).shuffle(self._pages)

    def prefill(self, tokens: int) -> float:
        """As `ModelContender`, in the engine's own chunks."""
        sequence = self._sequence(random_tokens(self.decoder.config.vocab_size, tokens), tokens)
        started = time.perf_counter()
        hidden = self._read(sequence)
        while sequence.num_uncached:
            hidden = self._read(sequence)
        int(self._runner.logits(hidden).argmax())
        return time.perf_counter() - started

    @property
    def most_sequences(self) -> int:
        """As `ModelContender`."""
        return self.cache.slots.num_slots if self.cache.slots else self.cache.num_pages

    def decode(self, depth: int, tokens: int, sequences: int = 1) -> float:
        """As `ModelContender`, greedily."""
        together = [
            self._sequence([0] * (depth + 1), depth + tokens, number, num_cached=depth) for number in range(sequences)
        ]
        started = time.perf_counter()
        for _ in range(tokens):
            hidden = self._runner.read(together, [1] * sequences)
            for sequence, token in zip(together, self._runner.logits(hidden).argmax(-1).tolist(), strict=True):
                sequence.tokens.append(token)
        return time.perf_counter() - started

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """As `ModelContender`."""
        sequence = self._sequence(list(token_ids), len(token_ids))
        return self._runner.logits(self._read(sequence))[0]

    def close(self) -> None:
        """As `ModelContender`."""
        self.cache.pool.free(self._pages)
        for slot in self._slots:
            if self.cache.slots:
                self.cache.slots.free(slot)

    def _read(self, sequence: TokenSequence) -> Tensor:
        """Read the next tokens, a chunk at most; the hidden state [1, D] of the last."""
        return self._runner.read([sequence], [min(sequence.num_uncached, PREFILL_CHUNK)])[-1:]

    def _sequence(self, token_ids: list[int], room: int, number: int = 0, *, num_cached: int = 0) -> TokenSequence:
        """One of several, with pages for `room` tokens; its recurrent state has taken in as much as is cached."""
        slot, pages = None, self.cache.pages_for(room)
        if self.cache.slots:
            while len(self._slots) <= number:
                self._slots.append(self.cache.slots.allocate())
            slot = self._slots[number]
            slot.num_tokens = num_cached
        return TokenSequence(number, token_ids, self._pages[number * pages : (number + 1) * pages], slot, num_cached)


def fill_cache(cache: PagedCache) -> None:
    """Have plausible numbers in every page of every layer."""
    generator = torch.Generator().manual_seed(0)
    count = min(_FILLED_PAGES, cache.num_pages)
    for index, layer in enumerate(cache.specs):
        if layer.tokens is None:
            continue
        spec, pages = layer.tokens, cache.view(index).pages
        if isinstance(spec, LatentSpec):
            drawn = torch.randn(count * cache.page_size, spec.latent_dim + spec.rope_dim, generator=generator)
            c, k_rope = drawn.split([spec.latent_dim, spec.rope_dim], dim=-1)
            ops.write_latents(pages, torch.arange(len(drawn)), c, k_rope, kv_format=spec.format)
        else:
            pages[:count].normal_(generator=generator)
        for first in range(count, len(pages), count):
            pages[first : first + count] = pages[: min(count, len(pages) - first)]


class TransformersModel:
    """A checkpoint in transformers, bf16, with its own cache.

    Args:
        folder: the checkpoint.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        self._new_cache = transformers.DynamicCache
        # Said, so that a checkpoint with code of its own is refused: by default the terminal is asked.
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(folder, dtype=torch.bfloat16, trust_remote_code=False).eval()
        self._config = self._model.config
        self._filled: tuple[int, Any] = (0, None)
        self.most_sequences = 1

    def prefill(self, tokens: int) -> float:
        """As `ModelContender`."""
        ids = random_tokens(self._config.vocab_size, tokens)
        started = time.perf_counter()
        int(self._step(ids, self._new_cache()).argmax())
        return time.perf_counter() - started

    def decode(self, depth: int, tokens: int, sequences: int = 1) -> float:
        """As `ModelContender`, greedily, of one sequence."""
        cache = self._cache(depth)
        token = 0
        started = time.perf_counter()
        for _ in range(tokens):
            token = int(self._step([token], cache).argmax())
        return time.perf_counter() - started

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """As `ModelContender`."""
        return self._step(token_ids, self._new_cache())

    def close(self) -> None:
        """As `ModelContender`."""
        del self._model, self._filled

    def _step(self, token_ids: Sequence[int], cache: Any) -> Tensor:
        given = torch.tensor([list(token_ids)])
        return self._model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()

    def _cache(self, depth: int) -> Any:
        """A cache of `depth` tokens: made once, cropped to them afterwards."""
        if depth == 0:
            return self._new_cache()
        filled, cache = self._filled
        if filled != depth:
            cache = self._new_cache()
            for layer in range(self._config.num_hidden_layers):
                parts = (
                    torch.randn(1, 1, depth, n) for n in (self._config.kv_lora_rank, self._config.qk_rope_head_dim)
                )
                cache.update(*(part.bfloat16() for part in parts), layer)
            self._filled = (depth, cache)
        cache.crop(min(0, depth - cache.get_seq_length()))
        return cache


class OtherProgram:
    """A program that answers a line of JSON with a line of JSON; `benchmarks/llama_cpp/peer.py` tells the requests.

    Args:
        command: that starts it, as typed in a shell.

    Raises:
        RequestError: it does not start, or ends before it has answered.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see close)
        try:
            self._process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
            )
        except OSError as error:
            raise RequestError(f"The peer {command!r} cannot be started: {error.strerror}.") from error
        self._requests, self._answers = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        self.introduction = self._answer()
        self.name = str(self.introduction["name"])
        self.most_sequences = int(self.introduction.get("most_sequences", 1))

    def prefill(self, tokens: int) -> float:
        """As `ModelContender`."""
        return self._ask({"op": "prefill", "tokens": tokens})["seconds"]

    def decode(self, depth: int, tokens: int, sequences: int = 1) -> float:
        """As `ModelContender`."""
        together = {} if sequences == 1 else {"sequences": sequences}
        return self._ask({"op": "decode", "depth": depth, "tokens": tokens, **together})["seconds"]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """As `ModelContender`."""
        return torch.tensor(self._ask({"op": "logits", "token_ids": list(token_ids)})["logits"])

    def close(self) -> None:
        """As `ModelContender`."""
        self._requests.close()
        self._process.wait()
        self._answers.close()
        self._errors.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it has ended: that there is no answer will say so
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._errors.seek(0)
            last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
            raise RequestError(f"The peer {self._command!r} ended: {last[0] if last else 'it said nothing'}.")
        return json.loads(line)


def random_tokens(vocab_size: int, count: int) -> list[int]:
    """Another prompt every time."""
    return random.choices(range(vocab_size), k=count)
