"""What a layer keeps of a text: the one formula for bytes, and the memory that is allocated by it.

The allocator, `latentkv plan`, the benchmarks and the plots all call it: a byte predicted is a byte allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latentkv.errors import CacheError
from latentkv.ops.index_keys import SCALE_BYTES, can_be_int8
from latentkv.ops.kv_formats import FLOAT_DTYPES, KVFormat, latent_token_bytes, storage_dtype
from latentkv.state.recurrent import RecurrentSpec, RecurrentState

__all__ = [
    "PAGE_SIZE",
    "IndexSpec",
    "KVFormat",
    "KeyValueSpec",
    "LastStateSpec",
    "LatentSpec",
    "LayerSpec",
    "LayerState",
    "RingSpec",
    "Zeros",
    "bytes_per_token",
    "common_page_bytes",
    "mha_bytes_per_token",
    "page_bytes",
    "sequence_bytes",
]

PAGE_SIZE = 64
"""Tokens a page."""


class Zeros(Protocol):
    """What gives zeroed memory: `torch.zeros`, or memory that processes share (`state.common`)."""

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """A zeroed tensor of this size."""
        ...


@dataclass(frozen=True)
class LatentSpec:
    """The latents `[c ; k_rope]` of MLA: latent_dim + rope_dim numbers per token (arXiv 2405.04434, 2.1.2).

    `format` is how they are stored; a token's stride is padded to 16 bytes, and the padding is counted.
    """

    latent_dim: int
    rope_dim: int
    format: KVFormat = "bf16"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, padding included."""
        return latent_token_bytes(self.format, self.latent_dim, self.rope_dim)

    def allocate(self, num_pages: int, page_size: int, zeros: Zeros = torch.zeros) -> Tensor:
        """Zeroed pages [N, P, row].

        A row is `token_bytes` long: L + R floats and its padding, or quantised bytes (`ops.kv_formats`).
        """
        dtype = storage_dtype(self.format)
        return zeros((num_pages, page_size, self.token_bytes // dtype.itemsize), dtype=dtype)


@dataclass(frozen=True)
class KeyValueSpec:
    """Keys and values of GQA (MHA and MQA too): 2 x num_kv_heads x head_dim numbers per token.

    Raises:
        CacheError: `format` is quantised; only latents are stored quantised.
    """

    num_kv_heads: int
    head_dim: int
    format: KVFormat = "bf16"

    def __post_init__(self) -> None:
        if self.format not in FLOAT_DTYPES:
            raise CacheError(
                f"a key/value cache cannot be stored as {self.format}: "
                f"choose one of {', '.join(FLOAT_DTYPES)}, or a model with latent attention"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return 2 * self.num_kv_heads * self.head_dim * FLOAT_DTYPES[self.format].itemsize

    def allocate(self, num_pages: int, page_size: int, zeros: Zeros = torch.zeros) -> Tensor:
        """Zeroed pages [N, P, 2, G, D] (index 0 of the 2 is the key)."""
        shape = (num_pages, page_size, 2, self.num_kv_heads, self.head_dim)
        return zeros(shape, dtype=FLOAT_DTYPES[self.format])


@dataclass(frozen=True)
class IndexSpec:
    """The keys by which tokens are selected (DeepSeek-V3.2, arXiv 2512.02556): dim numbers of `dtype` per token.

    int8 keys have a float32 scale each (`ops.index_keys`). Where `pool` is more than 1 a key stands for so many tokens
    (GLM-5.3-Flash).

    Raises:
        CacheError: int8 keys whose `dim` is no power of two.
    """

    dim: int
    dtype: torch.dtype
    pool: int = 1

    def __post_init__(self) -> None:
        if self.dtype == torch.int8 and not can_be_int8(self.dim):
            raise CacheError(
                f"index keys of {self.dim} numbers cannot be stored in 8 bits, only those of a power of two: "
                "choose a cache in bf16, fp16 or fp32"
            )

    @property
    def row(self) -> int:
        """Numbers of `dtype` that a key takes."""
        return self.dim + (SCALE_BYTES if self.dtype == torch.int8 else 0)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: its key's, or its share of its pool's, rounded up."""
        return -(-self.row * self.dtype.itemsize // self.pool)

    def page_bytes(self, page_size: int) -> int:
        """Bytes of the keys of a page of `page_size` tokens."""
        return page_size // self.pool * self.row * self.dtype.itemsize

    def allocate(self, num_pages: int, page_size: int, zeros: Zeros = torch.zeros) -> Tensor:
        """Zeroed keys [N, P / pool, row].

        Raises:
            CacheError: a page is no whole number of pools.
        """
        if page_size % self.pool:
            raise CacheError(
                f"pages of {page_size} tokens hold no whole number of pools of {self.pool}: "
                "make pages of a multiple of it"
            )
        return zeros((num_pages, page_size // self.pool, self.row), dtype=self.dtype)


@dataclass(frozen=True)
class RingSpec:
    """What waits of a page's last tokens until their pool is whole, of each a key and a gate of `dim` numbers.

    It is of no use once the page is full, and so it is in no file.

    Attributes:
        dim: of a key.
        rows: tokens, as many as a pool has and a draft may add.
        dtype: of the numbers.
    """

    dim: int
    rows: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.rows * 2 * self.dim * self.dtype.itemsize

    def allocate(self, num_pages: int, device: torch.device | str = "cpu") -> Tensor:
        """Zeroed rings [N, rows, 2 dim]."""
        return torch.zeros(num_pages, self.rows, 2 * self.dim, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class LastStateSpec:
    """The model's hidden state of each page's last token: hidden_size numbers of `dtype` a page."""

    hidden_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.hidden_size * self.dtype.itemsize

    def allocate(self, num_pages: int, device: torch.device | str = "cpu") -> Tensor:
        """Zeroed states [N, hidden_size]."""
        return torch.zeros(num_pages, self.hidden_size, dtype=self.dtype, device=device)


class LayerState(NamedTuple):
    """The memory of one layer, to be read and written in place.

    Attributes:
        token_pages: [N, P, ...], a row for each token, where the spec has any.
        token_format: how a row stores its token.
        index_keys: [N, P, row], or a row for each pool of tokens, where the spec has any.
        last_states: [N, hidden_size], where the spec has any.
        recurrent: of each sequence, where the spec has any.
        rings: [N, rows, 2 dim], where the spec has any.
    """

    token_pages: Tensor | None
    token_format: KVFormat | None
    index_keys: Tensor | None = None
    last_states: Tensor | None = None
    recurrent: RecurrentState | None = None
    rings: Tensor | None = None

    @property
    def pages(self) -> Tensor:
        """[N, P, ...], a row for each token.

        Raises:
            CacheError: the layer keeps nothing of each token.
        """
        if self.token_pages is None:
            raise CacheError("this layer keeps nothing of each token: make the cache of ModelConfig.specs")
        return self.token_pages

    @property
    def kv_format(self) -> KVFormat:
        """How a row of `pages` stores its token; raises as `pages`."""
        if self.token_format is None:
            raise CacheError("this layer keeps nothing of each token: make the cache of ModelConfig.specs")
        return self.token_format

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept of full pages, each [N, ...]."""
        return [tensor for tensor in (self.token_pages, self.index_keys, self.last_states) if tensor is not None]


@dataclass(frozen=True)
class LayerSpec:
    """What one layer keeps.

    Attributes:
        tokens: of each token; None: nothing.
        index: of each token, too, where the layer selects the tokens that it attends to.
        last_state: of each page, where the layer is an MTP module's: whoever shares the page goes on reading from it.
        recurrent: of each sequence, where the layer is recurrent.
        ring: of each page that is not full, where index keys are those of pools.
    """

    tokens: LatentSpec | KeyValueSpec | None
    index: IndexSpec | None = None
    last_state: LastStateSpec | None = None
    recurrent: RecurrentSpec | None = None
    ring: RingSpec | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return sum(each.token_bytes for each in (self.tokens, self.index) if each is not None)

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence, however long."""
        return 0 if self.recurrent is None else self.recurrent.sequence_bytes

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page of `page_size` tokens."""
        return self.kept_page_bytes(page_size) + (0 if self.ring is None else self.ring.page_bytes)

    def common_page_bytes(self, page_size: int) -> int:
        """Of these, what processes that share the layer out have in common: all heads read latents and index keys.

        Of an MTP module's layer nothing is: one process has it whole.
        """
        if self.last_state is not None:
            return 0
        latents = page_size * self.tokens.token_bytes if isinstance(self.tokens, LatentSpec) else 0
        return latents + (0 if self.index is None else self.index.page_bytes(page_size))

    def kept_page_bytes(self, page_size: int) -> int:
        """Of a page's bytes, what is kept of a full one."""
        tokens = 0 if self.tokens is None else page_size * self.tokens.token_bytes
        index = 0 if self.index is None else self.index.page_bytes(page_size)
        return tokens + index + (0 if self.last_state is None else self.last_state.page_bytes)

    def allocate(
        self,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
        *,
        num_slots: int = 0,
        common: Zeros | None = None,
    ) -> LayerState:
        """Zeroed memory of `num_pages` pages and `num_slots` sequences; of `common_page_bytes` by `common` if given."""
        own: Zeros = partial(torch.zeros, device=device)
        common = own if common is None or self.last_state is not None else common
        tokens = self.tokens
        pages = None
        if tokens is not None:
            pages = tokens.allocate(num_pages, page_size, common if isinstance(tokens, LatentSpec) else own)
        keys = None if self.index is None else self.index.allocate(num_pages, page_size, common)
        states = None if self.last_state is None else self.last_state.allocate(num_pages, device)
        recurrent = None if self.recurrent is None else self.recurrent.allocate(num_slots, device)
        rings = None if self.ring is None else self.ring.allocate(num_pages, device)
        return LayerState(pages, None if tokens is None else tokens.format, keys, states, recurrent, rings)


def bytes_per_token(layers: Iterable[LayerSpec]) -> int:
    """Bytes of one token in all of `layers`."""
    return sum(layer.token_bytes for layer in layers)


def page_bytes(layers: Iterable[LayerSpec], page_size: int = PAGE_SIZE) -> int:
    """Bytes of one page in all of `layers`: of its tokens, and what is kept once a page."""
    return sum(layer.page_bytes(page_size) for layer in layers)


def common_page_bytes(layers: Iterable[LayerSpec], page_size: int = PAGE_SIZE) -> int:
    """Bytes of one page in all of `layers` that processes which share these out have in common."""
    return sum(layer.common_page_bytes(page_size) for layer in layers)


def sequence_bytes(layers: Iterable[LayerSpec]) -> int:
    """Bytes that one sequence takes in all of `layers` beside its tokens: its recurrent states."""
    return sum(layer.sequence_bytes for layer in layers)


def mha_bytes_per_token(
    num_layers: int, num_kv_heads: int, qk_head_dim: int, v_head_dim: int, *, element_bytes: int = 2
) -> int:
    """Bytes per token, all layers, if the same model cached a key and a value per head: what MLA is compared with.

    Args:
        num_layers: layers of the model.
        num_kv_heads: all heads for MHA, 8 for the usual GQA, 1 for MQA.
        qk_head_dim: width of a key; for MLA qk_nope_head_dim + qk_rope_head_dim.
        v_head_dim: width of a value.
        element_bytes: bytes of a number (2: bf16).
    """
    return num_layers * num_kv_heads * (qk_head_dim + v_head_dim) * element_bytes
