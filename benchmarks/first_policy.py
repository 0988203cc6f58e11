"""first-policy: seconds from `pip install` to the first policy of a user's own network, step by step, in an environment made for it.

    python -m benchmarks.first_policy [--repeats 2]

A wheel is built from the checkout and installed, without pip's cache, with the versions of constraints.txt, into an environment in a
temporary folder. There, away from the checkout, the commands of `bitscape` run on a user's network (a file of Python, six convolutions,
random weights) and on a folder of PNG images: 512 of CIFAR-10 in class folders. The search comes first, so that it is what imports torch
for the first time; other commands follow. What counts are the environment, both installs and the search.

Checked, and an error instead of a row: the wheel holds every file of src/bitscape and no other; torch is the one of constraints.txt; the
search, done again, writes the same policy and loads no module from outside the environment, Python's library and the user's folder.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import DATA, bits_of, do_missing
from bitscape.data.sources import load_dataset
from bitscape.models.find import find_model, save_weights
from bitscape.policy import Policy

NAME = "first-policy"
KEYS = ("network", "target", "method", "settings", "seed")
ROOT = Path(__file__).parents[1]
IMAGES = 512
COUNTED = ("make the environment", "install torch", "install the wheel", "bitscape search")
"""The steps from nothing to a policy; others build the wheel, or look around."""
FOREIGN = ("PYTHON", "BITSCAPE_", "VIRTUAL_ENV")
"""Beginnings of variables that could lead to other code."""

MY_NET = """from torch import nn


def block(before, after, stride=1):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def my_net():
    blocks = block(3, 16), block(16, 16), block(16, 32, 2), block(32, 32), block(32, 64, 2), block(64, 64)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
"""
AGAIN = """import json, os, sys
from bitscape.cli import main
try:
    main(sys.argv[2:])
finally:
    files = {getattr(module, "__file__", None) or "" for module in sys.modules.values()}
    with open(sys.argv[1], "w") as out:
        json.dump(sorted(filter(os.path.isabs, files)), out)  # torch calls two modules that have no file by a bare name
"""
ABOUT = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"


def wanted(repeats: int = 2) -> Iterator[dict[str, Any]]:
    """The same run, several times."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    settings = {"images": IMAGES, "budget": "bitops=w4a4", "pip_cache": False, "python": python}
    for seed in range(repeats):
        yield {"network": "my_net", "target": "cifar10", "method": "fisher", "settings": settings, "seed": seed}


@dataclass(kw_only=True)
class Steps:
    """Commands done in one folder, and how long each took."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def do(self, name: str, *command: object) -> str:
        """Run a command to its end and return what it printed. Raises SystemExit if it fails."""
        begun = time.perf_counter()
        done = subprocess.run(list(map(str, command)), cwd=self.folder, env=clean(os.environ), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        self.seconds[name] = round(time.perf_counter() - begun, 2)
        return done.stdout


def clean(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables without those that lead to other code; no caches, the threads of this process."""
    kept = {name: value for name, value in variables.items() if not name.startswith(FOREIGN)}
    return {**kept, "BITSCAPE_CACHE": f"{os.devnull}/cache", "OMP_NUM_THREADS": str(torch.get_num_threads()), "PIP_NO_CACHE_DIR": "1"}


def files_of_wheel(wheel: Path) -> set[str]:
    """Files of the package, as paths below its folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {name.removeprefix("bitscape/") for name in archive.namelist() if name.startswith("bitscape/")}


def files_of_source(source: Path) -> set[str]:
    """What the wheel should hold: all files but compiled ones."""
    return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def outside(files: Iterable[str], allowed: Sequence[Path]) -> list[str]:
    """Files that lie neither in the allowed folders nor in Python's library."""
    library = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return [name for name in files if not any(map(Path(name).is_relative_to, allowed)) and not _of_library(Path(name), library)]


def _of_library(path: Path, library: Sequence[Path]) -> bool:
    return any(map(path.is_relative_to, library)) and not {"site-packages", "dist-packages"} & set(path.parts)


def megabytes(folder: Path) -> float:
    """Size of all files in a folder."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6, 1)


def user_files(folder: Path) -> None:
    """A network in a file, its weights, and images in class folders: made outside of the environment, which stays untouched."""
    (folder / "my_net.py").write_text(MY_NET)
    torch.manual_seed(0)
    save_weights(find_model(f"{folder}/my_net.py:my_net").state_dict(), folder / "own.safetensors")
    data = load_dataset(str(DATA / "cifar10_test.parquet"), limit=IMAGES)
    assert data.labels is not None
    for at, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        path = folder / "images" / data.class_names[label] / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def installed(steps: Steps, place: Path) -> dict[str, Any]:
    """Build the wheel, make the environment and install; what was installed."""
    python, quiet = place / "env" / "bin" / "python", ("--quiet", "--disable-pip-version-check")
    install = (python, "-m", "pip", "install", *quiet, "--no-cache-dir", "-c", ROOT / "constraints.txt")
    steps.do("build the wheel", sys.executable, "-m", "pip", "wheel", *quiet, "--no-deps", "--no-cache-dir", "-w", place / "wheel", ROOT)
    (wheel,) = (place / "wheel").glob("bitscape-*.whl")
    inside, source = files_of_wheel(wheel), files_of_source(ROOT / "src" / "bitscape")
    if inside != source:
        raise SystemExit(f"the wheel lacks {sorted(source - inside)} and holds besides {sorted(inside - source)}")
    steps.do("make the environment", sys.executable, "-m", "venv", place / "env")
    steps.do("install torch", *install, "torch")
    steps.do("install the wheel", *install, wheel)
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    versions = json.loads(subprocess.run([python, "-I", "-c", ABOUT], capture_output=True, text=True, check=True).stdout)
    if versions["torch"].partition("+")[0] != pinned("torch"):
        raise SystemExit(f"torch {versions['torch']} was installed, and constraints.txt says {pinned('torch')}")
    sizes = {"environment_mb": megabytes(place / "env"), "torch_mb": megabytes(site / "torch"), "bitscape_mb": megabytes(site / "bitscape")}
    return {**sizes, "wheel_kb": round(wheel.stat().st_size / 1e3, 1), "wheel_files": len(inside), "installed": versions}


def pinned(package: str) -> str:
    """Version of a package in constraints.txt."""
    found = re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found
    return found[1]


def used(steps: Steps, place: Path, budget: str) -> Policy:
    """Search, then look around; the policy."""
    bitscape, home = place / "env" / "bin" / "bitscape", steps.folder
    user_files(home)
    own = ("--model", "my_net.py:my_net", "--data", "images", "--normalize", "cifar10")
    search = ("search", *own, "--weights", "own.safetensors", "--budget", budget)
    steps.do("bitscape search", bitscape, *search, "--out", "policy.json")
    steps.do("bitscape --help", bitscape, "--help")
    steps.do("bitscape demo", bitscape, "demo")
    steps.do("bitscape train", bitscape, "train", *own, "--epochs", 3, "--lr", 0.1, "--batch-size", 32, "--out", "trained")
    steps.do("bitscape report", bitscape, "report", "policy.json", *own[:2], "--input-shape", "3x32x32", "--out", "report.html")
    (home / "again.py").write_text(AGAIN)
    again = Steps(folder=home)
    again.do("the search again", place / "env" / "bin" / "python", "again.py", "loaded.json", *search, "--out", "again.json")
    if (home / "again.json").read_bytes() != (home / "policy.json").read_bytes():
        raise SystemExit("the same search found another policy")
    if foreign := outside(json.loads((home / "loaded.json").read_text()), (place / "env", home)):
        raise SystemExit(f"modules from outside: {foreign}")
    return Policy.load(home / "policy.json")


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """All steps in a folder of their own, which is gone afterwards."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        (place / "home").mkdir()
        steps = Steps(folder=place / "home")
        about = installed(steps, place)
        policy = used(steps, place, run["settings"]["budget"])
    counted = round(sum(steps.seconds[name] for name in COUNTED), 2)
    load_average = [round(before, 2), round(os.getloadavg()[0], 2)]
    extra = {"to_policy_s": counted, "steps_s": steps.seconds, **about, "load_average": load_average}
    return {**run, "policy": bits_of(policy), "search_s": steps.seconds["bitscape search"], "clock": "wall", "extra": extra}


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of the commands")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    do_missing(NAME, KEYS, wanted(options.repeats), measure)


if __name__ == "__main__":
    main()
