"""What the record of a conversion says of its three stages: the source, the converted model, the healed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from latentkv.convert.quality import Quality


@dataclass(frozen=True)
class Stages:
    """Measures of one and the same text; None where there are none.

    Attributes:
        converted: before any healing.
        healed: after the last.
    """

    converted: Quality | None
    healed: Quality | None

    @property
    def last(self) -> Quality | None:
        """Of the model as it is."""
        return self.healed or self.converted


def stages_of(record: Mapping[str, Any]) -> Stages:
    """The stages on the text that was measured on last."""
    measures = list(_measures(record))
    if not measures:
        return Stages(None, None)
    sample = measures[-1][1]["sample"]
    same = [(healings, quality) for healings, quality in measures if quality["sample"] == sample]
    converted = next((quality for healings, quality in same if healings == 0), None)
    healed = next((quality for healings, quality in reversed(same) if healings > 0), None)
    return Stages(converted, healed)


def text_of(record: Mapping[str, Any]) -> str | None:
    """Where the text is from that was measured on last; None: not known."""
    healed = [healing for healing in record.get("healings", ()) if healing["evaluations"]]
    return (healed[-1] if healed else record.get("quality", {})).get("text")


def _measures(record: Mapping[str, Any]) -> Iterator[tuple[int, Quality]]:
    """(healings before it, measure), in the order taken."""
    if "quality" in record:
        yield 0, record["quality"]
    for number, healing in enumerate(record.get("healings", ())):
        if healing["evaluations"]:
            yield number, healing["evaluations"][0]
            yield number + 1, healing["evaluations"][-1]
