"""Networks of many kinds, each with samples for a search and a measure of its quantized form.

The networks of ONNX files need the extra `onnx-input`. The two networks of our own are trained once, to runs/tasks.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import bitscape as bs
from benchmarks.boxes import average_precision, hmean, text_boxes, yolox_boxes
from benchmarks.common import DATA, dataset
from bitscape.data.samples import Samples
from bitscape.models.find import find_model
from recipes.networks import WEIGHTS, load
from recipes.networks.own import MOST_DEGREES, RotationRegressor, SameClass, pair_batch, rotation_batch, train_own

IMAGES = 256
OWN = Path("runs") / "tasks"
SURE = 0.3
"""Least score of a box of the float detector that counts as true."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network, samples for the search, and how its quantized form is measured."""

    model: nn.Module
    weights: str
    calibration: Any
    """What every verb gets as data: no labels."""
    test: Any
    """What `bs.evaluate` gets."""
    task: str
    metric: str
    measure: Callable[[], Any] = lambda: None
    """Returns the metric that `bs.evaluate` gets, new for every network; None: the task's own."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """How batches of `test` are read: arguments of `bs.evaluate`."""
    test_samples: int
    images: int = IMAGES
    """Of `calibration`, that search and repair see."""


class Hmean:
    """Hmean of text lines at IoU 0.5, over all pages."""

    def __init__(self) -> None:
        self.predicted: list[Any] = []
        self.true: list[Any] = []

    def update(self, outputs: Tensor, targets: Sequence[Any]) -> None:
        """Take in a batch of maps (n, 1, h, w) and the boxes of each page."""
        self.predicted += [text_boxes(page[0].numpy()) for page in outputs]
        self.true += list(targets)

    def compute(self) -> float:
        """In percent."""
        return hmean(self.predicted, self.true)


class PrecisionAgainstFloat:
    """Average precision against the float detector's own boxes."""

    def __init__(self) -> None:
        self.predicted: list[Any] = []
        self.true: list[Any] = []

    def update(self, outputs: Tensor, targets: Sequence[Any]) -> None:
        """Take in outputs (n, 3549, 85) and the float network's."""
        self.predicted += [yolox_boxes(rows.numpy(), 0.01) for rows in outputs]
        boxes = [yolox_boxes(rows.numpy(), SURE) for rows in targets]
        self.true += [(place, classes) for place, _, classes in boxes]

    def compute(self) -> float:
        """In percent."""
        return average_precision(self.predicted, self.true)


def absolute_degrees(outputs: Tensor, targets: Tensor) -> Tensor:
    """Error of each angle (n,), in degrees."""
    return MOST_DEGREES * (outputs - targets).abs()[:, 0]


def pictures(file: str) -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
    """Each image of a parquet file as (h, w, 3) uint8, with its row."""
    for row in parquet.read_table(DATA / f"{file}.parquet").to_pylist():
        yield np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]), formats=("JPEG", "PNG")).convert("RGB")), row


def onnx_network(file: str) -> nn.Module:
    """A network of the data folder's ONNX files."""
    return find_model(f"onnx:{DATA / 'weights' / file}").eval()


def classifier(name: str, source: str, tests: int | None = None) -> Subject:
    """A classifier on images that its normalization is known of."""
    entry = WEIGHTS[name]
    if source == "imagenet_sample1k":
        sample = dataset(source).cropped(224)
        if entry.input_size != 224:
            sample = sample.resized(entry.input_size)
        order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
        calibration, test = sample.subset(order[:IMAGES]), sample.subset(order[IMAGES:])
    else:
        calibration, test = dataset(f"{source}_train"), dataset(f"{source}_test").subset(torch.arange(tests or 2000))
    batches = [bs.Batches(dataset=part, normalization=entry.normalization, batch_size=50) for part in (calibration, test)]
    return Subject(
        model=load(name, DATA),
        weights=entry.file,
        calibration=batches[0],
        test=batches[1],
        task="classes",
        metric="top1",
        test_samples=len(test),
        images=64 if source == "imagenet_sample1k" or name == "cct4" else IMAGES,
    )


def text_direction() -> Subject:
    """MobileNetV3: whether a line of text is upright."""

    def read(file: str) -> tuple[Tensor, Tensor]:
        images, labels = zip(*((picture, row["label"]) for picture, row in pictures(file)), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return (pixels / 255 - 0.5) / 0.5, torch.tensor(labels)

    train, test = read("text_direction_train"), read("text_direction_test")
    return Subject(
        model=onnx_network("text_direction_mobilenetv3_ppocr.onnx"),
        weights="text_direction_mobilenetv3_ppocr.onnx",
        calibration=train[0],
        test=test,
        task="classes",
        metric="top1",
        test_samples=len(test[1]),
    )


def text_detector() -> Subject:
    """DB: a map of where text is."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def read(file: str) -> tuple[Tensor, list[np.ndarray]]:
        pages, boxes = zip(*((page[:, :, ::-1].copy(), row["boxes"]) for page, row in pictures(file)), strict=True)
        pixels = torch.from_numpy(np.stack(pages)) / 255
        return ((pixels - mean) / deviation).permute(0, 3, 1, 2).contiguous(), [np.array(b, dtype=np.float64).reshape(-1, 4) for b in boxes]

    images, boxes = read("text_pages_test")
    return Subject(
        model=onnx_network("text_detector_ppocrv5.onnx"),
        weights="text_detector_ppocrv5.onnx",
        calibration=read("text_pages_train")[0],
        test=[(images[at : at + 10], boxes[at : at + 10]) for at in range(0, len(images), 10)],
        task="follow",
        metric="hmean",
        measure=Hmean,
        test_samples=len(images),
        images=64,
    )


def detector() -> Subject:
    """YOLOX-nano: objects, compared with the float network's own."""
    model = onnx_network("coco_yolox_nano.onnx")

    def letterboxed(pixels: Tensor) -> Tensor:
        grown = functional.interpolate(pixels.float(), 416, mode="bilinear", antialias=True)
        return grown.clamp(0, 255).flip(1)  # BGR

    pixels = dataset("imagenet_sample1k").cropped(224).images
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    calibration = letterboxed(pixels[order[:IMAGES]])
    images = letterboxed(pixels[order[IMAGES : IMAGES + 200]])
    with torch.no_grad():
        own = [model(images[at : at + 10]) for at in range(0, len(images), 10)]
    return Subject(
        model=model,
        weights="coco_yolox_nano.onnx",
        calibration=calibration,
        test=[(images[10 * at : 10 * at + 10], boxes) for at, boxes in enumerate(own)],
        task="follow",
        metric="ap_against_float",
        measure=PrecisionAgainstFloat,
        test_samples=len(images),
        images=64,
    )


def _cifar(part: str, images: int) -> tuple[Tensor, Tensor]:
    source = dataset(f"cifar10_{part}")
    assert source.labels is not None
    return WEIGHTS["resnet20"].normalization.apply(source.images[:images]), source.labels[:images]


def own(name: str, build: Callable[[], nn.Module], make_batch: Any, loss: Any, epochs: int) -> nn.Module:
    """One of our own networks, trained once."""
    file = OWN / f"{name}.pt"
    torch.manual_seed(0)
    network = build()
    if not file.is_file():
        OWN.mkdir(parents=True, exist_ok=True)
        train_own(network, *_cifar("train", 20_000), make_batch, loss, epochs=epochs)
        torch.save(network.state_dict(), file)
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval()


def rotation() -> Subject:
    """A regression: by how many degrees an image is turned."""
    (calibration,), _ = rotation_batch(*_cifar("train", 1000), torch.Generator().manual_seed(1))
    (images,), angles = rotation_batch(*_cifar("test", 2000), torch.Generator().manual_seed(2))
    return Subject(
        model=own("rotation", RotationRegressor, rotation_batch, functional.mse_loss, epochs=10),
        weights="own, 10 epochs of 20,000 images",
        calibration=calibration,
        test=(images, angles),
        task="follow",
        metric="mean_absolute_degrees",
        measure=lambda: absolute_degrees,
        test_samples=len(images),
    )


def same_class() -> Subject:
    """Two inputs: whether both images show the same class."""
    calibration, _ = pair_batch(*_cifar("train", 1000), torch.Generator().manual_seed(1))
    pairs, answers = pair_batch(*_cifar("test", 2000), torch.Generator().manual_seed(2))
    return Subject(
        model=own("same_class", SameClass, pair_batch, functional.binary_cross_entropy_with_logits, epochs=10),
        weights="own, 10 epochs of 20,000 pairs",
        calibration=Samples.of(calibration),  # a bare pair would be an input and its label
        test=[(pairs, answers)],
        task="binary",
        metric="accuracy",
        reading={"inputs": itemgetter(0), "targets": itemgetter(1)},
        test_samples=len(answers),
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "resnet20": partial(classifier, "resnet20", "cifar10"),
    "resnet44": partial(classifier, "resnet44", "cifar10"),
    "cct4": partial(classifier, "cct4", "cifar10"),
    "text_direction": text_direction,
    "rotation": rotation,
    "same_class": same_class,
    "text_detector": text_detector,
    "mobilenetv2_tfslim": partial(classifier, "mobilenetv2_tfslim", "imagenet_sample1k"),
    "mobilenetv1_025_128": partial(classifier, "mobilenetv1_025_128", "imagenet_sample1k"),
    "squeezenet1_1": partial(classifier, "squeezenet1_1", "imagenet_sample1k"),
    "yolox_nano": detector,
}


@cache
def subject(network: str) -> Subject:
    """Made once."""
    return SUBJECTS[network]()


def value(about: Subject, network: nn.Module) -> float:
    """What `bs.evaluate` says of the network."""
    result = bs.evaluate(network, about.test, task=about.task, metric=about.measure(), **about.reading)
    return result.value


@cache
def float_value(network: str) -> float:
    """The same of the float network."""
    return value(subject(network), subject(network).model)


def described(network: str) -> dict[str, Any]:
    """The fields that every run with the network's values has."""
    about = subject(network)
    return {
        "weights": about.weights,
        "task": about.task,
        "metric": about.metric,
        "test_images": about.test_samples,
        "float_value": float_value(network),
        "clock": "process",
    }
