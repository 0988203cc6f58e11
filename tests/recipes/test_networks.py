import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recipes.networks
from bitscape.errors import BitscapeError
from bitscape.models.find import find_model
from bitscape.models.layers import quantizable_layers
from recipes.networks import WEIGHTS, load

pytestmark = pytest.mark.slow

# Parameter counts as the sources of the weights state them.
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet20_apot": 272_474,
    "cct4": 567_819,
    "resnet8_kc": 89_322,
    "resnet14_kc": 186_538,
    "wrn16_1_kc": 175_066,
    "resnet8_kc_cifar100": 112_452,
    "resnet14_kc_cifar100": 209_668,
    "resnet20_kc": 306_884,
    "resnet32_kc": 501_316,
    "mobilenetv2_tfslim": 3_487_816,
    "squeezenet1_1": 1_235_496,
    "mobilenetv1_025_128": 467_336,
}


def test_every_network_is_described_here_and_exported():
    assert set(PARAMETERS) == set(WEIGHTS)
    assert set(WEIGHTS) < set(recipes.networks.__all__)


@pytest.mark.parametrize("name", WEIGHTS)
def test_network_has_its_parameters_and_runs(name):
    model = find_model(f"recipes.networks:{name}").eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    size = WEIGHTS[name].input_size
    classes = 10 if WEIGHTS[name].file.startswith("cifar10_") else 100 if "cifar100" in WEIGHTS[name].file else 1000
    called: list[str] = []
    for layer_name, layer in quantizable_layers(model).items():
        layer.register_forward_hook(lambda *_, layer_name=layer_name: called.append(layer_name))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, classes)
    assert set(called) == set(quantizable_layers(model))


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("vit_tiny", 5_717_416)])
def test_networks_without_weights_have_their_parameters(name, parameters):
    with torch.device("meta"):
        model = find_model(f"recipes.networks:{name}")
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(BitscapeError, match=r"no network 'resnet21'.*nearest: .*resnet20"):
        load("resnet21", "anywhere")


def test_every_file_of_weights_fits(shared_data: Path):
    for name in WEIGHTS:
        assert not load(name, shared_data).training


def _images(path: Path, count: int) -> tuple[Tensor, Tensor]:
    parquet, image = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("PIL.Image")
    table = parquet.read_table(path).slice(0, count)
    rows = [np.asarray(image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2), torch.from_numpy(table["label"].to_numpy().copy())


def _top1(model: nn.Module, name: str, images: Tensor, labels: Tensor) -> float:
    edge = (images.shape[-1] - WEIGHTS[name].input_size) // 2
    images = images[..., edge : images.shape[-2] - edge, edge : images.shape[-1] - edge]
    correct = 0
    with torch.inference_mode():
        for rows in torch.arange(len(images)).split(50):
            inputs = WEIGHTS[name].normalization.apply(images[rows]).to(memory_format=torch.channels_last)
            correct += int((model(inputs).argmax(dim=1) == labels[rows]).sum())
    return 100 * correct / len(images)


@pytest.mark.parametrize(
    ("name", "count", "low", "high"),
    [
        # The first rows of each file; three standard errors either side of the whole file's figure.
        ("resnet20", 500, 88, 95.5),
        ("resnet8_kc_cifar100", 500, 57, 70),
        ("squeezenet1_1", 200, 52, 73),
        ("mobilenetv2_tfslim", 150, 80, 95.5),
    ],
)
def test_accuracy_is_the_published_one(shared_data: Path, name, count, low, high):
    images, labels = _images(shared_data / WEIGHTS[name].target, count)
    model = load(name, shared_data).to(memory_format=torch.channels_last)
    assert low < _top1(model, name, images, labels) < high
