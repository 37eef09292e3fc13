"""A grouped-query model made into a latent-attention one: converted, and healed."""

from latentkv.convert.export import VLLM_LATENT_WIDTHS, Export
from latentkv.convert.heal import Evaluation, Healing, HealOptions, heal_checkpoint
from latentkv.convert.layer import Method
from latentkv.convert.options import ConvertOptions
from latentkv.convert.record import PAGE_FILE, REPORT_FILE, note, read_record
from latentkv.convert.report import ConversionReport
from latentkv.convert.run import convert_checkpoint, require_convertible

__all__ = [
    "PAGE_FILE",
    "REPORT_FILE",
    "VLLM_LATENT_WIDTHS",
    "ConversionReport",
    "ConvertOptions",
    "Evaluation",
    "Export",
    "HealOptions",
    "Healing",
    "Method",
    "convert_checkpoint",
    "heal_checkpoint",
    "note",
    "read_record",
    "require_convertible",
]
