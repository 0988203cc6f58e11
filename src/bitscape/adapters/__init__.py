"""A policy as other tools take it: their own settings, layer by layer."""

from bitscape.adapters.executorch_arm import to_executorch_arm
from bitscape.adapters.hailo import to_hailo
from bitscape.adapters.model_explorer import to_model_explorer
from bitscape.adapters.torchao import to_torchao

__all__ = ["to_executorch_arm", "to_hailo", "to_model_explorer", "to_torchao"]
