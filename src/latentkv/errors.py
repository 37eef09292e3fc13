"""Every error that a user can cause, typed. Each message is one sentence that names the thing and the remedy."""


class LatentKVError(Exception):
    """Base of all errors that LatentKV raises on purpose; the command line turns it into one line and exit code 2."""


class ConfigError(LatentKVError):
    """A model's `config.json` is missing, malformed, or asks for something that is not supported."""


class CheckpointError(LatentKVError):
    """Weights are missing, unexpected, truncated, misshapen or not finite."""


class TokenizerError(LatentKVError):
    """A tokenizer or chat template cannot be read, or does not match its model."""


class TemplateLimitError(TokenizerError):
    """A chat template takes more time or memory than one may."""


class RequestError(LatentKVError):
    """A prompt or a sampling parameter is out of range."""


class CacheError(LatentKVError):
    """The page pool cannot hold what was asked of it, or one of its invariants is broken."""


class TrainingError(LatentKVError):
    """Training data, a training option or a training checkpoint cannot be used."""


class DivergedError(TrainingError):
    """A training run's loss or gradient stopped being finite."""


class OpError(LatentKVError):
    """An operation was called with shapes, dtypes or values that it does not take."""


class BusyError(LatentKVError):
    """More requests wait than are let in: come again later."""


class EngineStoppedError(LatentKVError):
    """The engine has stopped, or is stopping, and takes no request any more."""


class RemoteServerError(LatentKVError):
    """A server that is to be measured cannot be reached, refuses the key, or does not know the model."""


class RankError(EngineStoppedError):
    """One of the processes that run a model together is gone, does not answer, or was started otherwise."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(f"Rank {rank} {what}: look for its last words, and start all ranks again.")
        self.rank = rank
        self.what = what


class StageError(LatentKVError):
    """One of the processes that run a model together could not compute its part of a step."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"Rank {rank} could not compute its part of a step: {reason}")
        self.rank = rank
        self.why = reason
