"""Commands of the command line on the digits network, each with what it leaves: for processes that are killed and disks that are full."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitscape.policy import LayerBits, uniform_policy

MODEL = ("--model", "bitscape.models.digits:digits_net")
DATA = ("--data", "digits")
RUN = "import sys; from bitscape.cli import main; main(sys.argv[1:])"
_TIMES = re.compile(rb'"(train_s|[a-z_]*seconds)": [0-9.e-]+')
Files = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, and the files that it leaves in its folder."""

    arguments: Callable[[Path, Path], Sequence[object]]
    """Of the command line, from the folder of inputs and its own folder."""
    artefacts: tuple[str, ...]
    """Files that must be the same whatever happened before; times in them do not count."""
    resumable: str = ""
    """The file that `--resume` goes on from; without it the same command starts anew."""

    def command(self, inputs: Path, folder: Path) -> list[str]:
        """The whole command line."""
        resume = ["--resume"] if self.resumable and (folder / self.resumable).is_file() else []
        return [sys.executable, "-W", "ignore", "-c", RUN, *map(str, self.arguments(inputs, folder)), *resume]

    def found(self, folder: Path) -> Files:
        """Its files that are there, without times."""
        return {name: _TIMES.sub(b"", (folder / name).read_bytes()) for name in self.artefacts if (folder / name).is_file()}


def _export(kind: str, name: str) -> Job:
    def arguments(inputs: Path, folder: Path) -> Sequence[object]:
        source = ("--weights", inputs / "model.safetensors", "--policy", inputs / "w4.json")
        return ("export", kind, *MODEL, *source, "--calibration", "digits", "--calibration-images", 64, "--out", folder / name)

    return Job(arguments=arguments, artefacts=(name,))


def _search(inputs: Path, folder: Path) -> Sequence[object]:
    method = ("--method", "differentiable", "--set", "epochs=12", "--set", "batch_size=32", "--images", 512, "--budget", "bitops=w4a4")
    outputs = ("--folder", folder / "kept", "--out", folder / "policy.json", "--scores", folder / "scores.json")
    return ("search", *MODEL, "--weights", inputs / "model.safetensors", *DATA, *method, *outputs)


def _train(inputs: Path, folder: Path) -> Sequence[object]:
    source = ("--weights", inputs / "model.safetensors", "--policy", inputs / "w4.json")
    recipe = ("--epochs", 12, "--batch-size", 64, "--lr", 0.02, "--ema", 0.99, "--step", "saq")
    return ("train", *MODEL, *DATA, *source, "--validation", "digits", *recipe, "--out", folder / "run")


JOBS: dict[str, Job] = {
    "search": Job(arguments=_search, artefacts=("policy.json", "scores.json", "kept/policy.json")),
    "train": Job(
        arguments=_train,
        artefacts=("run/model.safetensors", "run/policy.json", "run/metrics.jsonl"),
        resumable="run/checkpoint.safetensors",
    ),
    "export packed": _export("packed", "packed.safetensors"),
    "export onnx": _export("onnx", "network.onnx"),
    "export qonnx": _export("qonnx", "network.qonnx.onnx"),
}


def environment() -> dict[str, str]:
    """One thread; no decoded images are kept."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "BITSCAPE_CACHE": f"{os.devnull}/cache"}


def run(command: Sequence[str], **settings: object) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, **settings)  # type: ignore[call-overload,no-any-return]  # settings are free


def make_inputs(folder: Path) -> None:
    """A trained float network and a policy for it: what the jobs start from."""
    from bitscape.models.digits import digits_net
    from bitscape.models.layers import layer_shapes

    uniform_policy(layer_shapes(digits_net()), LayerBits(4, 4)).save(folder / "w4.json")
    arguments = ("train", *MODEL, *DATA, "--epochs", 2, "--lr", 0.1, "--batch-size", 64, "--out", folder)
    done = run([sys.executable, "-W", "ignore", "-c", RUN, *map(str, arguments)])
    if done.returncode:
        raise RuntimeError(done.stderr)


def temporary_files(folder: Path) -> list[Path]:
    """What writing leaves while it lasts, and after a kill."""
    return [path for path in folder.rglob(".*.tmp") if path.is_file()]
