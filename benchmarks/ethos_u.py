"""ethos-u: time, flash and SRAM on Arm's Ethos-U NPUs, by the performance model of Arm's compiler, beside the metric.

    python -m benchmarks.ethos_u [--network mobilenetv2_tfslim ...] [--accelerator ethos-u55-128 ...]

Activations have 8 bits, and so has the first layer. Weights have one width in all other layers, or mixed widths that
fisher finds under a cap on time, on flash, or on both, by a table of the compiler: 0.82 of the time and half of the
flash of 8 bits. Every network is repaired on the images of the search, measured on others, written as a TFLite file,
and compiled as a whole; beside stands what the table predicted. No figure is measured on silicon.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

import bitscape as bs
from benchmarks.common import bits_of, do_missing, networks_parser
from benchmarks.subjects import Subject, float_value, subject, value
from bitscape.cost.budget import parse_budget
from bitscape.cost.latency import LatencyTable, with_latency
from bitscape.cost.layers import measure as measure_layers
from bitscape.cost.policy_cost import cost
from bitscape.exporters.tflite.file import tflite_content, tflite_network
from bitscape.measure.npu_table import build_npu_table
from bitscape.measure.vela import Vela
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.verbs.proxy import proxy_of

NAME = "ethos-u"
KEYS = ("network", "settings.accelerator", "variant")
NETWORKS = ("mobilenetv2_tfslim", "mobilenetv1_025_128", "text_detector")
ACCELERATORS = ("ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u85-256")
WIDTHS = (3, 4, 5, 6, 7, 8)
CAPS = {
    "time and flash": {"latency_ms": "0.82x", "flash_bytes": "0.5x"},
    "flash": {"flash_bytes": "0.5x"},
    "time": {"latency_ms": "0.82x"},
}
"""Variant -> budget of a mixed policy."""
UNIFORM = {f"w{width}": width for width in (8, 4, 5, 6, 3)}
"""Variant -> width of every layer but the first."""
TABLE_IMAGES = 16
"""Images that set the ranges of the networks that a table is compiled of."""


def wanted(networks: Sequence[str] = NETWORKS, accelerators: Sequence[str] = ACCELERATORS) -> Iterator[dict[str, Any]]:
    """Every run."""
    variants = ("w8", *CAPS, *(name for name in UNIFORM if name != "w8"))
    for accelerator, network, variant in itertools.product(accelerators, networks, variants):
        yield {"network": network, "variant": variant, "settings": {"accelerator": accelerator}}


@cache
def table_of(network: str, accelerator: str) -> LatencyTable:
    """The compiler's table of a network."""
    about = subject(network)
    images = proxy_of(about.model, about.calibration, count=TABLE_IMAGES, inputs=None, seed=0)
    pairs = [LayerBits(width, 8) for width in WIDTHS]
    return build_npu_table(about.model, images, pairs, Vela(accelerator=accelerator))


def found_policy(about: Subject, variant: str, table: LatencyTable) -> Policy:
    """The policy of a variant."""
    if variant in CAPS:
        pairs = tuple(LayerBits(width, 8) for width in WIDTHS)
        settings = {"latency": table, "candidates": pairs, "target": "ethos-u", "task": about.task, "count": about.images}
        return bs.search(about.model, about.calibration, CAPS[variant], **settings).policy
    first = next(iter(table.layers))
    bits = LayerBits(UNIFORM[variant], 8)
    return Policy({name: LayerBits.EIGHT if name == first else bits for name in layer_shapes(about.model)})


@cache
def quantized(network: str, policy: tuple[tuple[str, LayerBits], ...]) -> tuple[float, bytes]:
    """The metric of a network at these bits, repaired, and its TFLite file."""
    about = subject(network)
    made = bs.quantize(about.model, Policy(dict(policy)), about.calibration, count=about.images)
    images = proxy_of(about.model, about.calibration, count=about.images, inputs=None, seed=0)
    return value(about, made), tflite_content(tflite_network(made, images), images)


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    about, vela = subject(run["network"]), Vela(accelerator=run["settings"]["accelerator"])
    table = table_of(run["network"], vela.accelerator)
    policy = found_policy(about, run["variant"], table)
    metric, content = quantized(run["network"], tuple(policy.layers.items()))
    compiled = vela.compile(content)
    profile = with_latency(measure_layers(about.model, table.input_shape), table)
    budget = parse_budget(CAPS[run["variant"]], profile).caps if run["variant"] in CAPS else None
    return {
        **run,
        "weights": about.weights,
        "metric": about.metric,
        "test_images": about.test_samples,
        "float_value": float_value(run["network"]),
        "value": metric,
        "policy": bits_of(policy),
        "budget": budget,
        "settings": {**run["settings"], "images": about.images, "compiler": vela.version},
        "extra": {
            "compiled": {
                "latency_ms": compiled.ms,
                "flash_bytes": compiled.flash_bytes,
                "encoded_bytes": compiled.encoded_bytes,
                "sram_bytes": compiled.sram_bytes,
                "on_cpu": sorted(compiled.on_cpu),
            },
            "predicted": {kind: cost(kind, profile, policy) for kind in ("latency_ms", "flash_bytes", "sram_bytes")},
        },
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = networks_parser(__doc__, NETWORKS)
    parser.add_argument("--accelerator", action="append", choices=ACCELERATORS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = wanted(options.network or NETWORKS, options.accelerator or ACCELERATORS[:1])
    do_missing(NAME, KEYS, runs, measure)


if __name__ == "__main__":
    main()
