"""Where a run comes from: the command, the commit of the code, the hardware. Asked when a run begins, never at import."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from bitscape.engine import workers

NOTEBOOKS = ("ipykernel_launcher", "ipykernel")
"""Modules that run the cells of a notebook."""


def command() -> str | None:
    """Return what started this process, as a shell takes it: the program without its folder, with all arguments; torchrun before it.

    None where no command would start it again: in a notebook, at a prompt, or with the code given by `python -c` or on stdin.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    module = spec.name.removesuffix(".__main__") if spec else None
    if sys.argv[0] in ("", "-", "-c") or module in NOTEBOOKS:
        return None
    program = ["python", "-m", module] if module else [Path(sys.argv[0]).name]
    if program[-1].endswith(".py"):
        program.insert(0, "python")
    return shlex.join([*_torchrun(), *program, *sys.argv[1:]])


def _torchrun() -> list[str]:
    """What starts a command once for each worker; nothing for one alone, or where something other than torchrun did."""
    size, here = workers.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if size == 1 or here == 0:
        return []
    machines = ["--nnodes", str(size // here)] if size > here else []
    return ["torchrun", "--nproc-per-node", str(here), *machines, "--no-python"]


def commit() -> str | None:
    """Return the commit of bitscape's code, with "-dirty" if Python files were changed since; None outside a git checkout."""
    try:
        # Fails for an installed copy that merely lies inside another project's checkout.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        found = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ":(top,glob)**/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-dirty" if changed else found


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with its cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_model()}, {cores()} cores"


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def cores() -> int | None:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _git(*arguments: str) -> str:
    words = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
