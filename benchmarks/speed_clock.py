"""What `benchmarks.speed` measures with: seconds, and resident memory of Linux with glibc."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Clocks = dict[str, float]


def clocked(work: Callable[[], Any]) -> Clocks:
    """Process CPU and wall seconds of `work`."""
    wall, process = time.perf_counter(), time.process_time()
    work()
    return {"process_s": time.process_time() - process, "wall_s": time.perf_counter() - wall}


def forget_peak() -> None:
    """Let the peak of resident memory start anew, from what is in use; the rest is given back."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, the resident size now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
