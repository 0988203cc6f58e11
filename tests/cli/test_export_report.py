import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitscape.cli.export_report import report_agreement, report_file, report_parity
from bitscape.cli.export_source import ExportSource
from bitscape.errors import BitscapeError
from bitscape.exporters.agreement import Agreement, computed_otherwise
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.parity import LayerParity, ParityReport
from tests.exporters.networks import Applied, images, policy_for, quantized


@pytest.fixture(scope="module")
def case() -> tuple[ExportSource, IntegerNetwork]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    return source_of(network, held_out=images(16, seed=5))


def source_of(network: nn.Module, held_out: Tensor | None) -> tuple[ExportSource, IntegerNetwork]:
    policy, ready = policy_for(network, [(4, 8)]), quantized(network, bits=[(4, 8)])
    source = ExportSource(float_network=network, network=ready, policy=policy, images=images(), held_out=held_out, folded=False)
    return source, integer_network(ready, images())


class Answering:
    """A session whose outputs are those of exact integers, but for the classes of so many images."""

    def __init__(self, network: IntegerNetwork, wrong: int, scaled: float = 1.0) -> None:
        self.network, self.wrong, self.scaled = network, wrong, scaled
        self.outputs = tuple(run_integers(network, images(2)))

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        outputs = list(run_integers(self.network, torch.from_numpy(x)).values())
        if self.wrong:
            values, (_, second) = (part.unbind(1) for part in outputs[0][: self.wrong].topk(2))
            outputs[0][torch.arange(self.wrong), second] = values[0] + 0.1
        return [(output * self.scaled if self.scaled != 1 else output).numpy() for output in outputs]


def test_bytes_of_a_file_by_hand(case, capsys):
    report_file(*case, 700 + 72, 1000, Path("net.onnx"))
    rows = {name.strip(): count for name, _, count in (line.rpartition(" ") for line in capsys.readouterr().out.splitlines())}
    assert rows["weights, as the policy's bits"] == str((4 * 3 + 5 * 256) * 4 // 8)
    assert rows["of it scales and biases"] == str(4 * 2 * (4 + 5))
    assert (rows["weights, scales and biases, in the file"], rows["graph"], rows["file"]) == ("772", "228", "1,000")
    assert rows["float32 tensors"] == f"{4 * (4 * 3 + 4 + 5 * 256 + 5):,}"


@pytest.mark.parametrize(
    ("same_class", "difference", "refused"),
    [
        *[(1.0, 0.24, False), (1.0, 0.26, True), (0.8, 0.03, False), (0.75, 0.03, True), (0.75, 0.01, False)],
        *[(None, 0.24, False), (None, 0.26, True), (None, math.inf, True)],
    ],
)
def test_classes_that_hang_by_a_thread_may_change(same_class, difference, refused):
    assert computed_otherwise(Agreement(images=16, same_class=same_class, identical=0.0, difference=difference)) == refused


def rows_of(text: str) -> list[list[str]]:
    """Cells of the table, without the header."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("output"))
    return [re.split(r"  +", line.strip()) for line in lines[start + 1 :] if "  " in line]


def test_a_runtime_that_gives_other_classes_is_refused(case, capsys):
    source, network = case
    report_agreement(source, network, Answering(network, 0), "some runtime 1.0")
    shown = capsys.readouterr().out
    exact, simulated = rows_of(shown)
    assert exact == ["output0", "exact integers", "0 %", "100.0 %", "100.0 %"]
    assert simulated[:2] == ["output0", "before the export"] and 0 < float(simulated[2].split()[0]) < 5
    refusal = r"some runtime 1\.0 computes output output0 otherwise .*, and their class on 75\.0 % of the images"
    with pytest.raises(BitscapeError, match=refusal):
        report_agreement(source, network, Answering(network, 4), "some runtime 1.0")


def test_it_is_said_on_which_images_networks_are_compared(case, capsys):
    source, network = case
    report_agreement(source, network, Answering(network, 0), "some runtime 1.0")
    assert "some runtime 1.0, compared on 16 images of --calibration held out from setting ranges\n" in capsys.readouterr().out
    for held_out in (None, images(0)):
        alone = dataclasses.replace(source, held_out=held_out)
        assert torch.equal(alone.compared_images, images())
        report_agreement(alone, network, Answering(network, 0), "some runtime 1.0")
        assert "compared on the 16 images that set the ranges, for --calibration has no others" in capsys.readouterr().out


def test_a_runtime_whose_outputs_are_far_off_is_refused_whatever_the_classes(case):
    source, network = case
    report_agreement(source, network, Answering(network, 0, scaled=1.2), "some runtime 1.0")
    with pytest.raises(BitscapeError, match=r"output0 otherwise than the file says: 30 % off exact integers, and their class on 100\.0 %"):
        report_agreement(source, network, Answering(network, 0, scaled=1.3), "some runtime 1.0")


def test_every_output_is_compared(capsys):
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 8, 3), "boxes": nn.Conv2d(8, 4, 1), "scores": nn.Linear(8, 5)}
    network = Applied(lambda net, x: {"boxes": net.boxes(net.stem(x)), "scores": net.scores(net.stem(x).mean((2, 3)))}, **layers)
    source, integer = source_of(network, images(16, seed=5))
    report_agreement(source, integer, Answering(integer, 0), "some runtime 1.0")
    rows = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[name, other] for name in ("boxes", "scores") for other in ("exact integers", "before the export")]
    assert [row[3] == "-" for row in rows] == [True, True, False, False]

    class Off(Answering):
        def run(self, x: np.ndarray) -> list[np.ndarray]:
            boxes, scores = super().run(x)
            return [boxes * 1.5, scores]

    with pytest.raises(BitscapeError, match=r"computes output boxes otherwise than the file says: 50 % off exact integers"):
        report_agreement(source, integer, Off(integer, 0), "some runtime 1.0")


def test_convolutions_that_run_in_float_for_outputs_are_named(capsys):
    layer = LayerParity(name="boxes", codes=1000, differing=0, largest=0)
    report_parity(ParityReport(runtime="some 1.0", layers=(layer,), float_layers=(), float_outputs=("boxes",)), 0.0)
    output = capsys.readouterr().out
    assert "computed in float, for it has no integer kernel for these (transposed, of 16-bit" in output
    assert "or of float outputs): boxes\n" in output
