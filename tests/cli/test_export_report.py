import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitscape.cli.export_report import report_agreement, report_file, report_packed, report_parity
from bitscape.cli.export_source import ExportSource
from bitscape.exporters.agreement import Agreement
from bitscape.exporters.onnx.qdq import OnnxInfo
from bitscape.exporters.packed.file import save_packed
from bitscape.exporters.parity import LayerParity, ParityReport
from bitscape.verbs.export import ExportReport
from tests.exporters.networks import images, policy_for, quantized


@pytest.fixture(scope="module")
def source() -> ExportSource:
    torch.manual_seed(0)
    return source_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)), images(16, seed=5))


def source_of(network: nn.Module, held_out: Tensor | None) -> ExportSource:
    policy, ready = policy_for(network, [(4, 8)]), quantized(network, bits=[(4, 8)])
    return ExportSource(float_network=network, network=ready, policy=policy, images=images(), held_out=held_out)


def agreement(**changed: object) -> Agreement:
    return Agreement(**{"images": 16, "difference": 0.0, "identical": 1.0, "same_class": None, **changed})


def reported(**changed: object) -> ExportReport:
    info = OnnxInfo(Path("net.onnx"), 1000, 772, 72, {"0": 4, "3": 4}, 2)
    exact = {"boxes": agreement(), "scores": agreement(same_class=1.0)}
    simulated = {"boxes": agreement(difference=0.015, identical=0.25), "scores": agreement(difference=0.5, same_class=0.75)}
    report = ExportReport(
        path=info.path, file_bytes=1000, info=info, runtime="some runtime 1.0", exact=exact, simulated=simulated, compared=16
    )
    return dataclasses.replace(report, **changed)


def test_bytes_of_a_file_by_hand(source, capsys):
    report_file(source, reported(), "onnx-container")
    shown = capsys.readouterr().out
    rows = {name.strip(): count for name, _, count in (line.rpartition(" ") for line in shown.splitlines())}
    assert rows["weights, as the policy's bits"] == str((4 * 3 + 5 * 256) * 4 // 8)
    assert rows["of it scales and biases"] == "72"
    assert (rows["weights, scales and biases, in the file"], rows["graph"], rows["file"]) == ("772", "228", "1,000")
    assert rows["float32 tensors"] == f"{4 * (4 * 3 + 4 + 5 * 256 + 5):,}"
    assert "2 tensors between layers got 8 bits" in shown and "weights of 2 of 2 layers are stored as integers: 2 in 4 bits" in shown


def test_bytes_of_scales_in_a_packed_file_are_those_it_holds(capsys, tmp_path):
    torch.manual_seed(0)
    transposed = source_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2)), None)
    info = save_packed(transposed.network, tmp_path / "net.safetensors")
    report_packed(transposed, ExportReport(path=info.path, file_bytes=info.file_bytes, info=info))
    rows = {name.strip(): count for name, _, count in (line.rpartition(" ") for line in capsys.readouterr().out.splitlines())}
    assert rows["of it scales"] == str(4 * (4 + 6))


def rows_of(text: str) -> list[list[str]]:
    """Cells of the table, without the header."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("output"))
    return [re.split(r"  +", line.strip()) for line in lines[start + 1 :] if "  " in line]


def test_every_output_is_compared_with_both_networks(source, capsys):
    report_agreement(source, reported())
    assert rows_of(capsys.readouterr().out) == [
        ["boxes", "exact integers", "0 %", "-", "100.0 %"],
        ["boxes", "before the export", "1.5 %", "-", "25.0 %"],
        ["scores", "exact integers", "0 %", "100.0 %", "100.0 %"],
        ["scores", "before the export", "50 %", "75.0 %", "100.0 %"],
    ]


def test_it_is_said_on_which_images_networks_are_compared(source, capsys):
    report_agreement(source, reported())
    assert "some runtime 1.0, compared on 16 images of --calibration held out from setting ranges\n" in capsys.readouterr().out
    for held_out in (None, images(0)):
        alone = dataclasses.replace(source, held_out=held_out)
        assert torch.equal(alone.compared_images, images())
        report_agreement(alone, reported())
        assert "compared on the 16 images that set the ranges, for --calibration has no others" in capsys.readouterr().out


def test_convolutions_that_run_in_float_for_outputs_are_named(capsys):
    layer = LayerParity(name="boxes", codes=1000, differing=0, largest=0)
    report_parity(ParityReport(runtime="some 1.0", layers=(layer,), float_layers=(), float_outputs=("boxes",)))
    output = capsys.readouterr().out
    assert "computed in float, for it has no integer kernel for these (transposed, of 16-bit" in output
    assert "or of float outputs): boxes\n" in output
