"""Request -> Sequence -> Batch -> tokens: the engine above the model, below the strings."""

from latentkv.engine.constraint import Constraint, ConstraintState
from latentkv.engine.engine import Engine, Event, FinishReason
from latentkv.engine.request import Request
from latentkv.engine.sampler import NextToken, TokenLogprobs, sample
from latentkv.engine.sequence import Sequence
from latentkv.sampling_params import SamplingParams
from latentkv.structure import Structure

__all__ = [
    "Constraint",
    "ConstraintState",
    "Engine",
    "Event",
    "FinishReason",
    "NextToken",
    "Request",
    "SamplingParams",
    "Sequence",
    "Structure",
    "TokenLogprobs",
    "sample",
]
