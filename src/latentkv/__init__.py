"""LatentKV: run, train, plan and measure language models with Multi-head Latent Attention.

The public face; each name is imported when it is first used, so `import latentkv` is instant.
"""

from typing import TYPE_CHECKING

from latentkv.lazy import lazily

if TYPE_CHECKING:
    from latentkv.llm import LLM
    from latentkv.models.mla import MultiHeadLatentAttention
    from latentkv.ops import mla_decode
    from latentkv.sampling_params import SamplingParams
    from latentkv.state import PagedCache
    from latentkv.structure import Structure

__all__ = ["LLM", "MultiHeadLatentAttention", "PagedCache", "SamplingParams", "Structure", "mla_decode"]

_HOMES = {
    "LLM": "latentkv.llm",
    "PagedCache": "latentkv.state",
    "MultiHeadLatentAttention": "latentkv.models.mla",
    "SamplingParams": "latentkv.sampling_params",
    "Structure": "latentkv.structure",
    "mla_decode": "latentkv.ops",
}


__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
