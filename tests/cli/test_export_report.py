from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitscape.cli.export_report import computed_otherwise, report_agreement, report_file
from bitscape.cli.export_source import ExportSource
from bitscape.errors import BitscapeError
from bitscape.export.agreement import Agreement
from bitscape.export.integer_execution import run_integers
from bitscape.export.integer_graph import IntegerNetwork, integer_network
from tests.export.networks import images, policy_for, quantized


@pytest.fixture(scope="module")
def case() -> tuple[ExportSource, IntegerNetwork]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    policy, ready = policy_for(network, [(4, 8)]), quantized(network, bits=[(4, 8)])
    return ExportSource(float_network=network, network=ready, policy=policy, images=images(), folded=False), integer_network(
        ready, images()
    )


class Answering:
    """A session whose outputs are those of exact integers, but for the classes of so many images."""

    def __init__(self, network: IntegerNetwork, wrong: int, scaled: float = 1.0) -> None:
        self.network, self.wrong, self.scaled = network, wrong, scaled

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        outputs: Tensor = run_integers(self.network, torch.from_numpy(x))
        values, (_, second) = (part.unbind(1) for part in outputs[: self.wrong].topk(2))
        outputs[torch.arange(self.wrong), second] = values[0] + 0.1
        if self.scaled != 1:
            outputs *= self.scaled
        return [outputs.numpy()]


def test_bytes_of_a_file_by_hand(case, capsys):
    report_file(*case, 700 + 72, 1000, Path("net.onnx"))
    rows = {name.strip(): count for name, _, count in (line.rpartition(" ") for line in capsys.readouterr().out.splitlines())}
    assert rows["weights, as the policy's bits"] == str((4 * 3 + 5 * 256) * 4 // 8)
    assert rows["of it scales and biases"] == str(4 * 2 * (4 + 5))
    assert (rows["weights, scales and biases, in the file"], rows["graph"], rows["file"]) == ("772", "228", "1,000")
    assert rows["float32 tensors"] == f"{4 * (4 * 3 + 4 + 5 * 256 + 5):,}"


@pytest.mark.parametrize(
    ("same_class", "difference", "refused"),
    [(1.0, 0.24, False), (1.0, 0.26, True), (0.8, 0.03, False), (0.75, 0.03, True), (0.75, 0.01, False)],
)
def test_classes_that_hang_by_a_thread_may_change(same_class, difference, refused):
    assert computed_otherwise(Agreement(images=16, same_class=same_class, identical=0.0, difference=difference)) == refused


def test_a_runtime_that_gives_other_classes_is_refused(case, capsys):
    source, network = case
    report_agreement(source, network, images(16), Answering(network, 0), "some runtime 1.0")
    assert "class of the exact integer network on 100.0 %; outputs 0 % off,\nequal to the last bit on 100.0 %" in capsys.readouterr().out
    refusal = r"some runtime 1\.0 gives the class of the exact integer network on 75\.0 % of the images, and outputs"
    with pytest.raises(BitscapeError, match=refusal):
        report_agreement(source, network, images(16), Answering(network, 4), "some runtime 1.0")


def test_a_runtime_whose_outputs_are_far_off_is_refused_whatever_the_classes(case):
    source, network = case
    report_agreement(source, network, images(16), Answering(network, 0, scaled=1.2), "some runtime 1.0")
    with pytest.raises(BitscapeError, match=r"class of the exact integer network on 100\.0 % of the images, and outputs that are 30 % off"):
        report_agreement(source, network, images(16), Answering(network, 0, scaled=1.3), "some runtime 1.0")
