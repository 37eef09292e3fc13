"""What an MTP module drafts without a cache, and a drafter that is held to it."""

from __future__ import annotations

import torch

from latentkv.engine.drafts import Choose, Wish
from latentkv.engine.mtp import MTPDrafter
from latentkv.models.decoder import Decoder


@torch.inference_mode()
def unpaged_draft(decoder: Decoder, tokens: list[int], most: int, choose: Choose) -> list[int]:
    """`most` tokens after `tokens`, by the form of the module that is trained."""
    states, draft = decoder.forward_train(torch.tensor([tokens[:-1]])), list[int]()
    while len(draft) < most:
        out = decoder.mtp_hidden(0, states, torch.tensor([tokens[1:] + draft]))[:, -1:]
        draft.append(choose(draft, decoder.logits(out[0, 0])))
        states = torch.cat([states, out], dim=1)
    return draft


class CheckedMTPDrafter(MTPDrafter):
    """Compares every draft with `unpaged_draft`; counts those that it has compared, by their length."""

    def __init__(self, decoder: Decoder, *args) -> None:
        super().__init__(decoder, *args)
        self.decoder = decoder
        self.checked: dict[int, int] = {}

    def propose(self, wishes: list[Wish], seconds: float) -> list[list[int]]:
        drafts = super().propose(wishes, seconds)
        for wish, draft in zip(wishes, drafts, strict=True):
            if wish.most:
                assert draft == unpaged_draft(self.decoder, wish.sequence.tokens, wish.most, wish.choose)
                self.checked[len(draft)] = self.checked.get(len(draft), 0) + 1
            else:
                assert draft == []
        return drafts
