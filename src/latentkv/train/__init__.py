"""Training on one machine: text files in, a checkpoint folder out."""

from typing import TYPE_CHECKING

from latentkv.lazy import lazily
from latentkv.train.options import TrainingPlan, TrainOptions

if TYPE_CHECKING:
    from latentkv.train.run import prepare_text, train_model

__all__ = ["TrainOptions", "TrainingPlan", "prepare_text", "train_model"]

__getattr__ = lazily(__name__, run=("prepare_text", "train_model"))
