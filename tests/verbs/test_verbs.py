"""The way from a float network to checked files, as users call it, on networks and data of many forms."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitscape as bs
import bitscape.verbs.quantize as quantizing
from bitscape.engine.forward import device_of
from bitscape.policy import uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.repair import repair
from bitscape.searches.problem import SearchProblem

pytestmark = pytest.mark.slow

CANDIDATES = [bs.LayerBits(weight, 8) for weight in (2, 4, 8)]


def classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ).eval()


class Detector(nn.Module):
    """Two heads of different scale in a mapping, and whole numbers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()[:5]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, pixels: Tensor) -> dict[str, object]:
        features = self.body(pixels)
        scores = self.scores(features)
        return {"boxes": 100 * self.boxes(features), "heads": [scores], "best": scores.argmax(1)}


IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 5
DATA = {
    "tensor": IMAGES,
    "loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16),
    "dataset": TensorDataset(IMAGES),
    "mappings": [{"pixels": part, "labels": label} for part, label in zip(IMAGES.split(8), LABELS.split(8), strict=True)],
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_any_form_of_the_same_data_gives_the_same_policy_and_network(data):
    model = classifier()
    expected = bs.search(model, IMAGES, "weight_bytes=w4", candidates=CANDIDATES).policy
    policy = bs.search(model, data, "weight_bytes=w4", candidates=CANDIDATES).policy
    assert policy.layers == expected.layers
    same_order = [IMAGES] if isinstance(data, list | DataLoader) else IMAGES  # rows are shuffled
    outputs = [bs.quantize(model, policy, each)(IMAGES) for each in (data, same_order)]
    assert torch.equal(*outputs)


def test_the_verb_searches_as_the_method_does():
    model = classifier()
    problem = SearchProblem.of(model=model, samples=IMAGES, budget="weight_bytes=w4", candidates=tuple(CANDIDATES))
    by_method = bs.Fisher(images=16).search(problem).policy
    by_verb = bs.search(model, [IMAGES], "weight_bytes=w4", candidates=CANDIDATES, method=bs.Fisher(images=16)).policy
    assert by_verb.layers == by_method.layers and by_verb.provenance == by_method.provenance


def test_the_quantized_network_has_the_bits_of_its_policy_and_the_model_is_left_alone():
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy = uniform_policy(["0", "3", "7"], bs.LayerBits(4, 8))
    network = bs.quantize(model, policy, IMAGES)
    assert {name: static_bits(layer) for name, layer in quantized_layers(network).items()} == policy.layers
    assert not network.training and device_of(network).type == "cpu"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    trainable = bs.quantize(model, policy, IMAGES, for_training=True)
    assert any(isinstance(module, nn.BatchNorm2d) for module in trainable.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_repair_brings_outputs_nearer_to_those_of_the_float_network():
    model, policy = classifier(), uniform_policy(["0", "3", "7"], bs.LayerBits(3, 8))
    with torch.no_grad():
        expected = model(IMAGES)
        errors = [float((bs.quantize(model, policy, IMAGES, repair=repair)(IMAGES) - expected).norm()) for repair in ("compensate", None)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("word", ["tune", "reconstruct"])
def test_words_that_train_see_three_quarters_of_the_samples_repaired(word, monkeypatch, tmp_path):
    told, policy = [], uniform_policy(["0", "3", "7"], bs.LayerBits(3, 8))

    def train(network, *given, **settings):
        told.append((network, *given, settings))
        return network

    monkeypatch.setitem(quantizing._TUNINGS, word, train)
    network = bs.quantize(classifier(), policy, IMAGES, repair=word, task="follow", seed=3, folder=tmp_path)
    ((trained, folded, seen, held_out, task, settings),) = told
    assert trained is network and (len(seen), len(held_out)) == (30, 10)
    assert task.name == "follow" and settings == {"seed": 3, "folder": tmp_path}
    torch.testing.assert_close(folded(IMAGES), classifier()(IMAGES))
    expected = repair(calibrate(with_quantizers(folded, policy), seen), folded, seen)
    for name, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_words_that_train_refuse_what_they_cannot_use(tmp_path):
    model, policy = classifier(), uniform_policy(["0", "3", "7"], bs.LayerBits(3, 8))
    with pytest.raises(bs.BitscapeError, match="3 samples; repair='tune' needs at least 4"):
        bs.quantize(model, policy, IMAGES[:3], repair="tune")
    with pytest.raises(bs.BitscapeError, match="repair=None keeps nothing there"):
        bs.quantize(model, policy, IMAGES, repair=None, folder=tmp_path)


@pytest.mark.parametrize("method", ["fisher", "kl", "hawq", "local"])
def test_a_network_with_several_outputs_is_scored_and_quantized(method):
    model = Detector().eval()
    result = bs.search(model, IMAGES, "weight_bytes=w4", candidates=CANDIDATES, method=method)
    assert result.scores is not None and (result.scores.values.max(1) > result.scores.values.min(1)).all()
    outputs = bs.quantize(model, result.policy, IMAGES)(IMAGES)
    assert outputs["boxes"].shape == (40, 4, 8, 8) and outputs["heads"][0].shape == (40, 3, 8, 8)


def test_scores_of_several_outputs_do_not_depend_on_their_units():
    scores = []
    for unit in (1.0, 1000.0):
        model = Detector().eval()
        with torch.no_grad():
            model.boxes.weight.mul_(unit), model.boxes.bias.mul_(unit)
        scores.append(bs.search(model, IMAGES, "weight_bytes=w4", candidates=CANDIDATES).scores.values)
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "runtime"), [(".onnx", "onnxruntime"), (".xml", "openvino")])
@pytest.mark.parametrize("build", [classifier, Detector])
def test_files_are_written_checked_and_told_of(build, suffix, runtime, tmp_path):
    from tests.needs import runtime_or_skip

    runtime_or_skip(runtime)
    model = build().eval()
    policy = bs.search(model, IMAGES, "weight_bytes=w4", candidates=CANDIDATES).policy
    report = bs.export(bs.quantize(model, policy, IMAGES), tmp_path / f"network{suffix}", IMAGES)
    assert report.path.is_file() and report.runtime.startswith(runtime)
    assert report.parity.float_layers == () and set(report.exact) == set(report.simulated)
    assert set(report.exact) == ({"output0"} if build is classifier else {"boxes", "heads.0", "best"})
    assert report.exact["output0" if build is classifier else "boxes"].images == 10  # every fourth of forty sets no range


def test_training_starts_nearer_to_the_float_network_if_it_starts_repaired():
    model, policy = classifier(), uniform_policy(["0", "3", "7"], bs.LayerBits(3, 8))
    with torch.no_grad():
        expected = model(IMAGES)
        networks = [
            bs.quantize(model, policy, IMAGES, repair=repair, for_training=True)
            for repair in ("compensate", None)
        ]
        repaired, calibrated = (float((each(IMAGES) - expected).norm()) for each in networks)
    assert repaired < calibrated


def test_packed_files_are_read_back(tmp_path):
    model = classifier()
    network = bs.quantize(model, uniform_policy(["0", "3", "7"], bs.LayerBits(4, 8)), IMAGES, for_training=True)
    report = bs.export(network, tmp_path / "network.safetensors")
    assert report.file_bytes == report.path.stat().st_size
    assert torch.equal(bs.load_packed(report.path, model).eval()(IMAGES), network(IMAGES))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bs.search(classifier(), IMAGES, "weight_bytes=w4", method="fischer"), "method='fischer': unknown; nearest: fisher"),
        (lambda: bs.search(classifier(), IMAGES, "weight_bytes=w4", target="openvine"), "target='openvine': unknown; nearest: openvino"),
        (lambda: bs.search(classifier(), "photos/", "weight_bytes=w4"), "a name or path is read by bitscape.load_dataset"),
        (
            lambda: bs.search(Detector().eval(), IMAGES, "weight_bytes=w4", method="seam"),
            "method seam needs logits of classes, whose margins it keeps, and the task is 'follow'; use method differentiable or asga",
        ),
        (
            lambda: bs.search(classifier(), [IMAGES, IMAGES[..., :6]], "weight_bytes=w4", pick="least-sharp"),
            r"data: samples of shapes \[\[3, 8, 8\]\] and \[\[3, 8, 6\]\] do not stack .* use method fisher",
        ),
        (lambda: bs.export(classifier(), "x.onnx", IMAGES), "network: it has no quantized layer"),
    ],
)
def test_mistakes_are_named(call, said):
    with pytest.raises(bs.BitscapeError, match=said):
        call()


def test_a_file_needs_a_known_suffix_and_samples(tmp_path):
    network = bs.quantize(classifier(), uniform_policy(["0", "3", "7"], bs.LayerBits(4, 8)), IMAGES)
    with pytest.raises(bs.BitscapeError, match=r"unknown suffix; use .safetensors \(packed\), .onnx, .xml"):
        bs.export(network, tmp_path / "network.pt", IMAGES)
    with pytest.raises(bs.BitscapeError, match=r"data is missing: samples set ranges in .onnx files"):
        bs.export(network, tmp_path / "network.onnx")
