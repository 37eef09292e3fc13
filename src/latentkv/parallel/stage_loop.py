"""`run_stage`: what a rank that is not the driver does."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from latentkv.errors import RankError, StageError
from latentkv.models.decoder import Decoder
from latentkv.models.replay import Replay, why_not_recorded
from latentkv.parallel.messages import Kind, Message, batch_of
from latentkv.parallel.ring import Ring
from latentkv.parallel.team import ShardTeam
from latentkv.state import PagedCache

logger = logging.getLogger("latentkv.parallel")


def run_stage(decoder: Decoder, cache: PagedCache, ring: Ring, team: ShardTeam | None = None) -> None:
    """Compute a stage's layers for every step that comes, until the driver says that it is the end.

    A step that fails here is reported in its answer, and so on to the driver; the next one is computed again.

    Args:
        decoder: with the stage's layers alone, or this rank's shard of them, in eval mode.
        cache: of their specs, with the driver's pages and slots.
        ring: of the stage's first rank.
        team: of the stage, where it has several ranks.

    Raises:
        RankError: the rank before or after, or another one of the team, is gone.
    """
    stage = StageLoop(decoder, cache, ring, team)
    while stage.turn():
        pass
    ring.flush()


class StageLoop:
    """A stage that answers messages one after another; the arguments are those of `run_stage`.

    Where a rank leads its team it hands on what it is told. The others compute their shards, and answer nothing: what
    they give is in the sums.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, ring: Ring, team: ShardTeam | None = None) -> None:
        self._decoder, self._cache, self._ring, self._team = decoder, cache, ring, team
        self._replay = Replay(decoder.run_layers, cache, why_not_recorded(decoder))

    def turn(self) -> bool:
        """Deal with one message; whether there will be more."""
        if self._team is not None and not self._team.leads:
            return self._follow(self._team)
        message = self._ring.receive()
        # As many steps are under way at most as there are stages: what was sent of those before has come back.
        self._ring.arrived(message.number - self._ring.size)
        if message.kind == Kind.STEP:
            message = self._answer(message)
        elif message.kind != Kind.FAILED:
            with nullcontext() if self._team is None else self._team.step(message):
                if message.kind == Kind.COPY:
                    self._copy(message)
        # The driver is not told of copies, which it has made itself.
        if message.kind != Kind.COPY or self._ring.after != 0:
            self._ring.send(message)
        return message.kind != Kind.STOP

    @torch.inference_mode()
    def _follow(self, team: ShardTeam) -> bool:
        """Do what the rank that leads says; whether there will be more. It knows of what fails here, and goes on."""
        message = None
        try:
            with team.step() as message:
                if message.kind == Kind.STEP:
                    self._hidden(message)
                elif message.kind == Kind.COPY:
                    self._copy(message)
                elif message.kind == Kind.LOGITS and message.x is not None:
                    team.gather(self._decoder.own_logits(message.x))
        except RankError:  # there will be no other step
            raise
        except Exception as error:
            logger.warning("A step failed: %s", error)
        return message is None or message.kind != Kind.STOP

    @torch.inference_mode()
    def _answer(self, message: Message) -> Message:
        """The message with the states that this stage's layers give."""
        try:
            with nullcontext() if self._team is None else self._team.step(message):
                return replace(message, x=self._hidden(message))
        except RankError:  # of the team
            raise
        except Exception as error:  # whatever the model raised: the driver gives up the requests of this step
            logger.warning("A step failed: %s", error)
            failed, why = (error.rank, error.why) if isinstance(error, StageError) else (self._ring.rank, f"{error}")
            text = torch.frombuffer(bytearray(why.encode() or b"?"), dtype=torch.uint8)
            return Message(Kind.FAILED, message.number, torch.tensor([failed], dtype=torch.int32), text)

    def _hidden(self, message: Message) -> Tensor:
        """What this stage's layers give for a step."""
        batch, form = batch_of(message.numbers)
        x = message.x
        if x is None:
            raise ValueError("a step came without hidden states")
        return self._replay.run(batch, lambda batch: (x, self._decoder.rotary(batch.positions)), form=form)

    @torch.inference_mode()
    def _copy(self, message: Message) -> None:
        if self._cache.slots:
            self._cache.slots.copy_memory(*message.numbers.tolist())
