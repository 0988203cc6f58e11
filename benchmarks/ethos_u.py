"""ethos-u: time, flash and SRAM on Arm's Ethos-U NPUs, by the performance model of Arm's compiler, beside the metric.

    python -m benchmarks.ethos_u [--network mobilenetv2_tfslim ...] [--accelerator ethos-u55-128 ...]

Activations have 8 bits, and so has the first layer. Weights have one width in all other layers, or
mixed widths that fisher finds under a cap on time, on flash, or on both: a little less than 0.82 of
the time and half of the flash of 8 bits, by a table of the compiler for the first NPU. Mixed
policies have coarse scales, whose codes the compiler encodes in fewer bits; one has usual scales.
Every network is repaired on the images of the search, measured on others, written as a TFLite file,
and compiled for each NPU as a whole; beside the first NPU's figures stands what its table
predicted. Networks, tables and scores are kept in runs/ethos-u and made once: remove them when
search or repair change. No figure is measured on silicon.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import bitscape as bs
from benchmarks.common import bits_of, do_missing, networks_parser
from benchmarks.subjects import IMAGES, float_value, subject, value
from bitscape.cost.latency import LatencyTable, with_latency
from bitscape.cost.layers import NetworkProfile
from bitscape.cost.layers import measure as measure_layers
from bitscape.cost.policy_cost import cost
from bitscape.cost.targets import TARGETS
from bitscape.exporters.tflite.file import tflite_content, tflite_network
from bitscape.measure.npu_table import build_npu_table
from bitscape.measure.vela import Vela
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.quant.quantizers import Lsq
from bitscape.searches.allocation import allocate
from bitscape.searches.choices import Choices
from bitscape.searches.scores import ScoreTable
from bitscape.verbs.proxy import proxy_of

NAME = "ethos-u"
KEYS = ("network", "settings.accelerator", "variant")
NETWORKS = ("mobilenetv2_tfslim", "mobilenetv1_025_128", "text_detector")
ACCELERATORS = ("ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u85-256")
PAIRS = tuple(LayerBits(width, 8) for width in range(3, 9))
COARSE = 2.0
TIME, FLASH = {"latency_ms": 0.81}, {"flash_bytes": 0.495}
"""Caps, as shares of what 8 bits take: a percent below 0.82 and 0.5 for what the table may be off."""


@dataclass(frozen=True)
class Mixed:
    """How a network of mixed widths is made."""

    caps: Mapping[str, float]
    """Kind of cost -> share of what 8 bits take."""
    coarseness: float = COARSE
    """Of its scales."""


MIXED = {
    "time and flash": Mixed({**TIME, **FLASH}),
    "flash": Mixed(FLASH),
    "time": Mixed(TIME),
    "flash, usual scales": Mixed(FLASH, coarseness=1.0),
}
"""Variants of mixed widths."""
UNIFORM = {f"w{width}": width for width in (8, 4, 5, 6, 3)}
"""Variant -> width of every layer but the first."""
TABLE_IMAGES = 16
"""Images that set the ranges of the networks that a table is compiled of."""
FILE_IMAGES = 64
"""Images that set the ranges of a file's tensors between the layers."""
MADE = Path("runs") / "ethos-u"


def wanted(
    networks: Sequence[str] = NETWORKS, accelerators: Sequence[str] = ACCELERATORS
) -> Iterator[dict[str, Any]]:
    """Every run."""
    variants = ("w8", *MIXED, *(name for name in UNIFORM if name != "w8"))
    for accelerator, network, variant in itertools.product(accelerators, networks, variants):
        yield {"network": network, "variant": variant, "settings": {"accelerator": accelerator}}


@dataclass(frozen=True)
class Made:
    """A network at the bits of a variant."""

    policy: Policy
    """With what it predicts and what is measured in its provenance."""
    content: bytes
    """Its TFLite file."""


@cache
def table_of(network: str, coarseness: float) -> LatencyTable:
    """The first NPU's table of a network."""
    file = MADE / f"{network} {coarseness}.table.json"
    if not file.is_file():
        about = subject(network)
        images = proxy_of(about.model, about.calibration, count=TABLE_IMAGES, inputs=None, seed=0)
        vela = Vela(accelerator=ACCELERATORS[0])
        build_npu_table(about.model, images, PAIRS, vela, coarseness=coarseness).save(file)
    return LatencyTable.load(file)


@cache
def profile_of(network: str, coarseness: float) -> NetworkProfile:
    """What the layers of a network take by the table."""
    table = table_of(network, coarseness)
    return with_latency(measure_layers(subject(network).model, table.input_shape), table)


def scores_of(network: str, coarseness: float, budget: Mapping[str, float]) -> ScoreTable:
    """Scores of a network's layers, which serve every budget."""
    file = MADE / f"{network} {coarseness}.scores.json"
    if not file.is_file():
        about, table = subject(network), table_of(network, coarseness)
        settings = {"latency": table, "candidates": PAIRS, "target": "ethos-u", "task": about.task}
        result = bs.search(about.model, about.calibration, budget, count=IMAGES, **settings)
        assert result.scores is not None
        result.scores.save(file)
    return ScoreTable.load(file)


def caps_of(network: str, variant: str) -> dict[str, float]:
    """The caps of a mixed policy, in what 8 bits take at usual scales."""
    profile = profile_of(network, 1.0)
    eight = Policy(dict.fromkeys(layer_shapes(subject(network).model), LayerBits.EIGHT))
    return {kind: share * cost(kind, profile, eight) for kind, share in MIXED[variant].caps.items()}


def found_policy(network: str, variant: str) -> Policy:
    """The policy of a variant."""
    layers = layer_shapes(subject(network).model)
    if variant in UNIFORM:
        first, bits = next(iter(layers)), LayerBits(UNIFORM[variant], 8)
        return Policy({name: LayerBits.EIGHT if name == first else bits for name in layers})
    caps, coarseness = caps_of(network, variant), MIXED[variant].coarseness
    choices = Choices.of(
        measure_layers(subject(network).model, table_of(network, coarseness).input_shape),
        caps,
        candidates=PAIRS,
        latency=table_of(network, coarseness),
        target=TARGETS["ethos-u"],
    )
    return allocate(scores_of(network, coarseness, caps), choices)


@cache
def made(network: str, variant: str) -> Made:
    """The network of a variant, repaired and measured."""
    file = MADE / f"{network} {variant}.json"
    if not file.is_file():
        about, policy = subject(network), found_policy(network, variant)
        how = MIXED.get(variant, Mixed({}, coarseness=1.0))
        quantizer = Lsq(coarseness=how.coarseness)
        done = bs.quantize(
            about.model, policy, about.calibration, count=IMAGES, quantizer=quantizer
        )
        images = proxy_of(about.model, about.calibration, count=FILE_IMAGES, inputs=None, seed=0)
        content = tflite_content(tflite_network(done, images), images)
        file.with_suffix(".tflite").write_bytes(content)
        profile = profile_of(network, how.coarseness)
        measured = {
            "value": value(about, done),
            "coarseness": how.coarseness,
            "predicted": {
                kind: cost(kind, profile, policy)
                for kind in ("latency_ms", "flash_bytes", "sram_bytes")
            },
        }
        replace(policy, provenance=measured).save(file)
    return Made(Policy.load(file), file.with_suffix(".tflite").read_bytes())


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    about, vela = subject(run["network"]), Vela(accelerator=run["settings"]["accelerator"])
    MADE.mkdir(parents=True, exist_ok=True)
    one = made(run["network"], run["variant"])
    compiled, measured = vela.compile(one.content), one.policy.provenance
    predicted = {"predicted": measured["predicted"]} if vela.accelerator == ACCELERATORS[0] else {}
    caps = caps_of(run["network"], run["variant"]) if run["variant"] in MIXED else None
    settings = {"images": IMAGES, "compiler": vela.version, "coarseness": measured["coarseness"]}
    return {
        **run,
        "weights": about.weights,
        "metric": about.metric,
        "test_images": about.test_samples,
        "float_value": float_value(run["network"]),
        "value": measured["value"],
        "policy": bits_of(one.policy),
        "budget": caps,
        "settings": {**run["settings"], **settings},
        "extra": {
            "compiled": {
                "latency_ms": compiled.ms,
                "flash_bytes": compiled.flash_bytes,
                "encoded_bytes": compiled.encoded_bytes,
                "sram_bytes": compiled.sram_bytes,
                "on_cpu": sorted(compiled.on_cpu),
            },
            **predicted,
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
