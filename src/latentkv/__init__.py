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

__getattr__ = lazily(
    __name__,
    llm=("LLM",),
    ops=("mla_decode",),
    sampling_params=("SamplingParams",),
    state=("PagedCache",),
    structure=("Structure",),
    **{"models.mla": ("MultiHeadLatentAttention",)},
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
