"""What every test gets: checked shapes, one torch thread, reproducible examples, few digits and the path of the real data."""

import functools
import gc
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from xdist.scheduler import LoadFileScheduling

from tests import typechecks

# Before the first import of the package: its modules are instrumented as they load. The arithmetic
# of quantizers takes twice as long where every call is checked, and has no shapes to check.
install_import_hook(typechecks.modules_with_shapes(), f"{typechecks.__name__}.checked")

# Shells let programs that they start in the background ignore Ctrl-C; tests that raise it want its usual effect.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads it when it is imported, which torch.compile may do before any test of our programs.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One thread: on two busy cores, threads that wait for each other cost more than they give.
torch.set_num_threads(1)

# Networks that are made while test files load, such as parameters of tests.
torch.manual_seed(0)

# No deadline: the first call of a torch operator takes much longer than the others.
settings.register_profile("bitscape", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("bitscape")


EXPORTERS = ("tests/exporters/", "tests/runtimes/")
"""Their tests share the networks of `tests.exporters.networks`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: while one process runs the last of them, the other still has quick ones."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not item.nodeid.startswith(EXPORTERS), item.path not in slow))


def pytest_collection_finish() -> None:
    """What repeats in every test and never changes is done once, when the test files have loaded."""
    # Modules and collected tests live as long as the process: a fifth of all time would go into
    # looking for garbage among them.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    if "onnxscript" in sys.modules:
        from torch.onnx._internal._lazy_import import onnxscript_apis

        # torch.onnx reads the sources of its 500 operators anew for every export.
        onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)


class ByFile(LoadFileScheduling):
    """A file's tests share a process and its fixtures; the exporters' files also share networks."""

    def _split_scope(self, nodeid: str) -> str:
        return "exporters" if nodeid.startswith(EXPORTERS) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws numbers without a seed of its own draws the same ones every time, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer digits to train on, for tests of what commands do rather than of what a network learns."""
    splits = {"train": slice(0, 288), "test": slice(1437, 1797)}
    monkeypatch.setattr("bitscape.data.sources.DIGITS_SPLITS", splits)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and trained weights; tests that need it are skipped where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BITSCAPE_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set BITSCAPE_DATA to its folder")
    return folder
