"""Several processes, on one machine or many, that train one network together, as torchrun starts them.

Every worker holds the whole network and takes its part of every batch, so that `batch_size` is that of all workers together. A step
runs on each worker's part by itself; afterwards the loop averages gradients, weighted by images, and running statistics. Nothing wraps
the network, so that a step may run as many passes as it likes. Between two batches all workers hold the same bits.
Alone, every function here gives back what it got.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitscape.errors import BitscapeError


def join(device: torch.device) -> None:
    """Join the workers that torchrun started, over gloo on CPUs and nccl on GPUs; does nothing alone, or when joined already.

    The group stays for later calls. Raises BitscapeError where the environment tells of workers, but not how to reach them.
    """
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers == 1 or not dist.is_available() or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise BitscapeError(f"WORLD_SIZE is {workers}, and {', '.join(missing)} not set; start with torchrun, or unset WORLD_SIZE")
    on_gpu = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)


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
    return slice(rank(), None, workers)


def total(value: Tensor) -> Tensor:
    """Sum of every worker's `value`, detached; the value itself for a single one."""
    if world_size() == 1:
        return value
    summed = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


def mean(value: Tensor) -> Tensor:
    """Mean of every worker's `value`, each counting the same; the value itself for a single one."""
    return value if world_size() == 1 else total(value) / world_size()


def wait() -> None:
    """Return when every worker has come here."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def same_start(model: nn.Module) -> None:
    """Give every worker the first one's parameters and buffers."""
    if world_size() > 1:
        for tensors in _by_kind((*model.parameters(), *model.buffers())):
            _copy_from_first(tensors)


def seed_at(*position: int) -> None:
    """Make the random numbers of one of several workers depend on `position` in the run, and on who it is, alone.

    A resumed run so draws what it would have drawn, although the checkpoint holds the first worker's random state only.
    """
    if world_size() > 1:
        digest = hashlib.sha256("/".join(map(str, (*position, rank()))).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:4], "big"))


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], share: float) -> None:
    """Make each `.grad` the mean over all images of the batch, of which this worker saw `share`; one message for each type.

    A gradient that some worker has counts as zero where it is None, and stays None where none has it.
    """
    if world_size() == 1:
        return
    for like in _by_kind(parameters):
        present = like[0].new_tensor([p.grad is not None for p in like])
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in like)
        summed = total(torch.cat([present, *(share * gradient.reshape(-1) for gradient in gradients)]))
        complete = all(p.grad is not None for p in like)  # then nothing has to be read from the device
        somewhere = [True] * len(like) if complete else (summed[: len(like)] > 0).tolist()
        for parameter, gradient, used in zip(like, _pieces(summed[len(like) :], like), somewhere, strict=True):
            if used:
                # A new tensor in the parameter's memory format, which fused kernels rely on.
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)


@contextmanager
def averaged_buffers(model: nn.Module, share: float) -> Iterator[None]:
    """Give all workers, after the block, the mean by `share` of the floating-point buffers it changed; others as the first has them.

    What no worker changed keeps its bits: a sum of shares of it would not.
    """
    if world_size() == 1:
        yield
        return
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    old_of = {id(buffer): before[name] for name, buffer in model.named_buffers()}
    for buffers in _by_kind(model.buffers()):
        if not buffers[0].is_floating_point():
            _copy_from_first(buffers)
            continue
        now, old = _flat(buffers), _flat([old_of[id(buffer)] for buffer in buffers])
        averaged, changes = total(torch.stack([share * now, (now != old).to(now.dtype)]))
        for buffer, piece in zip(buffers, _pieces(torch.where(changes > 0, averaged, old), buffers), strict=True):
            buffer.copy_(piece)


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group by type and device, in an order that is the same on every worker."""

    def kind(tensor: Tensor) -> tuple[str, str]:
        return str(tensor.dtype), tensor.device.type

    return [list(group) for _, group in groupby(sorted(tensors, key=kind), key=kind)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _pieces(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [tensor.numel() for tensor in like]
    return [piece.view(tensor.shape) for piece, tensor in zip(flat.split(sizes), like, strict=True)]


def _copy_from_first(tensors: Sequence[Tensor]) -> None:
    flat = _flat(tensors)
    dist.broadcast(flat.view(torch.uint8), src=0)  # bytes: not every type travels
    for tensor, piece in zip(tensors, _pieces(flat, tensors), strict=True):
        tensor.copy_(piece)
