"""tflite: quantized networks as TFLite files in LiteRT: their codes, their metric, their bytes and their time.

    python -m benchmarks.tflite [--network resnet20 ...]

Each network has 8-bit activations and weights of 8 bits, stored as int8, or of 4 bits (the first layer of 8), stored as
int4. It is repaired on the images that set its ranges, and written as `bs.export` does. Then LiteRT runs the file on
the test images. ResNet-50 has random weights, so that its metric says nothing.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import do_missing, input_size, networks_parser, published
from benchmarks.subjects import SUBJECTS, Subject, float_value, subject, value
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.runtimes.litert import LiteRt, LiteRtSession

NAME = "tflite"
KEYS = ("network", "variant")
NETWORKS = ("resnet20", "mobilenetv1_025_128", "mobilenetv2_tfslim", "text_detector", "text_direction", "resnet50")
WIDTHS = {"int8": 8, "int4": 4}
"""How weights are stored -> their bits in every layer but the first."""
FEW, RUNS = 64, 15
"""Images that check a file; runs that are timed, of which the median counts."""


class InLiteRt(nn.Module):
    """A file as a network of torch: images in, its first output."""

    def __init__(self, session: LiteRtSession) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> Tensor:
        """Run the images one after another."""
        return torch.from_numpy(self.session.run(x.numpy())[0])


def wanted(networks: Sequence[str] = NETWORKS) -> Iterator[dict[str, Any]]:
    """Every run."""
    for network, variant in itertools.product(networks, WIDTHS):
        yield {"network": network, "variant": variant}


def without_weights(network: str) -> Subject:
    """A network of random weights, with random images."""
    size = input_size(network)
    images = torch.randn(FEW, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Subject(
        model=published(network), weights="random", calibration=images, test=None, task="classes", metric="top1", test_samples=0,
        images=FEW,
    )  # fmt: skip


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    network, storage = run["network"], run["variant"]
    about = subject(network) if network in SUBJECTS else without_weights(network)
    first, *others = layer_shapes(about.model)
    policy = Policy({first: LayerBits.EIGHT, **dict.fromkeys(others, LayerBits(WIDTHS[storage], 8))})
    shared = {
        **run,
        "weights": about.weights,
        "metric": about.metric,
        "test_images": about.test_samples,
        "settings": {"images": about.images},
    }
    simulated = bs.quantize(about.model, policy, about.calibration, count=about.images)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.tflite"
        try:
            report = bs.export(simulated, path, about.calibration, weights=storage, count=FEW)
        except bs.BitscapeError as error:
            return {**shared, "extra": {"refused": str(error)}}
        session = LiteRt().open(path)
        file = InLiteRt(session)
        measured = {}
        if about.test is not None:
            measured = {"float_value": float_value(network), "value": value(about, file)}
            measured |= {"extra": {"simulated": value(about, simulated)}}
        file_ms = invoked_ms(session)
    assert report.parity is not None
    found = {
        "bytes": report.file_bytes,
        "runtime": report.runtime,
        "codes": report.parity.codes,
        "differing": report.parity.differing_codes,
        "fixed_point": {
            "layers": len(report.parity.fixed_point),
            "codes": sum(layer.codes for layer in report.parity.fixed_point),
            "differing": sum(layer.differing for layer in report.parity.fixed_point),
        },
        "relative_error": {name: agreement.difference for name, agreement in report.exact.items()},
        "cpu_ms": file_ms,
    }
    return {**shared, **measured, "clock": "process", "extra": {**measured.get("extra", {}), **found}}


def invoked_ms(session: LiteRtSession) -> float:
    """Milliseconds of process time of one image, without what brings it into the file's form."""
    times = []
    for _ in range(RUNS):
        started = time.process_time()
        session.invoke()
        times.append(1000 * (time.process_time() - started))
    return median(times)


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = networks_parser(__doc__, NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    do_missing(NAME, KEYS, wanted(options.network or NETWORKS), measure)


if __name__ == "__main__":
    main()
