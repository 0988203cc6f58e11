"""Where a run comes from: the command, the commit of the code, the hardware. Asked when a run begins, never at import."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def command() -> str:
    """Return what started this process, as a shell takes it: the program without its folder, with all arguments."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    program = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    if program[-1].endswith(".py"):
        program.insert(0, "python")
    return shlex.join([*program, *sys.argv[1:]])


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
