"""The networks of the compatibility matrix: families of timm, torchvision and Hugging Face, built with random weights."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bitscape as bs
from bitscape.data.batches import IMAGENET
from bitscape.models.find import find_model, import_torchvision
from bitscape.models.layers import quantizable_layers
from bitscape.models.preprocessing import image_config
from bitscape.quant.convert import recalibrate_norms

IMAGES, CLASSES = 8, 1000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network."""

    family: str
    """What it stands for."""
    size: int
    """Side of its images in pixels: small where the family allows it, to be quick."""
    hf: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its Hugging Face configuration; networks of timm and torchvision have none."""


def _small(family: str, size: int = 96) -> Entry:
    return Entry(family=family, size=size)


_VIT = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 96, "patch_size": 16}
ENTRIES: dict[str, Entry] = {
    "timm:resnet18": _small("ResNet"),
    "timm:resnet50": _small("ResNet, bottleneck"),
    "timm:resnetv2_50": _small("ResNet, norms first"),
    "timm:resnext50_32x4d": _small("ResNeXt"),
    "timm:seresnet18": _small("SE-ResNet"),
    "timm:mobilenetv2_100": _small("MobileNetV2"),
    "timm:mobilenetv3_small_100": _small("MobileNetV3"),
    "timm:mobilenetv4_conv_small": _small("MobileNetV4"),
    "timm:mnasnet_100": _small("MnasNet"),
    "timm:efficientnet_b0": _small("EfficientNet"),
    "timm:tf_efficientnetv2_b0": _small("EfficientNetV2, padding as in TensorFlow"),
    "timm:ghostnet_100": _small("GhostNet"),
    "timm:rexnet_100": _small("ReXNet"),
    "timm:regnetx_002": _small("RegNetX"),
    "timm:regnety_002": _small("RegNetY"),
    "timm:convnext_atto": _small("ConvNeXt"),
    "timm:convnextv2_atto": _small("ConvNeXtV2"),
    "timm:vgg11_bn": _small("VGG with norms"),
    "timm:densenet121": _small("DenseNet"),
    "timm:inception_v3": _small("Inception", 128),
    "timm:xception41": _small("Xception"),
    "timm:repvgg_a0": _small("RepVGG"),
    "timm:mobileone_s0": _small("MobileOne"),
    "timm:dla34": _small("DLA"),
    "timm:hrnet_w18_small": _small("HRNet"),
    "timm:mixer_s32_224": _small("MLP-Mixer", 224),
    "timm:poolformer_s12": _small("PoolFormer"),
    "timm:vit_tiny_patch16_224": _small("ViT", 224),
    "timm:deit_tiny_patch16_224": _small("DeiT", 224),
    "timm:deit_tiny_distilled_patch16_224": _small("DeiT, distilled", 224),
    "timm:swin_tiny_patch4_window7_224": _small("Swin", 224),
    "timm:swinv2_tiny_window8_256": _small("SwinV2", 256),
    "timm:beit_base_patch16_224": _small("BEiT", 224),
    "timm:eva02_tiny_patch14_224": _small("EVA-02", 224),
    "timm:levit_128s": _small("LeViT", 224),
    "timm:mobilevit_xxs": _small("MobileViT", 128),
    "timm:efficientformer_l1": _small("EfficientFormer", 224),
    "timm:fastvit_t8": _small("FastViT", 128),
    "timm:maxvit_rmlp_pico_rw_256": _small("MaxViT", 256),
    "torchvision:alexnet": _small("AlexNet", 128),
    "torchvision:resnet18": _small("ResNet"),
    "torchvision:mobilenet_v2": _small("MobileNetV2"),
    "torchvision:mobilenet_v3_small": _small("MobileNetV3"),
    "torchvision:efficientnet_b0": _small("EfficientNet"),
    "torchvision:convnext_tiny": _small("ConvNeXt"),
    "torchvision:regnet_y_400mf": _small("RegNetY"),
    "torchvision:densenet121": _small("DenseNet"),
    "torchvision:squeezenet1_1": _small("SqueezeNet"),
    "torchvision:shufflenet_v2_x1_0": _small("ShuffleNetV2"),
    "torchvision:mnasnet0_5": _small("MnasNet"),
    "torchvision:googlenet": _small("GoogLeNet"),
    "torchvision:vit_b_32": _small("ViT", 224),
    "torchvision:swin_t": _small("Swin"),
    "hf:vit": Entry(family="ViT", size=96, hf=_VIT),
    "hf:deit": Entry(family="DeiT", size=96, hf={**_VIT, "architectures": ["DeiTForImageClassification"]}),
    "hf:beit": Entry(family="BEiT", size=96, hf=_VIT),
    "hf:dinov2": Entry(family="DINOv2", size=96, hf=_VIT),
    "hf:swin": Entry(
        family="Swin", size=96, hf={"image_size": 96, "embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4], "window_size": 6}
    ),
    "hf:resnet": Entry(family="ResNet", size=96, hf={"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 128, 256], "layer_type": "basic"}),
    "hf:mobilenet_v2": Entry(family="MobileNetV2", size=96, hf={"image_size": 96}),
    "hf:mobilevit": Entry(family="MobileViT", size=128, hf={"image_size": 128, "hidden_sizes": [48, 64, 80]}),
    "hf:convnext": Entry(family="ConvNeXt", size=96, hf={"depths": [2, 2, 2, 2], "hidden_sizes": [24, 48, 96, 192]}),
    "hf:regnet": Entry(family="RegNet", size=96, hf={"depths": [1, 2, 2, 1], "hidden_sizes": [32, 64, 128, 256], "groups_width": 16}),
    "hf:efficientnet": Entry(
        family="EfficientNet", size=96, hf={"image_size": 96, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    ),
    "hf:pvt": Entry(family="PVT", size=96, hf={"image_size": 96}),
}
"""Name -> network; `hf:` is followed by the type of a configuration."""


def build(name: str, folder: Path) -> tuple[str, nn.Module]:
    """Build the network with random weights and return it after the name that finds it; `folder` is for what that name needs."""
    entry = ENTRIES[name]
    torch.manual_seed(0)
    found = _configured(name.removeprefix("hf:"), entry, folder) if entry.hf else name
    network = find_model(found).eval()
    _enliven(network)
    x = normalization_of(network).apply(images(entry.size))
    _settle_norms(network, x)
    _fit_head(network, x)
    return found, network


def _settle_norms(network: nn.Module, x: Tensor) -> None:
    """Let the norms know just these images, else a deep random network drifts off in eval mode.

    What hardly varies among so few images is not blown up to unit variance: behind such norms all is noise.
    """
    recalibrate_norms(network, x)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None and module.running_mean is not None:
            module.running_var.copy_(module.running_var.maximum(0.1 * module.running_mean.square()))


@torch.no_grad()
def _fit_head(network: nn.Module, x: Tensor) -> None:
    """Give each image a class of its own: among the thousand classes of a random head any rounding decides."""
    inputs: dict[nn.Module, Tensor] = {}
    layers = quantizable_layers(network).values()
    handles = [layer.register_forward_hook(lambda layer, args, _: inputs.update({layer: args[0]})) for layer in layers]
    network(x)
    for handle in handles:
        handle.remove()
    for layer, features in inputs.items():
        if len(layer.get_parameter("weight")) == CLASSES:
            _fit(layer, features)


def _fit(head: nn.Module, features: Tensor) -> None:
    """Ridge regression of the first classes on the mean features of each image."""
    channel = 1 if isinstance(head, nn.Conv2d) else -1
    features = features.movedim(channel, -1).reshape(len(features), -1, features.shape[channel]).mean(1)
    n, centered = len(features), features - features.mean(0)
    products = centered @ centered.T
    ridge = 0.02 * products.trace() / n * torch.eye(n)
    weight, bias = head.get_parameter("weight"), head.get_parameter("bias")
    weight[n:] *= 0.01
    weight[:n] = torch.linalg.solve(products + ridge, centered).reshape(n, *weight.shape[1:])
    bias.copy_(-weight.flatten(1) @ features.mean(0))
    bias[n:] -= 1


def normalization_of(network: nn.Module) -> bs.Normalization:
    """What the network's own configuration says, else ImageNet's."""
    try:
        own = image_config(network)
    except bs.BitscapeError:
        return IMAGENET
    return bs.Normalization(own.mean, own.std)


def images(size: int) -> Tensor:
    """Colored clouds, from few and large to many and small ones: uint8 (n, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    clouds = [torch.rand(1, 3, 2 + 2 * n, 2 + 2 * n, generator=generator) for n in range(IMAGES)]
    grown = torch.cat([nn.functional.interpolate(cloud, size, mode="bicubic") for cloud in clouds])
    return grown.mul(255).clamp(0, 255).to(torch.uint8)


def _configured(kind: str, entry: Entry, folder: Path) -> str:
    """Save a network of a Hugging Face configuration as the hub has them, and return its name."""
    with suppress(bs.BitscapeError):  # where it is installed, transformers imports it
        import_torchvision()
    import transformers

    config = transformers.AutoConfig.for_model(kind, num_labels=CLASSES, **entry.hf)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": entry.size, "width": entry.size}).save_pretrained(folder)
    return f"hf:{folder}"


@torch.no_grad()
def _enliven(network: nn.Module) -> None:
    """Redraw parameters that start out constant: networks whose branches end in zeros compute next to nothing.

    Gently: a deep network of strong branches is chaotic, and tells nothing of rounding.
    """
    for name, parameter in network.named_parameters():
        if parameter.min() == parameter.max():
            is_scale = parameter.flatten()[0] != 0 or name.endswith(("weight", "gamma"))
            strength = 1.0 if parameter.flatten()[0] == 1 else 0.2
            parameter.uniform_(0.5 * strength, 1.5 * strength) if is_scale else parameter.normal_(0, 0.1)
