"""A grouped-query model made into a latent-attention one: converted, and healed."""

from typing import TYPE_CHECKING

from latentkv.convert.options import ConvertOptions, Export, Method
from latentkv.lazy import lazily

if TYPE_CHECKING:
    from latentkv.convert.export_config import VLLM_LATENT_WIDTHS
    from latentkv.convert.heal import Healing, heal_checkpoint, held_out_sequences, require_healable
    from latentkv.convert.heal_loop import Evaluation
    from latentkv.convert.heal_options import HealOptions
    from latentkv.convert.record import PAGE_FILE, REPORT_FILE, note, read_record
    from latentkv.convert.report import ConversionReport
    from latentkv.convert.run import convert_checkpoint, require_convertible
    from latentkv.convert.target import require_target

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
    "held_out_sequences",
    "note",
    "read_record",
    "require_convertible",
    "require_healable",
    "require_target",
]

__getattr__ = lazily(
    __name__,
    export_config=("VLLM_LATENT_WIDTHS",),
    heal=("Healing", "heal_checkpoint", "held_out_sequences", "require_healable"),
    heal_loop=("Evaluation",),
    heal_options=("HealOptions",),
    record=("PAGE_FILE", "REPORT_FILE", "note", "read_record"),
    report=("ConversionReport",),
    run=("convert_checkpoint", "require_convertible"),
    target=("require_target",),
)
