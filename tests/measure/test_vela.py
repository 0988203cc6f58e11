from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.cost.latency import LatencyTable, with_latency
from bitscape.cost.layers import measure
from bitscape.cost.policy_cost import cost
from bitscape.errors import BitscapeError
from bitscape.exporters.tflite.file import tflite_content, tflite_network
from bitscape.exporters.tflite.flatbuffer import one_operator, operator_weights
from bitscape.measure.npu_table import build_npu_table
from bitscape.measure.vela import Compiled, Vela
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from tests.cli.run import MODEL, run_cli, succeed
from tests.exporters.networks import Applied, images
from tests.needs import runtime_or_skip

pytestmark = pytest.mark.slow

runtime_or_skip("ethosu")
runtime_or_skip("ai_edge_litert")

WIDTHS = (8, 4, 3)
PAIRS = [LayerBits(width, 8) for width in WIDTHS]
X = images(4, 16)


@cache
def network() -> nn.Module:
    """Its last layers hold many weights for little work: flash bounds them."""
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(16, 64, 1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(stem, body).eval()


def compiled(policy: Policy) -> tuple[bytes, Compiled]:
    quantized = calibrate(with_quantizers(network(), policy), X)
    content = tflite_content(tflite_network(quantized, X), X)
    return content, Vela().compile(content)


@cache
def table() -> LatencyTable:
    return build_npu_table(network(), X, PAIRS, Vela())


def test_a_table_predicts_the_whole_network_at_mixed_bits() -> None:
    shapes = layer_shapes(network())
    profile = with_latency(measure(network(), (3, 16, 16)), table())
    mixed = Policy({name: LayerBits(WIDTHS[at % 3], 8) for at, name in enumerate(shapes)})
    for policy in (uniform_policy(shapes, LayerBits(8, 8)), uniform_policy(shapes, LayerBits(3, 8)), mixed):
        _, found = compiled(policy)
        assert cost("latency_ms", profile, policy) == pytest.approx(found.ms, rel=0.02)
        assert cost("flash_bytes", profile, policy) == pytest.approx(found.flash_bytes, rel=0.02)
        assert cost("sram_bytes", profile, policy) == pytest.approx(found.sram_bytes, rel=0.1)


def test_few_distinct_weights_take_few_bits_and_time_where_flash_bounds_a_layer() -> None:
    big = table().layers["1.4"]
    assert big["3/8"] < 0.6 * big["8/8"] and table().flash["1.4"]["3/8"] < 0.5 * table().flash["1.4"]["8/8"]
    small = table().layers["0.2"]
    assert small["3/8"] == pytest.approx(small["8/8"], rel=0.05)
    assert "not measured on silicon" in table().where


def test_operators_tell_all_of_the_time_and_none_is_on_the_cpu() -> None:
    content, found = compiled(uniform_policy(layer_shapes(network()), LayerBits(8, 8)))
    assert sum(operator.ms for operator in found.operators) == pytest.approx(found.ms)
    assert found.on_cpu == () and found.encoded_bytes < found.flash_bytes
    at = operator_weights(content).index("1.4.weight")
    alone = Vela().compile(one_operator(content, at))
    assert 0.8 * 512 * 64 < alone.encoded_bytes < 1.2 * 512 * 64


def test_what_the_npu_does_not_compute_is_named() -> None:
    net = Applied(lambda net, x: net.a(x)[:, ::2], a=nn.Conv2d(3, 8, 1))
    quantized = calibrate(with_quantizers(net.eval(), uniform_policy(layer_shapes(net), LayerBits(8, 8))), X)
    assert "STRIDED_SLICE" in Vela().compile(tflite_content(tflite_network(quantized, X), X)).on_cpu


def test_a_search_takes_caps_of_flash_and_sram() -> None:
    whole = sum(row["8/8"] for row in table().flash.values())
    budget = {"flash_bytes": "0.6x", "latency_ms": "0.9x"}
    result = bs.search(network(), X, budget=budget, target="ethos-u", latency=table(), candidates=PAIRS)
    profile = with_latency(measure(network(), (3, 16, 16)), table())
    assert cost("flash_bytes", profile, result.policy) <= 0.6 * whole
    assert result.policy.layers["1.6"].activation == 8


def test_coarse_scales_take_less_flash_and_a_policy_remembers_them() -> None:
    coarse = build_npu_table(network(), X, PAIRS, Vela(), coarseness=2.0)
    for name in ("1.4", "1.6"):
        assert coarse.flash[name]["4/8"] < 0.9 * table().flash[name]["4/8"]
    settings = {"budget": {"flash_bytes": "0.6x"}, "target": "ethos-u", "latency": coarse, "candidates": PAIRS}
    found = bs.search(network(), X, **settings)
    usual = replace(found.policy, provenance={})
    made = (bs.quantize(network(), policy, X, repair=None) for policy in (found.policy, usual))
    first, second = (each.get_parameter("1.4.weight_quantizer.scale") for each in made)
    assert torch.equal(first, 2 * second)
    with pytest.raises(BitscapeError, match="coarseness 2, which fisher alone scores"):
        bs.search(network(), X, method="hawq", **settings)


def test_a_table_of_a_runtime_has_no_flash() -> None:
    entries: dict[str, Any] = {name: getattr(table(), name) for name in ("fingerprint", "input_shape", "layers", "network_ms")}
    times = LatencyTable(runtime="openvino 1", machine="a machine", threads=1, batch_size=1, float_ms=1.0, **entries)
    with pytest.raises(BitscapeError, match="flash_bytes: the latency table has times alone"):
        bs.search(network(), X, budget={"flash_bytes": "0.6x"}, latency=times, candidates=PAIRS)


def test_files_are_compiled_side_by_side(tmp_path: Path) -> None:
    for width in (8, 3):
        content, _ = compiled(uniform_policy(layer_shapes(network()), LayerBits(width, 8)))
        (tmp_path / f"w{width}.tflite").write_bytes(content)
    files = [str(tmp_path / f"w{width}.tflite") for width in (8, 3)]
    shown = succeed("bench", *files, "--runtime", "vela", "--json", tmp_path / "figures.json")
    assert "ethos-u55-128; by Vela's performance model, not measured on silicon" in shown.out
    assert (tmp_path / "figures.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("net.onnx", "--runtime", "vela"), "compiles .tflite files alone"),
        (("net.tflite", "--accelerator", "ethos-u55-128"), "compiles .tflite files alone"),
        (("net.tflite", "--runtime", "vela", "--threads", "2"), "leave --threads"),
        (("net.tflite", "--runtime", "vela"), "Vela does not compile it"),
    ],
)
def test_what_vela_cannot_do_is_refused(arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("net.onnx", "net.tflite"):
        (tmp_path / name).write_bytes(b"no file")
    shown = run_cli("bench", *arguments)
    assert shown.code != 0 and said in shown.err


def test_accelerators_are_named() -> None:
    with pytest.raises(BitscapeError, match=r"accelerator='u55': allowed are ethos-u55-32"):
        Vela(accelerator="u55")


def test_the_command_writes_a_table_that_a_search_takes(tmp_path: Path) -> None:
    out = tmp_path / "u85.json"
    options = ("--input-shape", "1x8x8", "--runtime", "vela", "--accelerator", "ethos-u85-128", "--candidates", "w=4,8;a=8")
    shown = succeed("latency", "build", *MODEL, *options, "--out", out)
    assert "flash of all" in shown.out and "ethos-u85-128, by Vela's performance model, not measured on silicon" in shown.out
    found = LatencyTable.load(out)
    assert found.float_ms is None and found.flash.keys() == found.layers.keys() == found.sram.keys()
    assert sum(row["8/8"] for row in found.layers.values()) == pytest.approx(found.network_ms)


def test_the_accelerator_goes_with_vela_alone(tmp_path: Path) -> None:
    command = ("latency", "build", *MODEL, "--input-shape", "1x8x8", "--out", tmp_path / "table.json")
    assert "--accelerator ethos-u55-64 is for --runtime vela" in run_cli(*command, "--accelerator", "ethos-u55-64").err
    assert "leave --threads" in run_cli(*command, "--runtime", "vela", "--threads", 2).err
