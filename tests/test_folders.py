import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitscape.errors import BitscapeError
from bitscape.folders import CHECKPOINT, WEIGHTS_FILE, is_written, locked, results_in, scratch_folder, write_together

HOLD = """
import sys, time
from pathlib import Path
from bitscape.folders import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_process_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(BitscapeError, match=rf"run: process {other.pid} on .+ is writing to this folder; wait"), locked(folder):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with locked(folder):
            assert (folder / ".lock-owner").read_text().startswith(f"process {os.getpid()} on ")
    assert [file.name for file in folder.iterdir()] == [".lock"]


def test_one_file_of_a_folder_can_be_locked_alone(tmp_path: Path) -> None:
    refused = []

    def attempt(*file: str) -> None:
        try:
            with locked(tmp_path, *file):
                pass
        except BitscapeError as error:
            refused.append(str(error))

    with locked(tmp_path, "table.json"):
        assert (tmp_path / ".table.json.lock-owner").is_file()
        for file in ((), ("other.json",), ("table.json",)):
            thread = threading.Thread(target=attempt, args=file)
            thread.start()
            thread.join()
    assert len(refused) == 1
    assert refused[0].startswith(f"{tmp_path / 'table.json'}: process {os.getpid()} on ")
    assert refused[0].endswith("is writing to this file; wait until it ends, or give another file")
    assert not (tmp_path / ".table.json.lock-owner").exists()


def test_a_thread_takes_its_own_lock_again_and_another_does_not(tmp_path: Path) -> None:
    refused = []

    def attempt() -> None:
        try:
            with locked(tmp_path):
                pass
        except BitscapeError as error:
            refused.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path / "." / ""):
            pass
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} on" in refused[0]
    attempt()
    assert len(refused) == 1


def test_files_of_two_writings_never_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = tmp_path / "net.xml", tmp_path / "net.bin"
    write_together({weights: b"old", graph: "old"})
    assert (weights.read_bytes(), graph.read_bytes()) == (b"old", b"old")
    for victim in (weights, graph):
        with monkeypatch.context() as patched:
            patched.setattr("bitscape.folders.write_atomic", lambda path, content, victim=victim: _write_unless(path, content, victim))
            with pytest.raises(KeyboardInterrupt):
                write_together({weights: b"new", graph: "new"})
        assert not graph.exists()


def _write_unless(path: Path, content: bytes | str, victim: Path) -> None:
    if path == victim:
        raise KeyboardInterrupt
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**9),
        (RuntimeError("Check 'bin_file' failed"), 1000),
        (BitscapeError("float.onnx: damaged"), 1000),
    ],
)
def test_a_full_disk_of_temporary_files_is_named(
    error: Exception, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(BitscapeError, match=rf"^{tmp_path}: no space left for temporary files; set TMPDIR"), scratch_folder():
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "/else/out.xml"), BitscapeError("no such layer")])
def test_what_fails_elsewhere_passes_through(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(type(error)) as raised, scratch_folder() as folder:
        assert folder.parent == tmp_path
        raise error
    assert raised.value is error


FORK = """
import os, sys
from pathlib import Path
from bitscape.errors import BitscapeError
from bitscape.folders import locked
folder = Path(sys.argv[1])

def in_child():
    if (child := os.fork()) == 0:
        try:
            with locked(folder):
                os._exit(0)
        except BitscapeError as error:
            os._exit(1 if f"process {os.getppid()} on" in str(error) else 2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

with locked(folder):
    print(in_child(), flush=True)
print(in_child(), flush=True)
with locked(folder):
    print((folder / ".lock-owner").read_text().split()[1] == str(os.getpid()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_is_one_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["1", "0", "True"], "")


def test_results_are_what_a_run_would_overwrite(tmp_path: Path) -> None:
    assert results_in(tmp_path / "absent") == []
    for name in (WEIGHTS_FILE, CHECKPOINT, "notes.txt", "run.json"):
        (tmp_path / name).touch()
    assert results_in(tmp_path) == [CHECKPOINT, WEIGHTS_FILE]
    assert [name for name in ("tier1", "tier12", "tiers", "policy.json", "search", "report.html") if is_written(name)] == [
        "tier1",
        "tier12",
        "policy.json",
        "search",
    ]
