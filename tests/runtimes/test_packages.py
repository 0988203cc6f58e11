import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitscape.errors import BitscapeError
from bitscape.runtimes import packages
from bitscape.runtimes.packages import EXTRAS, runtime_module
from bitscape.runtimes.sessions import RUNTIMES
from tests.needs import runtime_or_skip

ROOT = Path(__file__).parents[2]
SESSION = """
import sys, tempfile, torch
from torch import nn
from bitscape.exporters.onnx.qdq import save_onnx
from bitscape.exporters.tflite.file import save_tflite
from bitscape.runtimes.litert import LiteRt
from bitscape.runtimes.sessions import RUNTIMES
from tests.exporters.networks import images, quantized

network = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)))
with tempfile.TemporaryDirectory() as folder:
    if sys.argv[1] == "ai_edge_litert":
        info, runtime = save_tflite(network, folder + "/net.tflite", images()), LiteRt()
    else:
        info, runtime = save_onnx(network, folder + "/net.onnx", images(), containers=(8,)), RUNTIMES[sys.argv[1]]()
    runtime.open(info.path).run(images(2).numpy())
"""


@pytest.mark.parametrize("runtime", [*RUNTIMES, "ai_edge_litert"])
def test_no_runtime_leaves_a_file_in_the_users_folders(runtime: str, tmp_path: Path) -> None:
    runtime_or_skip(runtime)
    pytest.importorskip("onnxscript")
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    hidden = {"ORT_DISABLE_TELEMETRY", "CI", "TF_BUILD", "JENKINS_URL"}  # OpenVINO sends nothing from where the last three are set
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    # Compiled modules have a folder of their own, as torch's caches have.
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch")}
    python_path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-c", SESSION, runtime]
    subprocess.run(command, env={**inherited, **own, "PYTHONPATH": python_path}, cwd=tmp_path, check=True)
    assert [path for folder in (home, cache) for path in folder.rglob("*")] == []


def test_the_users_choice_for_onnx_runtime_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_or_skip("onnxruntime")
    for choice, expected in (("0", "0"), ("1", "1"), (None, "1")):
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY") if choice is None else monkeypatch.setenv("ORT_DISABLE_TELEMETRY", choice)
        runtime_module("onnxruntime")
        assert os.environ["ORT_DISABLE_TELEMETRY"] == expected


class TestOpenvinoTelemetry:
    @pytest.fixture
    def loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
        """A package in the place of the one that sends; the user's home is a new folder."""
        monkeypatch.setenv("HOME", str(tmp_path))
        package = object()
        monkeypatch.setitem(sys.modules, packages._TELEMETRY, package)
        return package

    def test_it_is_hidden_during_the_import_alone(self, loaded: object) -> None:
        with packages._without_openvino_telemetry(), pytest.raises(ImportError):
            __import__(packages._TELEMETRY)
        assert sys.modules[packages._TELEMETRY] is loaded

    @pytest.mark.parametrize("consent", ["0", "1"])
    def test_the_users_choice_stands(self, loaded: object, consent: str, tmp_path: Path) -> None:
        (tmp_path / "intel").mkdir()
        (tmp_path / "intel" / packages._TELEMETRY).write_text(consent)
        with packages._without_openvino_telemetry():
            assert sys.modules[packages._TELEMETRY] is loaded


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, extra in EXTRAS.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(BitscapeError, match=rf"{package}.*pip install 'bitscape\[{extra}\]'"):
            runtime_module(package)


def _imported(path: Path) -> set[str]:
    """Top-level packages that a file imports by a statement, or by pytest.importorskip."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Call) and "importorskip" in ast.dump(node.func) and node.args and isinstance(node.args[0], ast.Constant):
            names.append(str(node.args[0].value))
    return {name.partition(".")[0] for name in names}


def test_no_other_file_imports_a_runtime() -> None:
    files = [path for folder in ("src", "benchmarks", "tests", "recipes") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [path.name for path in files if _imported(path) & set(EXTRAS)] == []
