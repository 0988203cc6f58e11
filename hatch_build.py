"""Build the native kernels with the package, where there is a C compiler."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "bitscape/quant/kernels/kernels.so"
FLAGS = (
    "-std=gnu11 -O3 -fPIC -shared -pthread -fopenmp-simd"
    " -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
"""None of them changes what is computed: there are no fused multiply-adds, and only sums are reordered,
where the source says so."""


def compilers() -> Iterator[list[str]]:
    """Commands of C compilers: CC, Python's own, and usual names."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            yield words


class KernelHook(BuildHookInterface):
    """Compile kernels.c beside its source. Without it bitscape works too, slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library and let the wheel hold it."""
        library = Path(self.root, "src", KERNELS)
        source, fresh = library.with_suffix(".c"), library.with_suffix(".new.so")
        mark = f'-DBITSCAPE_SOURCE="{hashlib.sha256(source.read_bytes()).hexdigest()}"'
        errors = []
        for words in compilers():
            command = [*words, *FLAGS.split(), mark, "-o", str(fresh), str(source), "-lm"]
            try:
                subprocess.run(command, capture_output=True, text=True, check=True)
                fresh.replace(library)  # a running process keeps the old one
            except (OSError, subprocess.CalledProcessError) as error:
                errors.append(f"{shlex.join(command)}: {getattr(error, 'stderr', None) or error}")
            else:
                break
        else:
            why = "; ".join(errors) or "there is no C compiler"
            self.app.display_warning(
                f"bitscape is built without native kernels, and is slower: {why}"
            )
            return
        if version != "editable":
            system = sysconfig.get_platform().replace("universal2", platform.machine())
            tag = system.replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{tag}")
            build_data["force_include"][str(library)] = KERNELS
