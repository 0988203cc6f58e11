"""Copies without values, for questions about shapes."""

import copy
from typing import Any

import torch
from torch import nn


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy whose parameters and buffers are on the meta device; no storage is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)
