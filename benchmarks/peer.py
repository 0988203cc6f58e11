"""peer: the same search by another toolkit. ResNet-20 on CIFAR-10, weights mixed, activations at 8 bits, no training.

    PYTHONPATH=folder/with/model_compression_toolkit python -m benchmarks.peer [--threads 1] [--seeds 3]

The peer is Sony's Model Compression Toolkit (MCT), "model-compression-toolkit" on PyPI. It and what it needs are best kept in a folder of
their own; without it the peer's runs are skipped. All methods get the same 256 images and the same budget, the bytes of uniform 4-bit
weights with no layer pinned, and end with a quantized network: MCT by its post-training function at default settings (norm folding,
squared-error ranges, bias correction), ours by fold_norms, search, quantize, calibrate and repair. `search_s` is the process CPU time of
all that. MCT's default platform knows 2, 4 and 8 bits and scales activations by powers of two; for more widths it gets the same platform
with these widths and activation scales of any value, as ours are.
"""

import argparse
import importlib.metadata
import os
import time
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import DATA, RESULTS, bits_of, dataset, proxy_images, record, test_batches
from bitscape.cost.budget import parse_budget
from bitscape.cost.layers import NetworkProfile, measure
from bitscape.cost.policy_cost import policy_cost
from bitscape.models.find import import_torchvision
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.repair import repair
from bitscape.report.records import missing, read_runs
from bitscape.searches.problem import SearchProblem
from bitscape.searches.uniform import Uniform
from recipes.networks import WEIGHTS, load

NAME, NETWORK = "peer", "resnet20"
KEYS = ("method", "variant", "seed")
IMAGES = 256
BUDGET = "weight_bytes=w4"
WIDTHS = {"2, 4, 8 bits": (2, 4, 8), "2, 3, 4, 5, 6, 8 bits": (2, 3, 4, 5, 6, 8)}
PEER_PACKAGES = ("model-compression-toolkit", "mct-quantizers", "torchvision", "networkx", "PuLP")


def wanted(seeds: int) -> Iterator[dict[str, Any]]:
    """Every run, the slowest last; the seed draws the images."""
    yield {"method": "float", "variant": "", "seed": 0}
    yield from ({"method": "uniform", "variant": "4 bits", "seed": seed} for seed in range(seeds))
    for method, variant, seed in product(("fisher", "mct"), WIDTHS, range(seeds)):
        yield {"method": method, "variant": variant, "seed": seed}


def peer_missing() -> str | None:
    """Why the peer cannot be used; None if it can."""
    try:
        import_torchvision()  # the peer imports it, and where its compiled part cannot load it needs the help of this function
        import model_compression_toolkit  # noqa: F401
    except Exception as error:  # whatever its dependencies raise is the reason
        return f"{type(error).__name__}: {error}"
    return None


@cache
def float_network() -> nn.Module:
    """The trained network."""
    return load(NETWORK, DATA)


@cache
def network_cost() -> NetworkProfile:
    """What its layers cost."""
    return measure(float_network(), (3, 32, 32))


@cache
def tests() -> bs.Batches:
    """The complete test set."""
    return test_batches(dataset("cifar10_test"), WEIGHTS[NETWORK].normalization)


@cache
def images(seed: int) -> Tensor:
    """Class-balanced training images (256, 3, 32, 32), normalized."""
    return proxy_images(dataset("cifar10_train"), NETWORK, IMAGES, seed=seed)


def ours(method: Uniform | bs.Fisher, widths: tuple[int, ...], calibration: Tensor) -> tuple[nn.Module, bs.Policy]:
    """Search and quantize with this package."""
    folded = fold_norms(float_network(), calibration[:8])
    candidates = tuple(bs.LayerBits(width, 8) for width in widths)
    problem = SearchProblem.of(model=folded, samples=calibration, budget=BUDGET, candidates=candidates, pinned={})
    policy = method.search(problem).policy
    quantized = calibrate(with_quantizers(folded, policy), calibration)
    return repair(quantized, folded, calibration), policy


def peers(widths: tuple[int, ...], calibration: Tensor) -> tuple[nn.Module, bs.Policy]:
    """Search and quantize with MCT."""
    import model_compression_toolkit as mct

    weights = sum(layer.weights for layer in network_cost().layers)
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        float_network(),
        lambda: ([batch] for batch in calibration.split(32)),
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=weights / 2),
        core_config=mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=len(calibration))),
        target_platform_capabilities=platform_of(widths),
    )
    return quantized, policy_of(quantized)


def platform_of(widths: tuple[int, ...]) -> Any:
    """MCT's default platform for its own widths 2, 4 and 8; for others that platform with these widths and any activation scales."""
    import model_compression_toolkit as mct
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc

    if widths == WIDTHS["2, 4, 8 bits"]:
        return mct.get_target_platform_capabilities()
    layers, _, others = tpc.get_op_quantization_configs()
    layers, others = (kind.clone_and_edit(activation_quantization_method=QuantizationMethod.SYMMETRIC) for kind in (layers, others))
    mixed = [layers.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: width}}) for width in sorted(widths, reverse=True)]
    return tpc.generate_tpc(default_config=others, base_config=layers, mixed_precision_cfg_list=mixed, name="any widths")


def policy_of(quantized: nn.Module) -> bs.Policy:
    """The weight bits that MCT chose, under our layer names: it writes layer1_0_conv1_bn for layer1.0.conv1."""
    wrapped = {name: module for name, module in quantized.named_modules() if hasattr(module, "weights_quantizers")}
    found = {name.removesuffix("_bn"): module.weights_quantizers["weight"].num_bits for name, module in wrapped.items()}
    return bs.Policy({name: bs.LayerBits(found[name.replace(".", "_")], 8) for name in network_cost().by_name})


def peer_versions() -> dict[str, str]:
    """Versions of the peer and of what it leans on."""
    return {package: importlib.metadata.version(package) for package in PEER_PACKAGES}


def find(run: dict[str, Any]) -> tuple[nn.Module, bs.Policy]:
    """Search and quantize."""
    calibration = images(run["seed"])
    if run["method"] == "uniform":
        return ours(Uniform(), (4,), calibration)
    widths = WIDTHS[run["variant"]]
    return peers(widths, calibration) if run["method"] == "mct" else ours(bs.Fisher(images=IMAGES), widths, calibration)


def measured(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    shared = {**run, "network": NETWORK, "weights": WEIGHTS[NETWORK].file, "target": "cifar10", "test_images": len(tests().dataset)}
    if run["method"] == "float":
        return {**shared, "top1": bs.evaluate(float_network(), tests()).value}
    images(run["seed"])  # loaded before the clock starts
    wall, process = time.perf_counter(), time.process_time()
    quantized, policy = find(run)
    process, wall = time.process_time() - process, time.perf_counter() - wall
    versions = {"peer_versions": peer_versions()} if run["method"] == "mct" else {}
    return {
        **shared,
        "settings": {"images": IMAGES},
        "policy": bits_of(policy),
        "budget": dict(parse_budget(BUDGET, network_cost(), {}).caps),
        "cost": policy_cost(network_cost(), policy),
        "top1": bs.evaluate(quantized, tests()).value,
        "float_top1": WEIGHTS[NETWORK].float_top1,
        "search_s": process,
        "clock": "process",
        "extra": {"wall_s": wall, "load_average": round(os.getloadavg()[0], 2), **versions},
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reason = peer_missing()
    if reason is not None:
        print(f"the peer's runs are skipped: {reason}", flush=True)
    runs = [run for run in wanted(options.seeds) if reason is None or run["method"] != "mct"]
    for run in missing(read_runs(RESULTS / f"{NAME}.jsonl"), runs, KEYS):
        record(NAME, measured(dict(run)))


if __name__ == "__main__":
    main()
