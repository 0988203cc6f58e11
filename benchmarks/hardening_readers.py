"""Every reader of a file that users pass around: policies, scores, tables, networks, runs; those of data sets are in hardening_data."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, cast

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.hardening_data import CLASSES, DATA_READERS, Damage, Reader, Use, need
from benchmarks.hardening_mutations import (
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_structure,
    metadata_only,
)
from bitscape.cli.app import commands
from bitscape.cost.latency import LatencyTable, with_latency
from bitscape.cost.layers import NetworkProfile, measure
from bitscape.data.batches import DIGITS, Batches
from bitscape.data.sources import load_dataset
from bitscape.dynamic import distill_tiers, dynamic_network
from bitscape.dynamic.heads import Head
from bitscape.dynamic.storage import load_dynamic, load_tiers, save_dynamic, save_tiers
from bitscape.engine import Batch, Sgd, StepRecord, train
from bitscape.engine.quality_table import Cell, QualityTable
from bitscape.errors import BitscapeError
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.files import UNSEALED, sealed
from bitscape.models.digits import digits_net
from bitscape.models.find import load_weights, save_weights
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, fingerprint, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.report.documents import save_quality
from bitscape.report.inputs import read_inputs
from bitscape.report.page import report_page
from bitscape.searches.allocation import allocate
from bitscape.searches.choices import DEFAULT_CANDIDATES, Choices
from bitscape.searches.scores import ScoreTable

MODEL = "bitscape.models.digits:digits_net"
SHAPE = (1, 8, 8)
JSON: tuple[Damage, ...] = (damaged_json, damaged_json, damaged_bytes)
SAFETENSORS: tuple[Damage, ...] = (damaged_safetensors, damaged_bytes)
_CHECKSUM = re.compile(rb'(\\"checksum\\": ?\\")([0-9a-f]{16})(?=\\")')


@cache
def network() -> nn.Module:
    """The digits network, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return digits_net().eval()


@cache
def cost() -> NetworkProfile:
    """What its layers do."""
    return measure(network(), SHAPE)


@cache
def images(channels: int = 1, count: int = 16) -> Tensor:
    """Normal noise (count, channels, 8, 8)."""
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def mixed_policy(shapes: Mapping[str, tuple[int, ...]]) -> Policy:
    """Bits that differ from layer to layer, with a cost and a provenance."""
    pairs = {name: LayerBits(1 + at % 8, 8 - at % 8) for at, name in enumerate(shapes)}
    about = {"method": "fisher", "settings": {"images": 256}, "images": [16, *SHAPE], "seed": 0, "norms": "kept", "note": None}
    return Policy(pairs, fingerprint(shapes), {"bitops": 388_000_000, "mean_weight_bits": 4.25}, about)


def resealed(damage: Damage) -> Damage:
    """The damage, in a file whose checksum is right: as another program may write it."""

    def made(content: bytes, rng: Random) -> bytes:
        found = _CHECKSUM.sub(rb"\g<1>" + UNSEALED.encode(), damage(content, rng), count=1)
        return sealed(found) if _CHECKSUM.search(found) else found

    return made


def command(*arguments: object) -> None:
    """Run a command in this process, its output thrown away."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        try:
            commands.main([str(argument) for argument in arguments], standalone_mode=False)
        except click.ClickException as error:
            raise BitscapeError(error.format_message()) from error


def _policy(folder: Path) -> Use:
    found = Policy.load(path := folder / "policy.json")

    def use() -> None:
        need(all(type(bits) is LayerBits for bits in found.layers.values()), "layers")
        need(found.fingerprint is None or type(found.fingerprint) is str, "fingerprint")
        found.save(folder / "again.json")
        need(Policy.load(folder / "again.json") == found, "another policy once saved")
        command("policy", "show", path, "--model", MODEL)

    return use


def _scores(folder: Path) -> Use:
    found = ScoreTable.load(folder / "scores.json")

    def use() -> None:
        need(type(found.method) is str and type(found.repairs) is int and found.repairs >= 0, "method or repairs")
        found.save(folder / "again.json")
        again = ScoreTable.load(folder / "again.json")
        same = [getattr(again, name) == getattr(found, name) for name in ("layers", "candidates", "method", "repairs", "fingerprint")]
        need(all(same) and again.values.tobytes() == found.values.tobytes(), "other scores once saved")
        policy = allocate(found, Choices.of(cost(), "bitops=w4a4", candidates=found.candidates))
        need(set(policy.layers) == set(cost().by_name), "not a policy of the network")

    return use


def _latency(folder: Path) -> Use:
    found = LatencyTable.load(folder / "latency.json")

    def use() -> None:
        found.save(folder / "again.json")
        need(LatencyTable.load(folder / "again.json") == found, "another table once saved")
        need(type(found.spread()) is float, "spread")
        with_latency(cost(), found)

    return use


@torch.no_grad()
def _packed(folder: Path) -> Use:
    found = load_packed(folder / "packed.safetensors", network())
    outputs = found(images())
    need(outputs.dtype == torch.float32 and outputs.isfinite().all(), "outputs that are not finite float32")
    return lambda: None


def _weights(folder: Path) -> Use:
    found = digits_net()
    before = {name: (value.dtype, value.shape) for name, value in found.state_dict().items()}
    load_weights(found, folder / "model.safetensors")
    need({name: (value.dtype, value.shape) for name, value in found.state_dict().items()} == before, "types or shapes changed")
    return lambda: found.eval()(images())


@cache
def _batches() -> Batches:
    return Batches(dataset=load_dataset("digits").subset(slice(0, 32)), normalization=DIGITS, batch_size=16, shuffle=True)


class _Step:
    """Plain; it can stop a run in the middle of an epoch."""

    steps_left = 10**9

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        if not _Step.steps_left:
            raise KeyboardInterrupt
        _Step.steps_left -= 1
        return batch.backward(model)


def _trained(folder: Path) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES))
    result = train(
        *(model, _batches()), step=_Step(), optimizer=Sgd(lr=0.1), epochs=2, ema_decay=0.9, folder=folder, checkpoint_every_s=0
    )  # fmt: skip
    return model, result


def _interrupted(folder: Path) -> None:
    _Step.steps_left = 3
    with contextlib.suppress(KeyboardInterrupt):
        _trained(folder)
    _Step.steps_left = 10**9


def _checkpoint(folder: Path) -> Use:
    model, result = _trained(folder)
    need([record["epoch"] for record in result.records] == [1, 2], "epochs")
    names = set(result.records[-1])
    need(all(set(record) == names and set(map(type, record.values())) <= {int, float} for record in result.records), "records")
    need({value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}, "types")
    return lambda: None


def _colour_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, middle = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).eval()


def _made_dynamic() -> Any:
    net = _colour_net()
    made = dynamic_network(net, uniform_policy(layer_shapes(net), LayerBits(8, 8)), images(3)).eval()
    with torch.no_grad():
        for head in (cast(Head, module) for module in made.heads):
            head.linear.weight.copy_(torch.randn(head.linear.weight.shape, generator=torch.Generator().manual_seed(0)))
            head.linear.bias.fill_(5.0)
    return made


def _make_tiers(folder: Path) -> None:
    tiers = distill_tiers(_made_dynamic(), images(3, 64), count=2)
    save_tiers(tiers, folder, shares=[1 / len(tiers.policies)] * len(tiers.policies))


def _run(load: Callable[[nn.Module, Path], nn.Module]) -> Callable[[Path], Use]:
    @torch.no_grad()
    def read(folder: Path) -> Use:
        found = load(_colour_net(), folder)

        def use() -> None:
            with torch.no_grad():
                outputs = found(images(3))
            need(outputs.shape == (16, CLASSES) and outputs.dtype == torch.float32, "outputs")

        return use

    return read


def _make_report(folder: Path) -> None:
    _trained(folder / "run")
    pairs = (("clean", 0), ("contrast", 1), ("contrast", 3))
    cells = [Cell(corruption=name, severity=severity, top1=80.0 - severity, loss=0.5, images=100) for name, severity in pairs]
    save_quality(QualityTable(tuple(cells)), folder / "grid.json")
    row = {"runtime": "onnxruntime 1.31", "batch_size": 1, "file_bytes": 10, "float_layers": 0, "cpu_ms": 0.5, "wall_ms": 0.5}
    rows = [{**row, "file": name, "images_per_s": 2000.0, "times_faster": 1.0, "top1": 90.0} for name in ("float", "w4.onnx")]
    about = {"format": 1, "machine": "a processor", "threads": 1, "rounds": 15, "input_shape": SHAPE, "rows": rows}
    (folder / "bench.json").write_text(json.dumps(about))


def _report(folder: Path) -> Use:
    found = read_inputs([folder / "run", folder / "grid.json", folder / "bench.json"])
    return lambda: report_page(found, network=None, model=None, command="bitscape report").encode()


def _make_latency(folder: Path) -> None:
    rows = {name: {"8/8": 0.3 + at, "4/8": 0.25 + at} for at, name in enumerate(cost().by_name)}
    about: dict[str, Any] = {"runtime": "openvino 2026.4.1", "machine": "a processor", "threads": 1, "batch_size": 1, "input_shape": SHAPE}
    LatencyTable(**about, fingerprint=fingerprint(cost().shapes), network_ms=2.8, float_ms=26.6, layers=rows).save(folder / "latency.json")


def _make_scores(folder: Path) -> None:
    values = np.random.default_rng(0).random((len(cost().layers), len(DEFAULT_CANDIDATES)))
    values[0, 0] = np.inf
    ScoreTable(tuple(cost().by_name), DEFAULT_CANDIDATES, values, "fisher", 3, fingerprint(cost().shapes)).save(folder / "scores.json")


def _make_packed(folder: Path) -> None:
    policy = replace(mixed_policy(cost().shapes), provenance={"images": [16, *SHAPE]})
    save_packed(calibrate(with_quantizers(network(), policy), images()), folder / "packed.safetensors", policy=policy)


PACKED: tuple[Damage, ...] = (*SAFETENSORS, resealed(metadata_only), resealed(damaged_structure))
READERS: dict[str, Reader] = {
    "policy": Reader(
        cases=10_000, make=lambda f: mixed_policy(cost().shapes).save(f / "policy.json"), damage={"policy.json": JSON}, read=_policy
    ),
    "scores": Reader(cases=10_000, make=_make_scores, damage={"scores.json": JSON}, read=_scores),
    "latency table": Reader(cases=10_000, make=_make_latency, damage={"latency.json": JSON}, read=_latency),
    "packed": Reader(
        cases=10_000,
        make=_make_packed,
        damage={"packed.safetensors": PACKED},
        read=_packed,
    ),
    "weights": Reader(
        cases=10_000,
        make=lambda f: save_weights(network().state_dict(), f / "model.safetensors"),
        damage={"model.safetensors": SAFETENSORS},
        read=_weights,
    ),
    "checkpoint": Reader(
        cases=10_000,
        make=_interrupted,
        damage={"checkpoint.safetensors": (*SAFETENSORS, metadata_only), "run.json": (damaged_json,)},
        read=_checkpoint,
    ),
    "dynamic folder": Reader(
        cases=10_000,
        make=lambda f: save_dynamic(_made_dynamic(), f),
        damage={"dynamic.json": JSON, "policy.json": JSON, "model.safetensors": SAFETENSORS},
        read=_run(load_dynamic),
    ),
    "folder of tiers": Reader(
        cases=10_000,
        make=_make_tiers,
        damage={"tiers.json": JSON, "gate.safetensors": SAFETENSORS, "tier1/policy.json": JSON, "tier2/model.safetensors": SAFETENSORS},
        read=_run(load_tiers),
    ),
    "report": Reader(
        cases=10_000,
        make=_make_report,
        damage={"run/run.json": JSON, "run/metrics.jsonl": (damaged_lines, damaged_bytes), "grid.json": JSON, "bench.json": JSON},
        read=_report,
    ),
    **DATA_READERS,
}
