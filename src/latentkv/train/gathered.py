"""A model that several processes have trained together, put together again."""

from __future__ import annotations

import torch

from latentkv.models.decoder import Decoder
from latentkv.train.ranks import DataRanks, whole


def gathered(decoder: Decoder, ranks: DataRanks) -> Decoder:
    """The decoder with all of its weights, in the first process; the others get it without storage."""
    if ranks.size == 1:
        return decoder
    with torch.device("meta"):
        whole_decoder = Decoder(decoder.config)
    whole_decoder.drop_mtp_modules(keep=range(len(decoder.mtp)))
    for name, tensor in decoder.state_dict().items():
        found = whole(tensor)
        if ranks.is_first:
            whole_decoder.load_state_dict({name: found.detach()}, strict=False, assign=True)
    return whole_decoder
