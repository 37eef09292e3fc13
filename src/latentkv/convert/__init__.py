"""A grouped-query model made into a latent-attention one: converted, and healed."""

from latentkv.convert.export import VLLM_LATENT_WIDTHS, Export
from latentkv.convert.heal import HEALING_FILE, Healing, HealOptions, heal_checkpoint
from latentkv.convert.layer import Method
from latentkv.convert.options import ConvertOptions
from latentkv.convert.report import ConversionReport
from latentkv.convert.run import convert_checkpoint, require_convertible
from latentkv.convert.target import REPORT_FILE

__all__ = [
    "HEALING_FILE",
    "REPORT_FILE",
    "VLLM_LATENT_WIDTHS",
    "ConversionReport",
    "ConvertOptions",
    "Export",
    "HealOptions",
    "Healing",
    "Method",
    "convert_checkpoint",
    "heal_checkpoint",
    "require_convertible",
]
