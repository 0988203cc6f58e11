"""The one place where packages of runtimes are imported: when they are needed, and with their telemetry off.

ONNX Runtime and OpenVINO start telemetry as they are imported: they write an identifier into the user's folders and look up a host.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from bitscape.errors import needs_extra

EXTRAS = {
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "ai_edge_litert": "tflite",
    "flatbuffers": "tflite",
    "ethosu": "ethos-u",
}
"""Package -> the extra of bitscape that brings it."""
FORMATS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "qonnx": ("onnx", "onnxscript"),
    "tflite": ("ai_edge_litert", "flatbuffers"),
}
"""Form of a file -> the packages that write and check it."""
_TELEMETRY = "openvino_telemetry"


def runtime_module(name: str) -> Any:
    """Import a package of EXTRAS or a module within one; a choice that the user made about telemetry stands.

    ONNX Runtime's is the environment variable ORT_DISABLE_TELEMETRY (0 or 1); OpenVINO's the file in which it keeps the user's consent.

    Raises:
        BitscapeError: the package is missing.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with needs_extra(EXTRAS[name.partition(".")[0]]), _without_openvino_telemetry():
        return importlib.import_module(name)


def version_of(distribution: str, module: str) -> str:
    """Version of an installed distribution that does not say it in its module. Raises BitscapeError if it is missing."""
    runtime_module(module)
    return metadata.version(distribution)


def check_packages(form: str | None) -> None:
    """Raise BitscapeError, naming the extra, if a package is missing that writes or checks files of this form."""
    for name in FORMATS.get(form or "", ()):
        if name in EXTRAS:
            runtime_module(name)
        else:
            with needs_extra("openvino" if form == "openvino" else "onnx"):
                importlib.import_module(name)


@contextmanager
def silent_process() -> Iterator[None]:
    """Within the block, what the process writes itself, beside Python, is dropped: parts of runtimes are no Python."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with open(os.devnull, "wb") as nothing:
            for descriptor in (1, 2):
                os.dup2(nothing.fileno(), descriptor)
            yield
    finally:
        for descriptor, own in zip((1, 2), kept, strict=True):
            os.dup2(own, descriptor)
            os.close(own)


@contextmanager
def _without_openvino_telemetry() -> Iterator[None]:
    """Hide the package that sends OpenVINO's telemetry, which OpenVINO replaces by a stub then; it has no other switch."""
    if _openvino_choice().is_file():
        yield
        return
    loaded = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
        if loaded is not None:
            sys.modules[_TELEMETRY] = loaded


def _openvino_choice() -> Path:
    """Where OpenVINO keeps the user's consent."""
    home = os.environ.get("LOCALAPPDATA", "") if os.name == "nt" else os.path.expanduser("~")
    return Path(home, "Intel Corporation" if os.name == "nt" else "intel", _TELEMETRY)
