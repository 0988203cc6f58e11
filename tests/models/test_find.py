import copy
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bitscape
from bitscape.errors import BitscapeError
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.models.attention import split_attention
from bitscape.models.find import find_model, import_torchvision, load_weights, save_weights
from bitscape.models.preprocessing import ImageConfig, image_config
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.searches.fisher import Fisher
from bitscape.searches.problem import SearchProblem

pytestmark = pytest.mark.slow

NETWORK = """
from neighbour import WIDTH
from torch import nn

def small(outputs=2):
    return nn.Linear(WIDTH, outputs)

def nothing():
    return None

ready = nn.ReLU()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_mine.py").write_text(NETWORK)
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    (tmp_path / "broken_net.py").write_text("import no_such_package\n")
    (tmp_path / "typo_net.py").write_text("def f(:\n")
    yield tmp_path
    for module in ("nets_of_mine", "neighbour", "broken_net", "typo_net"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("name", ["nets_of_mine:small", "nets_of_mine.py:small", "{folder}/nets_of_mine.py:small"])
def test_finds_a_function_by_module_and_by_file(folder, name):
    path_before = sys.path.copy()
    model = find_model(name.format(folder=folder), outputs=5)
    assert model.weight.shape == (5, 3)
    assert sys.path == path_before


def test_files_of_one_name_in_two_folders_stay_apart(tmp_path):
    for index, side in enumerate(("a", "b"), start=1):
        (tmp_path / side).mkdir()
        (tmp_path / side / "net.py").write_text(f"from torch import nn\ndef net(): return nn.Linear({index}, 1)\n")
    models = [find_model(f"{tmp_path}/{side}/net.py:net") for side in ("a", "b", "a")]
    assert [model.in_features for model in models] == [1, 2, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", 'write "package.module:function"'),
        (":resnet18", 'write "package.module:function"'),
        ("nets_of_mine:", 'write "package.module:function"'),
        ("nets_of_mine:smal", "has no 'smal'; nearest: small"),
        ("nets_of_mine:nothing", "returned NoneType; it must return an nn.Module"),
        ("nets_of_mine:ready", "is a ReLU; name a function"),
        ("nets_of_yours:small", "cannot be imported: No module named 'nets_of_yours'"),
        ("os:system", "cannot be called: missing a required argument: 'command'; name a function that builds the network by itself"),
        ("broken_net:small", "cannot be imported: No module named 'no_such_package'"),
        ("broken_net.py:small", "cannot be imported: No module named 'no_such_package'"),
        ("typo_net.py:small", "cannot be imported: invalid syntax"),
        ("missing.py:small", "no file 'missing.py'"),
    ],
)
def test_what_cannot_be_found_is_named(folder, name, message):
    with pytest.raises(BitscapeError, match=message):
        find_model(name)


def test_an_argument_that_the_function_does_not_take_is_named(folder):
    with pytest.raises(BitscapeError, match="'nets_of_mine:small' cannot be called: got an unexpected keyword argument 'width'"):
        find_model("nets_of_mine:small", width=3)


def test_an_error_of_the_users_function_passes_through(folder):
    Path("fails.py").write_text("def small():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        find_model("fails.py:small")


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_zoo_models(zoo):
    if importlib.util.find_spec(zoo) is None:
        with pytest.raises(BitscapeError, match="is not installed"):
            find_model(f"{zoo}:resnet18")
        return
    assert sum(p.numel() for p in find_model(f"{zoo}:resnet18").parameters()) == 11_689_512
    with pytest.raises(BitscapeError, match=f"{zoo} has no model 'resnet19'; nearest: .*resnet18"):
        find_model(f"{zoo}:resnet19")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small image classifier of transformers, its weights drawn."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    with suppress(BitscapeError):
        import_torchvision()
    import transformers

    folder = tmp_path_factory.mktemp("hf") / "tiny"
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings)).save_pretrained(folder)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_folder_of_hugging_face_gives_logits_under_its_own_names(hugging_face):
    import transformers

    model = find_model(f"hf:{hugging_face}").eval()
    own = transformers.AutoModelForImageClassification.from_pretrained(hugging_face).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), own(images).logits)
        assert torch.equal(copy.deepcopy(model)(images), model(images))
    assert model.state_dict().keys() == own.state_dict().keys() and isinstance(model, type(own))
    assert image_config(model) == ImageConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), size=32)


def test_a_folder_of_hugging_face_is_searched_and_quantized(hugging_face):
    model = find_model(f"hf:{hugging_face}").eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    policy = Fisher().search(SearchProblem.of(model=model, samples=images, budget="bitops=w4a4")).policy
    quantized = calibrate(with_quantizers(model, policy), images).eval()
    assert quantized(images).shape == (4, 4) and "resnet.embedder.embedder.convolution" in policy.layers


def test_what_is_no_classifier_of_hugging_face_is_an_error(hugging_face, tmp_path):
    with pytest.raises(BitscapeError, match=f"transformers cannot load hf:{tmp_path}; it must be an image classifier with safetensors"):
        find_model(f"hf:{tmp_path}")
    (hugging_face / "model.safetensors").rename(tmp_path / "model.safetensors")
    try:
        with pytest.raises(BitscapeError, match="with safetensors weights"):
            find_model(f"hf:{hugging_face}")
    finally:
        (tmp_path / "model.safetensors").rename(hugging_face / "model.safetensors")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BitscapeError, match=r"transformers is not installed; run `pip install 'bitscape\[huggingface\]'`"):
        find_model("hf:some/network")


def _run(code: str, folder: Path) -> str:
    importable = os.pathsep.join([str(folder), str(Path(bitscape.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": importable}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


ZOO = """
from torch import nn
def plain(*, weights='download', out_features=1):
    assert weights is None
    return nn.Linear(1, out_features)
def on_backbone(*, weights=None, weights_backbone='download'):
    assert weights is None and weights_backbone is None
    return nn.Linear(1, 7)
def list_models(): return ['one', 'segmenting']
def get_model_builder(name): return plain if name == 'one' else on_backbone
def get_model(name, **kwargs): return get_model_builder(name)(**kwargs)
"""


def test_torchvision_without_its_compiled_part_is_helped_and_nothing_is_downloaded(tmp_path):
    # Same failure as the CUDA wheel beside a CPU-only torch: the second import needs schemas that nothing declared.
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("from torchvision import _meta, models\n")
    (tmp_path / "torchvision" / "models.py").write_text(ZOO)
    (tmp_path / "torchvision" / "_meta.py").write_text(
        "import torch\nfor name in ('nms', 'qnms'): torch.library.register_fake(f'torchvision::{name}')(lambda *a: a)\n"
    )
    code = """
        from bitscape.models.find import find_model
        print(find_model("torchvision:one", out_features=4))
        print(find_model("torchvision:one", out_features=5))
        print(find_model("torchvision:segmenting"))
    """
    shown = _run(code, tmp_path)
    assert all(f"out_features={size}" in shown for size in (4, 5, 7))


def test_another_failure_of_torchvision_is_not_hidden(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no disk')\n")
    code = """
        from bitscape.models.find import find_model
        try:
            find_model("torchvision:one")
        except RuntimeError as error:
            print(error)
    """
    assert _run(code, tmp_path) == "no disk\n"


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def _saved(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("counted", [True, False])
def test_loads_with_and_without_the_norms_counters(tmp_path, counted):
    source, target = _network(), _network()
    state = {k: v for k, v in source.state_dict().items() if counted or "num_batches_tracked" not in k}
    load_weights(target, _saved(tmp_path, state))
    assert torch.equal(target[0].weight, source[0].weight)


def test_a_counter_that_the_network_lacks_is_no_error(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1))
    load_weights(model, _saved(tmp_path, model.state_dict() | {"1.num_batches_tracked": torch.tensor(3)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.weight"), "missing in the file: 0.weight"),
        (lambda state: state.update({"0.wieght": state.pop("0.weight")}), "0.weight; nearest: 0.wieght"),
        (lambda state: state.update({"2.weight": torch.zeros(1)}), "not in the network: 2.weight; nearest: "),
        (lambda state: state.update({"0.weight": torch.zeros(2, 1, 5, 5)}), "size mismatch for 0.weight"),
        (
            lambda state: state.update({"0.bias": torch.zeros(2, dtype=torch.int32)}),
            "of another kind: 0.bias is torch.int32 of shape .2,., in",
        ),
        (lambda state: state.update({"1.num_batches_tracked": torch.tensor(1.5)}), "1.num_batches_tracked is torch.float32"),
        (lambda state: state.update({f"x{i}": torch.zeros(1) for i in range(7)}), "and 2 more"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    state = _network().state_dict()
    change(state)
    with pytest.raises(BitscapeError, match=message):
        load_weights(_network(), _saved(tmp_path, state))


class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_that_ask_for_the_version_of_a_state_dict_load(tmp_path):
    source, target = nn.Sequential(Versioned(2, 2)), nn.Sequential(Versioned(2, 2))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target[0].weight, source[0].weight)


def test_modules_that_ask_for_the_version_of_a_state_dict_are_read_from_packed_files(tmp_path):
    source, x = nn.Sequential(nn.Linear(2, 2), Versioned(2, 2)), torch.randn(8, 2)
    quantized = calibrate(with_quantizers(source, uniform_policy(["0", "1"], LayerBits(4, 8))), x).eval()
    info = save_packed(quantized, tmp_path / "p.safetensors")
    assert torch.equal(load_packed(info.path, source).eval()(x), quantized(x))


def test_half_precision_weights_load(tmp_path):
    source, target = _network(), _network()
    load_weights(
        target, _saved(tmp_path, {key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()})
    )
    assert target[0].weight.dtype == torch.float32 and torch.equal(target[0].weight, source[0].weight.half().float())


def test_the_state_of_a_quantizer_has_one_shape(tmp_path):
    made = with_quantizers(_network(), uniform_policy(["0"], LayerBits(4, 4)))
    state = {key: value.clone() for key, value in made.state_dict().items()}
    name = next(key for key in state if key.endswith("_extra_state"))
    for shape in ((1,), (2,), (4,), (3, 3)):
        wrong = torch.zeros(shape, dtype=torch.int32)
        with pytest.raises(BitscapeError, match=f"of another kind: {name} is torch.int32 of shape"):
            load_weights(made, _saved(tmp_path, {**state, name: wrong}))


def test_truncated_foreign_and_absent_files_are_errors(tmp_path):
    path = _saved(tmp_path, _network().state_dict())
    for content in (path.read_bytes()[:-10], path.read_bytes()[:20], b"", b"PK\x03\x04 a pickled network"):
        path.write_bytes(content)
        with pytest.raises(BitscapeError, match="is not a complete safetensors file"):
            load_weights(_network(), path)
    with pytest.raises(BitscapeError, match="no file"):
        load_weights(_network(), tmp_path / "absent.safetensors")


def test_a_tensor_with_two_names_may_be_stored_under_one(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    state = model.state_dict()
    del state["1.weight"]
    expected = state["0.weight"].clone()
    path = _saved(tmp_path, state)
    nn.init.zeros_(model[0].weight)
    load_weights(model, path)
    assert torch.equal(model[1].weight, expected)


def test_float_weights_load_into_split_attention(tmp_path):
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    split = split_attention(nn.TransformerEncoderLayer(4, 2, 8))
    load_weights(split, _saved(tmp_path, layer.state_dict()))
    assert torch.equal(split.self_attn.k_proj.weight, layer.self_attn.in_proj_weight[4:8])


def test_of_many_unknown_tensors_five_are_looked_up(tmp_path, monkeypatch):
    looked_up = []
    monkeypatch.setattr("bitscape.models.find.nearest", lambda name, options: looked_up.append(name) or "")
    save_weights({f"layer{at:05}": torch.zeros(0) for at in range(10_000)}, tmp_path / "w.safetensors")
    with pytest.raises(BitscapeError, match=r"not in the network: (layer\d+, ){5}and 9995 more"):
        load_weights(nn.ReLU(), tmp_path / "w.safetensors")
    assert len(looked_up) == 5


def test_no_code_of_a_hugging_face_folder_is_run_and_nothing_asked(tmp_path, monkeypatch):
    given = {}

    def from_pretrained(name, **settings):
        given.update(settings)
        raise ValueError("refused")

    library = SimpleNamespace(AutoModelForImageClassification=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", library)
    with pytest.raises(BitscapeError, match="refused"):
        find_model(f"hf:{tmp_path}")
    assert given == {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
