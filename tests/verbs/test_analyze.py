"""Which layers hurt, on tiny networks whose errors are known."""

import math

import pytest
import torch
from torch import Tensor, nn

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.measure.analysis.result import Analysis
from bitscape.policy import LayerBits
from tests.networks import drawn


@pytest.fixture(autouse=True)
def no_graph():
    with torch.no_grad():
        yield


class Chain(nn.Module):
    """Two linear layers; the weight of the first lies on its 2-bit grid, the second's is far off it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.first.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        self.second.weight.data = torch.tensor([[0.6, 1.0], [1.0, 0.6]])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def eye() -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75]]).repeat(16, 1)


def test_the_error_of_each_layer_alone_is_that_of_a_calculation_by_hand():
    model = Chain().eval()
    found = bs.analyze(model, eye(), "2/8", compared=64)
    assert found.by_error() == ["second", "first"]
    quantized = bs.quantize(model, bs.Policy({name: LayerBits(2, 8) for name in ("first", "second")}), eye(), repair=None)
    outputs, alone = model(eye()), quantized.second(eye())
    expected = float((alone - outputs).norm() / outputs.norm())
    assert found.layers["second"].alone.relative_error == pytest.approx(expected, rel=1e-3)
    assert found.layers["first"].noise.weight.sqnr_db is None
    weight = quantized.second.weight_quantizer(model.second.weight)
    noise = float((weight - model.second.weight).square().sum() / model.second.weight.square().sum())
    assert found.layers["second"].noise.weight.sqnr_db == pytest.approx(-10 * math.log10(noise), abs=1e-3)
    assert found.layers["second"].noisier == "weight"


def test_all_but_one_layer_leaves_the_error_of_the_others():
    found = bs.analyze(Chain().eval(), eye(), "2/8", compared=64)
    first, second = (found.layers[name] for name in ("first", "second"))
    assert second.others.relative_error == pytest.approx(first.alone.relative_error)
    assert first.others.relative_error == pytest.approx(second.alone.relative_error)
    assert found.weights.divergence > found.inputs.divergence
    assert found.whole.divergence == pytest.approx(second.alone.divergence, rel=0.1)


def test_a_layer_left_float_and_one_that_never_runs_are_left_out():
    model = Chain().eval()
    model.unused = nn.Linear(2, 2)
    bits = {"first": LayerBits.FLOAT, "second": LayerBits(4, 8), "unused": LayerBits(4, 8)}
    assert list(bs.analyze(model, eye(), bs.Policy(bits)).layers) == ["second"]


def test_answers_that_change_are_counted():
    model = Chain().eval()
    model.second.weight.data = torch.tensor([[0.6, 1.0], [0.97, 0.6]])
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.52, 0.48], [0.25, 0.75]]).repeat(16, 1)
    bits = {"first": LayerBits.FLOAT, "second": LayerBits(2, 8)}
    network = bs.quantize(model, bs.Policy(bits), images, repair=None)
    changed = (network(images).argmax(1) != model(images).argmax(1)).double().mean()
    found = bs.analyze(model, images, bs.Policy(bits), task="classes", compared=64)
    assert found.whole.changed == found.layers["second"].alone.changed == changed
    assert found.whole.divergence > 0 and found.layers["second"].others.divergence == 0


@pytest.mark.parametrize("task", ["classes", "follow", "binary"])
def test_every_task_has_a_table_and_a_file(tmp_path, task):
    found = bs.analyze(Chain().eval(), eye(), "3/4", task=task)
    found.save(tmp_path / "analysis.json")
    assert Analysis.load(tmp_path / "analysis.json") == found
    lines = str(found).splitlines()
    assert lines[0] == f"Analysis: 2 layers, task {task}, 64 samples, outputs of 16 compared"
    assert ("changed %" in lines[1]) == (task != "follow")
    assert [line.split()[0] for line in lines[2:4]] == found.by_error()
    assert lines[4].startswith("all quantized: error ")
    assert len(found.layer_table(1).rows) == 1 and found.layer_table(1).note.startswith("less error: 1 more layer. all quantized")


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "analysis.json"
    path.write_text('{"format": 1, "task": "classes"}', encoding="utf-8")
    with pytest.raises(BitscapeError, match=r"analysis\.json: .*; this version reads format 1"):
        Analysis.load(path)


def test_dicts_nested_outputs_and_several_inputs_are_compared():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, object]:
            return {"small": 1e-3 * self.left(left), "heads": [self.right(right)], "best": left.argmax(1)}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Two().eval()
    found = bs.analyze(model, [{"left": drawn(20, 3), "right": drawn(20, 3, seed=1)}], "3/8")
    assert found.task == "follow" and set(found.layers) == {"left", "right"}
    # Each layer makes one of two outputs, whose errors count alike however small they are.
    parts = [found.layers[name].alone.relative_error for name in ("left", "right")]
    assert found.whole.relative_error == pytest.approx(sum(parts))


def test_products_of_attention_are_layers_too():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention().eval()
    tokens = drawn(16, 5, 8)
    assert "attention.scores" not in bs.analyze(model, tokens, "4/8").layers
    found = bs.analyze(model, tokens, "4/8", attention_products=True)
    noise = found.layers["attention.values"].noise
    assert (noise.weight.bits, noise.input.bits) == (4, 8)  # the weight's place has the second operand
    assert noise.weight.low < 0 < noise.weight.high
    assert noise.input.low >= 0 and noise.input.high <= 1  # what a softmax gives
    assert found.layers["attention.scores"].alone.divergence > 0


def test_a_repaired_network_is_compared_with_its_reference():
    model = Chain().eval()
    model.second.bias = nn.Parameter(torch.zeros(2))
    policy = bs.Policy({name: LayerBits(3, 8) for name in ("first", "second")})
    network = bs.quantize(model, policy, eye())
    found = bs.analyze(network, eye(), reference=model, compared=64)
    assert found.layers["second"].bits == "3/8"
    assert found.whole.relative_error == pytest.approx(float((network(eye()) - model(eye())).norm() / model(eye()).norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": "4"}, "write weight/activation bits"),
        ({"compared": 0}, "compared = 0: it must be a whole number from 1"),
        ({"reference": Chain()}, "reference: the network is float itself"),
    ],
)
def test_arguments_that_a_float_network_cannot_use_are_refused(arguments, message):
    with pytest.raises(BitscapeError, match=message):
        bs.analyze(Chain().eval(), eye(), **arguments)


def test_norms_are_folded_once(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with caplog.at_level("INFO", "bitscape.quant"):
        bs.analyze(model.eval(), torch.randn(4, 3, 8, 8), compared=2)
    assert [record.message for record in caplog.records if "folded" in record.message] == [
        "folded 1 of 1 batch norms"
    ]


def test_bits_of_a_quantized_network_are_its_own():
    model = Chain().eval()
    policy = bs.Policy({name: LayerBits(3, 8) for name in ("first", "second")})
    network = bs.quantize(model, policy, eye(), repair=None)
    with pytest.raises(BitscapeError, match="bits: the network is quantized already"):
        bs.analyze(network, eye(), "4/8")
