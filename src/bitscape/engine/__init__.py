"""The one training loop and the one evaluation loop, for any `nn.Module` that maps images to logits."""

from bitscape.engine.checkpoint import CheckpointError
from bitscape.engine.evaluate import Accuracy, evaluate
from bitscape.engine.nonfinite import NonFiniteError
from bitscape.engine.quality_table import QualityTable, quality_table
from bitscape.engine.settings import AdamW, Cosine, OptimizerSettings, Sgd
from bitscape.engine.spending import Spending, Spent
from bitscape.engine.step import Batch, LossFunction, Step, StepRecord, StepSettings
from bitscape.engine.trackers import TensorBoard, Tracker
from bitscape.engine.training import TrainResult, train
from bitscape.sharpness.probe import BatchLoss

__all__ = [
    "Accuracy",
    "AdamW",
    "Batch",
    "BatchLoss",
    "CheckpointError",
    "Cosine",
    "LossFunction",
    "NonFiniteError",
    "OptimizerSettings",
    "QualityTable",
    "Sgd",
    "Spending",
    "Spent",
    "Step",
    "StepRecord",
    "StepSettings",
    "TensorBoard",
    "Tracker",
    "TrainResult",
    "evaluate",
    "quality_table",
    "train",
]
