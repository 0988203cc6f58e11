"""The checks and the user's files of the way to a first policy; the installation itself is the benchmark."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import first_policy
from benchmarks.common import RESULTS
from benchmarks.first_policy import (
    AGAIN,
    COUNTED,
    KEYS,
    Steps,
    clean,
    files_of_source,
    files_of_wheel,
    megabytes,
    outside,
    pinned,
    used,
    user_files,
    wanted,
)
from bitscape.data.sources import Dataset, load_dataset
from bitscape.models.find import find_model, load_weights
from bitscape.policy import LayerBits, Policy
from bitscape.report.records import identity, read_runs


def test_the_files_of_a_wheel_are_those_of_its_source(tmp_path: Path):
    source = tmp_path / "bitscape"
    for name in ("a.py", "py.typed", "report/templates/page.html", "report/__pycache__/a.cpython-311.pyc"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in ("bitscape/a.py", "bitscape/report/templates/page.html", "bitscape-0.1.dist-info/METADATA"):
            archive.writestr(name, "text")
    assert files_of_source(source) == {"a.py", "py.typed", "report/templates/page.html"}
    assert files_of_wheel(tmp_path / "a.whl") == {"a.py", "report/templates/page.html"}


def test_modules_of_the_library_and_of_allowed_folders_are_not_from_outside(tmp_path: Path):
    library = Path(sysconfig.get_path("stdlib"))
    own, foreign = str(tmp_path / "env" / "lib" / "a.py"), [str(tmp_path / "b.py"), str(library / "site-packages" / "c.py")]
    assert outside([own, str(library / "json" / "decoder.py"), *foreign], [tmp_path / "env"]) == foreign


def test_no_variable_leads_to_other_code():
    given = {"PYTHONPATH": "src", "PYTHONHOME": "x", "VIRTUAL_ENV": "y", "BITSCAPE_DATA": "z", "PATH": "/bin"}
    kept = clean(given)
    assert kept.pop("OMP_NUM_THREADS") == str(torch.get_num_threads())
    assert kept.pop("BITSCAPE_CACHE").startswith("/dev/null")
    assert kept == {"PATH": "/bin", "PIP_NO_CACHE_DIR": "1"}


def test_a_pin_is_that_of_the_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "constraints.txt").write_text("pytorch==1.0\ntorchvision==0.28.0\ntorch==2.13.0\n")
    monkeypatch.setattr(first_policy, "ROOT", tmp_path)
    assert pinned("torch") == "2.13.0"


def test_steps_run_in_their_folder_and_are_timed(tmp_path: Path):
    steps = Steps(folder=tmp_path)
    assert steps.do("wait", sys.executable, "-I", "-c", "import os, time; time.sleep(0.1); print(os.getcwd())").strip() == str(
        tmp_path.resolve()
    )
    assert steps.seconds["wait"] >= 0.1
    with pytest.raises(SystemExit, match=r"fail: exit code 3\nsaid"):
        steps.do("fail", sys.executable, "-I", "-c", "print('said'); raise SystemExit(3)")
    assert set(steps.seconds) == {"wait"}


def test_the_users_files_are_a_network_its_weights_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset("drawn", images, torch.tensor([0, 1, 1, 0, 1]), ("cat", "dog"))
    monkeypatch.setattr(first_policy, "load_dataset", lambda *_, **__: data)
    user_files(tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "dog" / "2.png")), images[2].permute(1, 2, 0).numpy())
    monkeypatch.setenv("BITSCAPE_CACHE", str(tmp_path / "cache"))
    read = load_dataset(str(tmp_path / "images"))
    assert read.class_names == ("cat", "dog") and sorted(read.labels.tolist()) == [0, 0, 1, 1, 1]
    network = find_model(f"{tmp_path}/my_net.py:my_net").eval()
    load_weights(network, tmp_path / "own.safetensors")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(isinstance(module, torch.nn.Conv2d) for module in network.modules()) == 6


def test_what_was_loaded_is_written_whatever_the_command_does(tmp_path: Path):
    (tmp_path / "again.py").write_text(AGAIN)
    command = [sys.executable, "again.py", "loaded.json", "policy", "show", "missing.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "missing.json" in done.stderr
    loaded = json.loads((tmp_path / "loaded.json").read_text())
    assert any(name.endswith("bitscape/cli/__init__.py") for name in loaded)
    assert outside(loaded, [Path(sys.prefix), first_policy.ROOT, tmp_path.resolve()]) == []
    assert outside(loaded, []) != []


class Written(Steps):
    """Runs nothing, but writes what the searches would: policies of the given weight bits, in turn."""

    def do(self, name: str, *command: object) -> str:
        if "search" in name:
            Policy({"0": LayerBits(BITS.pop(0), 8)}).save(self.folder / str(command[-1]))
            (self.folder / "loaded.json").write_text("[]")
        DONE.append(name)
        return ""


BITS: list[int] = []
DONE: list[str] = []


def test_the_search_comes_before_all_that_would_import_torch_and_its_policy_must_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr(first_policy, "user_files", lambda folder: None)
    monkeypatch.setattr(first_policy, "Steps", Written)
    BITS[:], DONE[:] = [4, 4], []
    assert used(Written(folder=tmp_path), tmp_path, "bitops=w4a4").layers == {"0": LayerBits(4, 8)}
    assert DONE[0] == "bitscape search" and DONE[-1] == "the search again"
    BITS[:] = [4, 8]
    with pytest.raises(SystemExit, match="the same search found another policy"):
        used(Written(folder=tmp_path), tmp_path, "bitops=w4a4")


def test_sizes_count_each_file_once(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(bytes(1_500_000))
    (tmp_path / "b").write_bytes(bytes(250_000))
    (tmp_path / "link").symlink_to(tmp_path / "inner" / "a")
    assert megabytes(tmp_path) == 1.8  # 1.75, rounded to even


def test_rows_that_were_measured_are_still_wanted_and_add_up():
    runs = read_runs(RESULTS / "first-policy.jsonl")
    plan = [{**run, "settings": {**run["settings"], "python": None}} for run in wanted(len(runs))]
    measured = [{**run, "settings": {**run["settings"], "python": None}} for run in runs]
    assert runs and {identity(run, KEYS) for run in measured} <= {identity(run, KEYS) for run in plan}
    for run in runs:
        assert run["extra"]["to_policy_s"] == pytest.approx(sum(run["extra"]["steps_s"][name] for name in COUNTED))
        assert run["search_s"] == run["extra"]["steps_s"]["bitscape search"]
