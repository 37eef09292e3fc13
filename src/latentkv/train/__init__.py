"""Training on one machine: text files in, a checkpoint folder out."""

from latentkv.train.options import TrainOptions
from latentkv.train.run import TrainingPlan, prepare_text, train_model

__all__ = ["TrainOptions", "TrainingPlan", "prepare_text", "train_model"]
