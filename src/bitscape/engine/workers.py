"""Several processes, on one machine or many, that train one network together, as torchrun starts them.

Every worker holds the whole network and takes its part of every batch, so that `batch_size` is that of all workers together. A step
runs on each worker's part by itself; afterwards the loop averages the gradients, weighted by images. Nothing wraps the network, so that
a step may run as many passes as it likes: one that perturbs weights does so along its own worker's gradient.
"""

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitscape.engine.step import StepRecord
from bitscape.errors import BitscapeError


def join(device: torch.device) -> None:
    """Join the workers that torchrun started, over gloo on CPUs and nccl on GPUs; does nothing alone, or when joined already."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this worker writes files and logs."""
    return rank() == 0


def part(count: int) -> slice:
    """This worker's rows of `count`. Raises BitscapeError if there is not one for every worker."""
    workers = world_size()
    if count < workers:
        raise BitscapeError(
            f"a batch of {count} images cannot be shared by {workers} workers; use a larger batch_size, drop_last=True, or fewer workers"
        )
    return slice(rank() * count // workers, (rank() + 1) * count // workers)


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


def wait() -> None:
    """Return when every worker has come here."""
    if world_size() > 1:
        dist.barrier()


def decided_by_first(decision: bool, device: torch.device) -> bool:
    """What the first worker decided: clocks differ."""
    if world_size() == 1:
        return decision
    value = torch.tensor(int(decision), device=device)
    dist.broadcast(value, src=0)
    return bool(value)


@torch.no_grad()
def same_start(model: nn.Module) -> None:
    """Give every worker the first one's parameters and buffers."""
    if world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Make running statistics the mean over workers, each of which saw other images."""
    if world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean(buffer.detach().contiguous()))


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], images: int) -> None:
    """Make each `.grad` the mean over all workers' images, in one message; this worker saw `images` of them.

    A gradient that some worker has counts as zero where it is None, and stays None where none has it.
    """
    if world_size() == 1:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*((images * g.float()).flatten() for g in gradients), present, present.new_tensor([images])])
    dist.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    *sums, present, seen = flat.split([*sizes, len(sizes), 1])
    for parameter, summed, has in zip(parameters, sums, present.tolist(), strict=True):
        if has:
            # Copied into place: gradients keep their memory format.
            parameter.grad = torch.empty_like(parameter).copy_((summed / seen).view(parameter.shape))


def pooled(record: StepRecord, images: int) -> tuple[StepRecord, int]:
    """The record of the whole batch and its number of images, from those of every worker's part."""
    if world_size() == 1:
        return record, images
    means = torch.stack([value.to(record.loss.device).double() for value in (record.loss, *record.extras.values())])
    *sums, correct, seen = total(torch.cat([means * images, means.new_tensor([record.correct, images])])).unbind()
    loss, *extras = (value / seen for value in sums)
    return StepRecord(loss=loss, correct=correct, extras=dict(zip(record.extras, extras, strict=True))), int(seen)


def trainable(groups: Iterable[dict[str, list[nn.Parameter]]]) -> list[nn.Parameter]:
    """The parameters of an optimiser's groups."""
    return [parameter for group in groups for parameter in group["params"]]
