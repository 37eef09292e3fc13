"""The paged cache: what a token costs (`layout`), whose a page is (`pool`), where it is stored (`latent_cache`).

`prefix` finds pages again by the text in them, and `store` in files of a folder when they are not in memory.
"""

from latentkv.cache.latent_cache import LatentCache
from latentkv.cache.layout import PAGE_SIZE, KeyValuePlane, KVFormat, LatentPlane, Plane, mha_bytes_per_token
from latentkv.cache.page_key import PageKey
from latentkv.cache.pool import PagePool
from latentkv.cache.prefix import KnownPage, PrefixIndex
from latentkv.cache.store import PageStore
from latentkv.cache.store_folder import StoreFolder

__all__ = [
    "PAGE_SIZE",
    "KVFormat",
    "KeyValuePlane",
    "KnownPage",
    "LatentCache",
    "LatentPlane",
    "PageKey",
    "PagePool",
    "PageStore",
    "Plane",
    "PrefixIndex",
    "StoreFolder",
    "mha_bytes_per_token",
]
