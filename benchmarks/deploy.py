"""deploy: what reaches the device. Float, the runtime's own int8, our W8A8 and our mixed policies, in ONNX Runtime and OpenVINO.

    PYTHONPATH=folder/with/nncf python -m benchmarks.deploy [--network resnet20] [--runtime openvino] [--threads 1]

Every file of a network is timed in one process beside the others, round after round, one thread, process CPU time, medians. Networks with
published weights get accuracy on images that nothing was calibrated on; ResNet-18 and -50 have random weights and are for speed, size and
parity alone. Mixed: `fisher` under the bytes of uniform 4-bit weights among the widths that the runtime stores, activations at 8 bits; and
under the BitOps of W4A4 among all pairs of 2 to 8 bits, to see what narrow activations cost. The runtime's own int8 is ONNX Runtime's
`quantize_static` and NNCF's `quantize`; NNCF is best kept in a folder of its own, and without it its rows are skipped.
"""

import argparse
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import DATA, RESULTS, bits_of, both_ends, dataset, record
from bitscape.cost.targets import TARGETS
from bitscape.data.sources import Dataset
from bitscape.exporters.agreement import Comparison
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.onnx.qdq import OnnxInfo, write_onnx
from bitscape.exporters.openvino.ir import write_openvino
from bitscape.exporters.openvino.parity import check_openvino_parity
from bitscape.exporters.parity import check_parity
from bitscape.measure.baselines import save_float_onnx, save_onnxruntime_int8
from bitscape.models.layers import quantizable_layers
from bitscape.policy import uniform_policy
from bitscape.report.records import missing, read_runs
from bitscape.runtimes.packages import runtime_module
from bitscape.runtimes.sessions import RUNTIMES, OpenVino, Runtime, Session, time_alternately
from bitscape.searches.choices import DEFAULT_CANDIDATES
from bitscape.searches.random_policy import Random
from recipes.networks import WEIGHTS, load, resnet18, resnet50

NAME = "deploy"
KEYS = ("network", "settings.runtime", "settings.threads", "method", "variant")
TRAINED = ("resnet20", "mobilenetv2_tfslim", "squeezenet1_1")
RANDOM = {"resnet18": resnet18, "resnet50": resnet50}
BATCHES = (1, 16)
CALIBRATION, PARITY, EXACT = 256, 16, {"resnet20": 2000}
"""Images for ranges and search; whose every code is compared; whose class is compared with exact integers (others: 200)."""
FLOAT, OWN, UNIFORM, MIXED = ("float", ""), ("own int8", ""), ("uniform", "W8A8"), ("mixed", "weights")
NARROW = ("mixed", "weights and activations")
METHODS = (FLOAT, OWN, UNIFORM, MIXED, NARROW)
PROFILE = {"onnxruntime": "onnx-container", "openvino": "openvino"}


@cache
def network(name: str) -> nn.Module:
    """The float network, in eval mode."""
    if name in WEIGHTS:
        return load(name, DATA)
    torch.manual_seed(0)
    return RANDOM[name]().eval()


@cache
def data(name: str) -> tuple[Dataset, Dataset]:
    """Images for calibration, and others for testing."""
    if name == "resnet20":
        return dataset("cifar10_train").subset(torch.arange(CALIBRATION)), dataset("cifar10_test")
    sample = dataset("imagenet_sample1k").cropped(WEIGHTS[name].input_size if name in WEIGHTS else 224)
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
    return sample.subset(order[:CALIBRATION]), sample.subset(order[CALIBRATION:])


def normalized(name: str, images: Tensor) -> Tensor:
    """Images as the network expects them."""
    return WEIGHTS[name if name in WEIGHTS else "squeezenet1_1"].normalization.apply(images)


@cache
def policy(name: str, runtime: str, variant: str) -> bs.Policy:
    """Bits of a row of ours."""
    if variant == UNIFORM[1]:
        return uniform_policy(quantizable_layers(network(name)), bs.LayerBits(8, 8))
    stored = TARGETS[PROFILE[runtime]]
    pairs = tuple(bs.LayerBits(bits, 8) for bits in stored.weight_bits) if variant == MIXED[1] else DEFAULT_CANDIDATES
    budget = "weight_bytes=w4" if variant == MIXED[1] else "bitops=w4a4"
    images = normalized(name, data(name)[0].images)
    method = bs.Fisher() if name in WEIGHTS else Random()
    model = network(name)
    pinned = both_ends(model, images)
    return bs.search(model, images, budget, method=method, count=len(images), candidates=pairs, pinned=pinned).policy


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file, and what is known of it before it is run."""

    path: Path
    file_bytes: int
    container_bytes: int | None = None
    integers: IntegerNetwork | None = None
    source: Any = None
    """The graph that an OpenVINO file of ours was made of."""
    policy: bs.Policy | None = None


def make(name: str, runtime: str, method: tuple[str, str], folder: Path) -> Made:
    """Write one file."""
    images = normalized(name, data(name)[0].images)
    if method in (FLOAT, OWN):
        return _baseline(name, runtime, method, folder, images)
    found = policy(name, runtime, method[1])
    trained = name in WEIGHTS
    repair: Literal["compensate"] | None = "compensate" if trained else None
    quantized = bs.quantize(network(name), found, images, repair=repair, for_training=not trained, count=len(images))
    integers = integer_network(quantized, images)
    stem = f"{method[0]}-{method[1]}".replace(" ", "-")
    write: Callable[..., OnnxInfo] = write_onnx if runtime == "onnxruntime" else write_openvino
    info = write(integers, folder / f"{stem}{'.onnx' if runtime == 'onnxruntime' else '.xml'}", images)
    stored, source = (getattr(info, name, None) for name in ("container_bytes", "source"))
    return Made(path=info.path, file_bytes=info.file_bytes, container_bytes=stored, integers=integers, source=source, policy=found)


def _baseline(name: str, runtime: str, method: tuple[str, str], folder: Path, images: Tensor) -> Made:
    path = folder / "float.onnx"
    if not path.exists():
        save_float_onnx(network(name), path, images)
    if method == OWN and runtime == "onnxruntime":
        save_onnxruntime_int8(path, path := folder / "own.onnx", images)
    elif method == OWN:
        return _nncf(path, folder / "own.xml", images)
    return Made(path=path, file_bytes=path.stat().st_size)


def _nncf(source: Path, path: Path, images: Tensor) -> Made:
    openvino = runtime_module("openvino")  # first: nncf imports it
    import nncf

    calibration = nncf.Dataset([image[None].numpy() for image in images])
    quantized = nncf.quantize(openvino.Core().read_model(source), calibration, subset_size=len(images))
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return Made(path=path, file_bytes=path.stat().st_size + path.with_suffix(".bin").stat().st_size)


def available(runtime: str) -> tuple[tuple[str, str], ...]:
    """The rows that can be measured here."""
    if runtime == "openvino":
        try:
            importlib.metadata.version("nncf")
        except importlib.metadata.PackageNotFoundError:
            return tuple(method for method in METHODS if method != OWN)
    return METHODS


def wanted(networks: list[str], threads: int, runtimes: tuple[str, ...] = tuple(RUNTIMES)) -> Iterator[dict[str, Any]]:
    """Every run that can be measured here; those of one network and runtime stand together."""
    for name, key in product(networks, runtimes):
        for method, variant in available(key):
            yield {"network": name, "settings": {"runtime": key, "threads": threads}, "method": method, "variant": variant}


def measure(name: str, runtime: Runtime, key: str, methods: tuple[tuple[str, str], ...]) -> Iterator[dict[str, Any]]:
    """Write and time all files of a network beside one another; yield a run for each."""
    with tempfile.TemporaryDirectory() as folder:
        made = {method: make(name, key, method, Path(folder)) for method in methods}
        sessions = {method: runtime.open(file.path) for method, file in made.items()}
        times = {batch: _times(name, sessions, batch) for batch in BATCHES}
        for method, file in made.items():
            timed = {f"batch{batch}": vars(measured[" ".join(method)]) for batch, measured in times.items()}
            extra = {"times": timed, **_ratios(timed, times), "float_layers": len(sessions[method].float_layers())}
            extra |= {"file_bytes": file.file_bytes, "container_bytes": file.container_bytes, "runtime": runtime.version}
            if file.integers is not None:
                extra |= _exactness(name, file, sessions[method], runtime)
            yield {
                "network": name,
                "weights": WEIGHTS[name].file if name in WEIGHTS else "random",
                "target": "imagenet_sample1k" if name != "resnet20" else "cifar10",
                "method": method[0],
                "variant": method[1],
                "settings": {"runtime": key, "threads": runtime.threads},
                "policy": None if file.policy is None else bits_of(file.policy),
                "seed": 0,
                **(_accuracy(name, sessions[method]) if name in WEIGHTS else {}),
                "clock": "process",
                "extra": extra,
            }


def _times(name: str, sessions: dict[tuple[str, str], Session], batch: int) -> dict[str, Any]:
    images = normalized(name, data(name)[0].images[:batch]).numpy()
    return time_alternately({" ".join(method): lambda run=session.run: run(images) for method, session in sessions.items()}, rounds=9)


def _ratios(timed: dict[str, Any], times: dict[int, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast as float, and how much slower than W8A8."""
    found = {}
    for batch, measured in times.items():
        own = timed[f"batch{batch}"]["cpu_ms"]
        found[f"float_over_own_batch{batch}"] = measured[" ".join(FLOAT)].cpu_ms / own
        found[f"own_over_w8a8_batch{batch}"] = own / measured[" ".join(UNIFORM)].cpu_ms
    return found


def _exactness(name: str, file: Made, session: Session, runtime: Runtime) -> dict[str, Any]:
    """Codes against the reference, classes against exact integers."""
    assert file.integers is not None
    tests = normalized(name, data(name)[1].images[: EXACT.get(name, 200)])
    comparison = Comparison()
    for batch in tests.split(20):
        expected = {name: values.numpy() for name, values in run_integers(file.integers, batch).items()}
        comparison.add(len(batch), expected, dict(zip(session.outputs, session.run(batch.numpy()), strict=True)))
    (found,) = comparison.result().values()
    assert found.same_class is not None
    shared = {"same_class": 100 * found.same_class, "identical": 100 * found.identical, "exact_images": found.images}
    shared["added_quantizers"] = len(file.integers.added)
    if isinstance(runtime, OpenVino):
        report = check_openvino_parity(file.path, file.source, tests[:PARITY].numpy(), runtime)
    else:
        report = check_parity(file.path, tests[:PARITY].numpy(), runtime)
    largest = max(layer.largest for layer in report.layers)
    return {**shared, "differing_codes": report.differing_codes, "codes": report.codes, "largest_difference": largest}


def _accuracy(name: str, session: Session) -> dict[str, Any]:
    tests = data(name)[1]
    assert tests.labels is not None
    right = [
        _outputs(session, normalized(name, images)).argmax(1) == labels.numpy()
        for images, labels in zip(tests.images.split(200), tests.labels.split(200), strict=True)
    ]
    return {"top1": 100 * float(np.concatenate(right).mean()), "test_images": len(tests), "float_top1": WEIGHTS[name].float_top1}


def _outputs(session: Session, images: Tensor) -> np.ndarray[Any, Any]:
    return np.concatenate([session.run(batch.numpy())[0] for batch in images.split(20)])


def main() -> None:
    """Measure the networks whose rows the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=[*TRAINED, *RANDOM])
    parser.add_argument("--runtime", action="append", choices=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, key in product(options.network or [*TRAINED, *RANDOM], options.runtime or RUNTIMES):
        # All rows or none: times are compared within one process only.
        if missing(read_runs(RESULTS / f"{NAME}.jsonl"), list(wanted([name], options.threads, (key,))), KEYS):
            for run in list(measure(name, RUNTIMES[key](threads=options.threads), key, available(key))):
                record(NAME, run)


if __name__ == "__main__":
    main()
