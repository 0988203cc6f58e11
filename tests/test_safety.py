"""Files from elsewhere: nothing in them is run, and no name in them becomes a path outside the folder that was given."""

import ast
import builtins
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from bitscape.data.cache import cache_file
from bitscape.data.sources import load_dataset
from bitscape.dynamic.storage import load_tiers, read_tiers, tier_folder
from bitscape.errors import BitscapeError
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.runtimes.sessions import RUNTIMES
from bitscape.searches.scores import ScoreTable
from tests.dynamic.small import float_net
from tests.needs import runtime_or_skip

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("src", "benchmarks", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle", "pandas"}
OUTSIDE = ("../../outside", "/etc/passwd", "..", "a/../../b", "a\0b", "x" * 300, "tier1/../../outside")


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _violations(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import of {name}" for name in names if name.partition(".")[0] in UNPICKLING)
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        name = _called(node)
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False":
            yield f"{name} with allow_pickle"
        asks = name.endswith(".from_pretrained") or name == "datasets.load_dataset"  # on stdin, where nothing is given
        if given.get("trust_remote_code", "None" if asks else "False") != "False":
            yield f"{name} with code from elsewhere"
        if name.endswith(".from_pretrained") and given.get("use_safetensors") != "True":
            yield f"{name} without use_safetensors=True"
        if name == "Image.open" and "formats" not in given:
            yield f"{name} of any format"
        if name in ("eval", "exec", "__import__", "builtins.eval", "builtins.exec", "torch.hub.load", "torch.jit.load"):
            yield name


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import yaml",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "torch.hub.load(text, 'a')",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, use_safetensors=True)",
        "AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=None)",
        "datasets.load_dataset(name)",
        "datasets.load_dataset(name, trust_remote_code=trusted)",
        "Image.open(path)",
    ],
)
def test_each_way_to_run_a_file_is_seen(source: str) -> None:
    assert list(_violations(source))


def test_nothing_is_unpickled_or_run() -> None:
    assert len(SOURCES) > 100
    assert not list(_violations("model.eval(); torch.compile(model); np.load(path, allow_pickle=False); torch.load(p, weights_only=True)"))
    assert [f"{path.relative_to(ROOT)}: {found}" for path in SOURCES for found in _violations(path.read_text())] == []


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path that is opened, made or asked about."""
    seen: list[str] = []

    def noting(function):
        def call(path, *args, **settings):
            if isinstance(path, str | os.PathLike):
                seen.append(os.fspath(path))
            return function(path, *args, **settings)

        return call

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "mkdir"), (os, "scandir"), (os, "listdir")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    return seen


def _outside(opened: list[str]) -> list[str]:
    return [path for path in opened if "outside" in path or "passwd" in path or path.endswith("/b") or len(path) > 300]


@pytest.mark.parametrize("name", OUTSIDE)
def test_layer_names_are_no_paths(name: str, tmp_path: Path, opened: list[str]) -> None:
    Policy({name: LayerBits(4, 4)}, cost={name: 1.0}, provenance={"data": name, "weights": name}).save(tmp_path / "policy.json")
    policy = Policy.load(tmp_path / "policy.json")
    assert list(policy.layers) == [name]
    ScoreTable((name,), (LayerBits(4, 4),), [[1.0]], name).save(tmp_path / "scores.json")
    assert ScoreTable.load(tmp_path / "scores.json").layers == (name,)
    with pytest.raises(BitscapeError, match="the network has no layer"):
        with_quantizers(float_net(), policy)
    assert any(path.endswith("scores.json") for path in opened) and _outside(opened) == []
    assert {path.name for path in tmp_path.iterdir()} == {"policy.json", "scores.json"}


def test_names_in_packed_files_are_no_paths(tmp_path: Path, opened: list[str]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("/outside/passwd", nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = next(self.children())(x)
            return found

    policy = uniform_policy(layer_shapes(Odd()), LayerBits(4, 4))
    made = calibrate(with_quantizers(Odd(), policy), torch.randn(8, 4))
    save_packed(made, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(tmp_path / "net.safetensors", Odd())(torch.ones(1, 4)), made.eval()(torch.ones(1, 4)))
    assert _outside(opened) == []
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_folders_of_tiers_are_counted_not_named(tmp_path: Path) -> None:
    assert [tier_folder(tmp_path, at) for at in range(2)] == [tmp_path / "tier1", tmp_path / "tier2"]
    tier = {"bitops": 1, "mean_weight_bits": 4.0, "mean_activation_bits": 4.0, "share": 1.0}
    about = {"format": 1, "input_shape": [3, 8, 8], "gate_bitops": 1.0, "tiers": [{**tier, "folder": "../outside"}]}
    (tmp_path / "tiers.json").write_text(json.dumps(about))
    with pytest.raises(BitscapeError, match=r"tiers\.json: tiers\.0\.folder: Unexpected"):
        read_tiers(tmp_path)
    (tmp_path / "tiers.json").write_text(json.dumps({**about, "tiers": [tier] * 1000}))
    with pytest.raises(BitscapeError, match=r"tier1: no policy\.json"):
        load_tiers(float_net(), tmp_path)


def test_cached_images_lie_in_the_cache_whatever_the_data_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSCAPE_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "a .. b;rm -rf.parquet"
    data.write_bytes(b"data")
    for part in ("", "../../outside", "/etc/passwd"):
        kept = cache_file([data], 8, part)
        assert kept.parent == tmp_path / "cache"
        assert len(kept.stem) == 32 and set(kept.stem) <= set("0123456789abcdef")


def _with_weights_in(onnx: Any, location: str) -> bytes:
    """An ONNX file whose weights lie in another one."""
    weight = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    made: bytes = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    return made


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_onnx_file_reads_no_weights_outside_of_its_folder(runtime: str, tmp_path: Path) -> None:
    runtime_or_skip(runtime)
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "given" / "net.onnx"
    path.parent.mkdir()
    for file in (tmp_path / "outside.bin", path.with_name("inside.bin")):
        file.write_bytes(bytes(16))
    path.write_bytes(_with_weights_in(onnx, "inside.bin"))
    RUNTIMES[runtime]().open(path)
    for location in ("../outside.bin", str(tmp_path / "outside.bin")):
        path.write_bytes(_with_weights_in(onnx, location))
        with pytest.raises(BitscapeError, match=r"net\.onnx"):
            RUNTIMES[runtime]().open(path)


def _png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


class Table:
    """The part of `datasets.Dataset` that is used."""

    column_names = ("image",)
    features: dict[str, None] = {}  # noqa: RUF012 - it stands for an instance

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, object]]:
        return iter(self.rows)

    def cast_column(self, name: str, feature: object) -> "Table":
        return self

    def select_columns(self, names: list[str]) -> "Table":
        return self

    def select(self, numbers: list[int]) -> "Table":
        return Table([self.rows[number] for number in numbers])


def test_a_table_from_the_hub_opens_no_file_outside_of_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "private.png").write_bytes(_png(200))
    (tmp_path / "cache" / "link.png").symlink_to(tmp_path / "private.png")
    paths = [tmp_path / "private.png", tmp_path / "cache" / ".." / "private.png", tmp_path / "cache" / "link.png"]
    for number in range(30):
        (tmp_path / "cache" / f"{number}.png").write_bytes(_png(number))
        paths.append(tmp_path / "cache" / f"{number}.png")
    rows = [{"image": {"bytes": None, "path": str(path)}} for path in paths]
    config = SimpleNamespace(HF_CACHE_HOME=str(tmp_path / "cache"))
    module = SimpleNamespace(load_dataset=lambda name, split, trust_remote_code: Table(rows), Image=lambda decode: None, config=config)
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = load_dataset("hf:some/pets")
    assert found.images[:, 0, 0, 0].tolist() == list(range(30))


@pytest.mark.parametrize("name", ["../pets", "/etc", "a/../..", "./pets", "~/pets", "a/b/c", "pets/", "C:\\pets", "", ".hidden/pets"])
def test_a_folder_is_no_name_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("asked for")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(BitscapeError, match=r"not a name on the hub|names no data set"):
        load_dataset(f"hf:{name}")
