"""The paged cache: what a token costs (`layout`), whose a page is (`pool`), where it is stored (`latent_cache`).

`prefix` finds pages again by the text in them.
"""

from latentkv.cache.latent_cache import LatentCache
from latentkv.cache.layout import PAGE_SIZE, KeyValuePlane, KVFormat, LatentPlane, Plane, mha_bytes_per_token
from latentkv.cache.pool import PagePool
from latentkv.cache.prefix import KnownPage, PrefixIndex

__all__ = [
    "PAGE_SIZE",
    "KVFormat",
    "KeyValuePlane",
    "KnownPage",
    "LatentCache",
    "LatentPlane",
    "PagePool",
    "Plane",
    "PrefixIndex",
    "mha_bytes_per_token",
]
