"""LatentKV: run, train, plan and measure language models with Multi-head Latent Attention.

The public face; each name is imported when it is first used, so `import latentkv` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentkv.engine import SamplingParams, Structure
    from latentkv.llm import LLM
    from latentkv.models.mla import MultiHeadLatentAttention
    from latentkv.ops import mla_decode
    from latentkv.state import PagedCache

__all__ = ["LLM", "MultiHeadLatentAttention", "PagedCache", "SamplingParams", "Structure", "mla_decode"]

_HOMES = {
    "LLM": "latentkv.llm",
    "PagedCache": "latentkv.state",
    "MultiHeadLatentAttention": "latentkv.models.mla",
    "SamplingParams": "latentkv.engine",
    "Structure": "latentkv.engine",
    "mla_decode": "latentkv.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
