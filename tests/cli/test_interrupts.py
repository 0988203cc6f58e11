import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bitscape.cli.interrupts import interrupting
from bitscape.searches.fisher import Fisher
from tests.cli.run import MODEL, run_cli

pytestmark = pytest.mark.signals

SEARCH = ("search", *MODEL, "--data", "digits", "--images", 8, "--budget", "bitops=0.5x")
WORD = "interrupted: no result was written; run the command again"


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def handled(request):
    """A signal that is not ignored, as SIGINT is where the tests were started in the background."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread alone")
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_ends_with_its_code_and_one_line(handled, monkeypatch):
    monkeypatch.setattr(Fisher, "search", lambda *_, **__: signal.raise_signal(handled))
    shown = run_cli(*SEARCH)
    assert (shown.code, shown.err.strip().splitlines()[-1]) == (128 + handled, WORD)
    assert signal.getsignal(handled) is signal.default_int_handler


@pytest.mark.parametrize("where", ["bitscape.cli.app", "click", "bitscape.searches.problem"])
def test_ctrl_c_while_modules_are_imported_is_one_line(where: str, tmp_path: Path) -> None:
    """A finder that gets Ctrl-C when the module is looked for."""
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests were started in the background
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {where!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from bitscape.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, SEARCH)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == WORD and "Traceback" not in done.stderr


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupting() as received:
            os.kill(os.getpid(), signal.SIGINT)
        assert received == []
    finally:
        signal.signal(signal.SIGINT, before)
