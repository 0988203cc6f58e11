"""Runtimes as the package imports them: a plain `pytest.importorskip` would start their telemetry."""

from typing import Any

import pytest

from bitscape.errors import BitscapeError
from bitscape.runtimes.packages import runtime_module


def runtime_or_skip(name: str) -> Any:
    """The module "onnxruntime" or "openvino"; the test, or the file that is collected, is skipped where it is absent."""
    try:
        return runtime_module(name)
    except BitscapeError as error:
        pytest.skip(str(error), allow_module_level=True)
