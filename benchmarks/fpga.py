"""fpga: does hls4ml compute what the simulation says, of mixed networks in its C++ emulation?

    python -m benchmarks.fpga    # needs hls4ml and g++ beside the extra `onnx`

A perceptron for the digits, trained here, gets uniform widths or those that fisher finds at the same
BitOps. It is written as a QONNX file, of which hls4ml makes C++ of fixed-point numbers, compiled and
run on the test images. Between its quantizers hls4ml computes in numbers of 48 bits; with 32 some
values near a half round to the other code. What logic it takes, only a vendor's synthesis tells:
BitOps stand for it.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import bits_of, do_missing
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.quantizers import Lsq, PerTensor

NAME = "fpga"
KEYS = ("network", "variant")
EPOCHS = 60
"""Passes over the images."""
BUDGETS = {"w4a4": LayerBits(4, 4), "w6a6": LayerBits(6, 6)}
PRECISION = "ap_fixed<48,16>"
QUANTIZER = Lsq(zero_points=False, weight_scales=PerTensor())
"""hls4ml takes one scale a tensor where the next layer's input is quantized."""
SAME = 1e-6
"""Largest difference of equal outputs, relative to the largest: float sums of the same codes."""


def wanted() -> Iterator[dict[str, Any]]:
    """Every run."""
    for budget in BUDGETS:
        for method in ("fisher", "uniform"):
            yield {"network": "digits perceptron", "variant": f"{budget}, {method}"}


@cache
def digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Images (n, 64) of a split, normalized, and their labels."""
    source = bs.load_dataset("digits", split=split)
    assert source.labels is not None
    return bs.Normalization((0.5,), (0.5,)).apply(source.images).flatten(1), source.labels


@cache
def trained() -> nn.Module:
    """The float network."""
    torch.manual_seed(0)
    widths = (64, 32, 16, 10)
    layers = OrderedDict[str, nn.Module]()
    for number, (taken, given) in enumerate(pairwise(widths)):
        layers[f"linear{number}"] = nn.Linear(taken, given)
        if number < len(widths) - 2:
            layers[f"relu{number}"] = nn.ReLU()
    network = nn.Sequential(layers)
    images, labels = digits("train")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval()


def emulated(network: nn.Module, images: Tensor) -> NDArray[np.float32]:
    """Outputs of hls4ml's C++."""
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.qonnx.onnx"
        bs.export(network, file, images[:64])
        graph = cleanup_model(cleanup_model(ModelWrapper(str(file))).transform(GemmToMatMul()))
        settings = {"backend": "Vitis", "granularity": "name", "default_precision": PRECISION}
        config = hls4ml.utils.config_from_onnx_model(graph, **settings)
        project = {
            "output_dir": str(Path(folder) / "project"),
            "backend": "Vitis",
            "io_type": "io_parallel",
        }
        hardware = hls4ml.converters.convert_from_onnx_model(graph, hls_config=config, **project)
        hardware.compile()
        outputs: NDArray[np.float32] = hardware.predict(np.ascontiguousarray(images.numpy()))
    return outputs


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    budget, method = run["variant"].split(", ")
    model, seen = trained(), digits("train")[0][:256]
    test, labels = digits("test")
    truth = labels.numpy()
    if method == "uniform":
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        policy = uniform_policy(names, BUDGETS[budget])
    else:
        policy = bs.search(model, seen, f"bitops={budget}", target="fpga-bitops", pinned={}).policy
    network = bs.quantize(model, policy, seen, quantizer=QUANTIZER)
    with torch.no_grad():
        float_outputs, simulated = model(test).numpy(), network(test).numpy()
    outputs = emulated(network, test)
    off = np.abs(outputs - simulated).max(1) / np.abs(simulated).max()
    return {
        **run,
        "policy": bits_of(policy),
        "metric": "top1",
        "test_images": len(test),
        "float_value": top1(float_outputs, truth),
        "value": top1(outputs, truth),
        "settings": {"precision": PRECISION},
        "extra": {
            "simulated": top1(simulated, truth),
            "differing_images": int((off > SAME).sum()),
            "largest_difference": float(off.max()),
        },
    }


def top1(outputs: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """In percent."""
    return 100 * float((outputs.argmax(1) == labels).mean())


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    do_missing(NAME, KEYS, wanted(), measure)


if __name__ == "__main__":
    main()
