"""What a model remembers of a text: bytes (`spec`), whose a page or a slot is (`pages`, `slots`), memory (`cache`).

`prefix` finds pages again by the text in them, and `store` in files of a folder when they are not in memory.
"""

from latentkv.state.cache import LEAST_SLOTS, SLOTS_SHARE, PagedCache, pages_and_slots
from latentkv.state.common import CommonMemory, common_bytes, share_bytes
from latentkv.state.pages import PagePool
from latentkv.state.prefix import KnownPage, PrefixIndex
from latentkv.state.recurrent import RecurrentSpec, RecurrentState
from latentkv.state.slots import Slot, SlotPool
from latentkv.state.spec import (
    PAGE_SIZE,
    IndexSpec,
    KeyValueSpec,
    KVFormat,
    LastStateSpec,
    LatentSpec,
    LayerSpec,
    LayerState,
    RingSpec,
    bytes_per_token,
    mha_bytes_per_token,
    page_bytes,
    sequence_bytes,
)
from latentkv.state.store import PageKey, PageStore, StoreFolder

__all__ = [
    "LEAST_SLOTS",
    "PAGE_SIZE",
    "SLOTS_SHARE",
    "CommonMemory",
    "IndexSpec",
    "KVFormat",
    "KeyValueSpec",
    "KnownPage",
    "LastStateSpec",
    "LatentSpec",
    "LayerSpec",
    "LayerState",
    "PageKey",
    "PagePool",
    "PageStore",
    "PagedCache",
    "PrefixIndex",
    "RecurrentSpec",
    "RecurrentState",
    "RingSpec",
    "Slot",
    "SlotPool",
    "StoreFolder",
    "bytes_per_token",
    "common_bytes",
    "mha_bytes_per_token",
    "page_bytes",
    "pages_and_slots",
    "sequence_bytes",
    "share_bytes",
]
