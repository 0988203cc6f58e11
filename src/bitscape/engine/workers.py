"""Several processes that train one network together: who they are, and what they tell each other."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """Sum of every worker's `value`; the value itself for a single one."""
    if world_size() == 1:
        return value
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


def mean(value: Tensor) -> Tensor:
    """Mean of every worker's `value`; the value itself for a single one."""
    return value if world_size() == 1 else total(value) / world_size()
