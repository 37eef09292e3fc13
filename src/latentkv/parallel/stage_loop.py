"""`run_stage`: what a rank that is not the driver does."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from latentkv.models.decoder import Decoder
from latentkv.models.replay import Replay, why_not_recorded
from latentkv.parallel.messages import Kind, Message, batch_of
from latentkv.parallel.ring import Ring
from latentkv.state import PagedCache

logger = logging.getLogger("latentkv.parallel")


def run_stage(decoder: Decoder, cache: PagedCache, ring: Ring) -> None:
    """Compute a stage's layers for every step that comes, until the driver says that it is the end.

    A step that fails here is reported in its answer, and so on to the driver; the next one is computed again.

    Args:
        decoder: with the stage's layers alone, in eval mode.
        cache: of their specs, with the driver's pages and slots.
        ring: this rank's.

    Raises:
        RankError: the rank before or after is gone.
    """
    stage = StageLoop(decoder, cache, ring)
    while stage.turn():
        pass
    ring.flush()


class StageLoop:
    """A stage that answers messages one after another; the arguments are those of `run_stage`."""

    def __init__(self, decoder: Decoder, cache: PagedCache, ring: Ring) -> None:
        self._decoder, self._cache, self._ring = decoder, cache, ring
        self._replay = Replay(decoder.run_layers, cache, why_not_recorded(decoder))

    def turn(self) -> bool:
        """Deal with one message; whether there will be more."""
        message = self._ring.receive()
        # As many steps are under way at most as there are ranks: what was sent of those before has come back.
        self._ring.arrived(message.number - self._ring.size)
        if message.kind == Kind.STEP:
            message = self._computed(message)
        elif message.kind == Kind.COPY:
            self._copy(message)
        # The driver is not told of copies, which it has made itself.
        if message.kind != Kind.COPY or self._ring.after != 0:
            self._ring.send(message)
        return message.kind != Kind.STOP

    @torch.inference_mode()
    def _computed(self, message: Message) -> Message:
        """The message with the states that this stage's layers give."""
        batch, form = batch_of(message.numbers)
        x = message.x
        try:
            if x is None:
                raise ValueError("a step came without hidden states")
            hidden = self._replay.run(batch, lambda batch: (x, self._decoder.rotary(batch.positions)), form=form)
        except Exception as error:  # whatever the model raised: the driver gives up the requests of this step
            logger.warning("A step failed: %s", error)
            text = torch.frombuffer(bytearray(f"{error}".encode() or b"?"), dtype=torch.uint8)
            rank = torch.tensor([self._ring.rank], dtype=torch.int32)
            return Message(Kind.FAILED, message.number, rank, text)
        return replace(message, x=hidden)

    @torch.inference_mode()
    def _copy(self, message: Message) -> None:
        if self._cache.slots:
            self._cache.slots.copy_memory(*message.numbers.tolist())
