"""The networks of the shared weights, under the key names of those files, two ImageNet ResNets and a ViT for measuring.

`load("resnet20", data_folder)` returns a trained network, `--model recipes.networks:resnet20` an untrained one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bitscape.data.batches import Normalization
from bitscape.errors import BitscapeError, nearest
from bitscape.models.find import load_weights
from recipes.networks.cct import cct4
from recipes.networks.cifar import (
    resnet8_kc,
    resnet8_kc_cifar100,
    resnet14_kc,
    resnet14_kc_cifar100,
    resnet20,
    resnet20_apot,
    resnet20_kc,
    resnet32,
    resnet32_kc,
    resnet44,
    wrn16_1_kc,
)
from recipes.networks.imagenet import mobilenetv1_025_128, mobilenetv2_tfslim, resnet18, resnet50, squeezenet1_1
from recipes.networks.vit import vit_tiny

__all__ = [
    "WEIGHTS",
    "PretrainedNetwork",
    "cct4",
    "load",
    "mobilenetv1_025_128",
    "mobilenetv2_tfslim",
    "resnet8_kc",
    "resnet8_kc_cifar100",
    "resnet14_kc",
    "resnet14_kc_cifar100",
    "resnet18",
    "resnet20",
    "resnet20_apot",
    "resnet20_kc",
    "resnet32",
    "resnet32_kc",
    "resnet44",
    "resnet50",
    "squeezenet1_1",
    "vit_tiny",
    "wrn16_1_kc",
]


@dataclass(frozen=True, kw_only=True)
class PretrainedNetwork:
    """A network and what its published weights expect and reach."""

    build: Callable[[], nn.Module]
    """Returns the network without weights."""
    file: str
    """Weights, in the folder `weights` of the data folder."""
    normalization: Normalization
    """What the network was trained with."""
    input_size: int
    """Side of the square input image in pixels."""
    float_top1: float
    """Percent correct on the whole of `target`, float32."""
    target: str
    """Test images, in the data folder."""


_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_APOT = Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
_KC_10 = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_KC_100 = Normalization((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
_TENSORFLOW = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _cifar10(build: Callable[[], nn.Module], file: str, normalization: Normalization, top1: float) -> PretrainedNetwork:
    return PretrainedNetwork(
        build=build,
        file=f"cifar10_{file}.safetensors",
        normalization=normalization,
        input_size=32,
        float_top1=top1,
        target="cifar10_test.parquet",
    )


def _cifar100(build: Callable[[], nn.Module], file: str, top1: float) -> PretrainedNetwork:
    return PretrainedNetwork(
        build=build,
        file=f"cifar100_{file}.safetensors",
        normalization=_KC_100,
        input_size=32,
        float_top1=top1,
        target="cifar100_test5k.parquet",
    )


def _imagenet(
    build: Callable[[], nn.Module], file: str, normalization: Normalization, top1: float, input_size: int = 224
) -> PretrainedNetwork:
    return PretrainedNetwork(
        build=build,
        file=f"imagenet_{file}.safetensors",
        normalization=normalization,
        input_size=input_size,
        float_top1=top1,
        target="imagenet_sample1k.parquet",
    )


WEIGHTS: dict[str, PretrainedNetwork] = {
    "resnet20": _cifar10(resnet20, "resnet20_akamaster", _IMAGENET, 91.73),
    "resnet32": _cifar10(resnet32, "resnet32_akamaster", _IMAGENET, 92.63),
    "resnet44": _cifar10(resnet44, "resnet44_akamaster", _IMAGENET, 93.10),
    "resnet20_apot": _cifar10(resnet20_apot, "resnet20_apot", _APOT, 92.96),
    "cct4": _cifar10(cct4, "cct4_nik212", _CIFAR, 83.85),
    "resnet8_kc": _cifar10(resnet8_kc, "resnet8_kc", _KC_10, 89.59),
    "resnet14_kc": _cifar10(resnet14_kc, "resnet14_kc", _KC_10, 92.18),
    "wrn16_1_kc": _cifar10(wrn16_1_kc, "wrn16_1_kc", _KC_10, 91.75),
    "resnet8_kc_cifar100": _cifar100(resnet8_kc_cifar100, "resnet8_kc", 63.34),
    "resnet14_kc_cifar100": _cifar100(resnet14_kc_cifar100, "resnet14_kc", 67.30),
    "resnet20_kc": _cifar100(resnet20_kc, "resnet20_kc", 69.10),
    "resnet32_kc": _cifar100(resnet32_kc, "resnet32_kc", 70.96),
    "mobilenetv2_tfslim": _imagenet(mobilenetv2_tfslim, "mobilenetv2_tfslim", _TENSORFLOW, 87.7),
    "squeezenet1_1": _imagenet(squeezenet1_1, "squeezenet1_1_onnxzoo", _IMAGENET, 62.7),
    # Resized from the 224 pixel centre crop, as its stated accuracy was measured.
    "mobilenetv1_025_128": _imagenet(mobilenetv1_025_128, "mobilenetv1_0.25_128_qat", _TENSORFLOW, 44.7, 128),
}


def load(name: str, data_folder: Path | str) -> nn.Module:
    """Return the network `name` of WEIGHTS with its weights, in eval mode.

    Raises BitscapeError for an unknown name, a missing file, or weights that do not fit.
    """
    if name not in WEIGHTS:
        raise BitscapeError(f"name: no network {name!r}; allowed: {', '.join(WEIGHTS)}{nearest(name, WEIGHTS)}")
    entry = WEIGHTS[name]
    model = entry.build()
    load_weights(model, Path(data_folder) / "weights" / entry.file)
    return model.eval()
