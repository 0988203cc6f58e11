"""Build the native kernels with the package, where there is a C compiler."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "bitscape/quant/kernels/kernels.so"
FLAGS = "-std=gnu11 -O3 -fPIC -shared -pthread -fopenmp-simd -ffp-contract=off -fno-math-errno -fno-trapping-math"
"""None of them changes what is computed: no fused multiply-adds, and only sums are reordered, where the source says so."""


def compiler() -> list[str] | None:
    """The command of a C compiler: CC, Python's own, or a usual name."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


class KernelHook(BuildHookInterface):
    """Compile kernels.c beside its source. Without it bitscape works too, slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library and let the wheel hold it."""
        library = Path(self.root, "src", KERNELS)
        library.unlink(missing_ok=True)
        words = compiler()
        if words is None:
            self.app.display_warning("no C compiler found: bitscape is built without its native kernels, and is slower")
            return
        command = [*words, *FLAGS.split(), "-o", str(library), str(library.with_suffix(".c")), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            self.app.display_warning(f"bitscape is built without its native kernels, and is slower: {shlex.join(command)}\n{done.stderr}")
            return
        if version == "editable":
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data.update(pure_python=False, tag=f"py3-none-{platform}")
        build_data["force_include"][str(library)] = KERNELS
