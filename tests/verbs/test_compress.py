import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.data.samples import Samples
from bitscape.searches.choices import InfeasibleBudget
from bitscape.verbs.proxy import parted, proxy_of
from tests.networks import CALLED

pytestmark = pytest.mark.slow


def classifier() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_all_of_it_equals_its_parts(tmp_path):
    model, files = classifier(), [tmp_path / "net.safetensors", tmp_path / "policy.json"]
    made = bs.compress(model, IMAGES, "4bit", files)
    seen, held_out = parted(proxy_of(model, IMAGES, count=256, inputs=None, seed=0))
    policy = bs.search(model, seen, "4bit").policy
    network = bs.quantize(model, policy, seen)
    assert bs.Policy.load(files[1]).layers == made.result.policy.layers == policy.layers
    with torch.no_grad():
        assert torch.equal(made.network(IMAGES), network(IMAGES))
        assert torch.equal(bs.load_packed(files[0], model)(IMAGES), network(IMAGES))
    error = bs.evaluate(network, held_out, task="follow", reference=model)
    in_float, mixed, uniform = made.forms
    assert (in_float.evaluation.value, mixed.evaluation) == (0.0, error)
    # 8 * 27, 8 * 72 and 5 * 8 weights, in whole words, and 21 scales
    assert in_float.cost["weight_bytes"] == 4 * 832
    assert mixed.cost["weight_bytes"] <= uniform.cost["weight_bytes"] == 832 // 2 + 4 * 21
    assert [report.path for report in made.files] == files[:1]


def test_labelled_data_are_measured_by_the_task_or_the_metric(tmp_path):
    labels = torch.arange(40) % 5
    made = bs.compress(classifier(), IMAGES, "6bit", tmp_path / "policy.json", evaluation=(IMAGES, labels))
    with torch.no_grad():
        hits = made.network(IMAGES).argmax(1) == labels
    assert made.forms[1].evaluation.metric == "top1"
    assert made.forms[1].evaluation.value == pytest.approx(100 * float(hits.float().mean()))

    def share_of_first(outputs, targets):
        return (outputs.argmax(1) == 0).float()

    made = bs.compress(classifier(), IMAGES, "6bit", tmp_path / "policy.json", evaluation=(IMAGES, labels), metric=share_of_first)
    with torch.no_grad():
        assert made.forms[0].evaluation.value == pytest.approx(float((classifier()(IMAGES).argmax(1) == 0).float().mean()))


def test_networks_of_several_inputs_are_compressed(tmp_path):
    case = CALLED["two images"]
    made = bs.compress(case.network(), Samples.of(case.inputs(40)), "6bit", tmp_path / "net.safetensors")
    assert made.forms[0].evaluation.value == 0 < made.forms[1].evaluation.value < 0.2


def test_it_prints_as_a_table(tmp_path):
    made = bs.compress(classifier(), IMAGES, "4bit", tmp_path / "net.safetensors")
    lines = repr(made).splitlines()
    assert lines[0] == "Compression, measured on 10 samples held out"
    assert lines[1].split() == ["network", "weights", "smaller", "BitOps", "relative_error"]
    assert [line.split()[0] for line in lines[2:5]] == ["float", "quantized", "uniform"]
    assert lines[5].startswith(f"files: {tmp_path / 'net.safetensors'} ")


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("net.tflite", "unknown suffix; use .safetensors .packed., .*or .json .the policy."),
        ("absent/net.onnx", "there is no folder"),
    ],
)
def test_files_that_cannot_be_written_are_named_before_any_work(tmp_path, monkeypatch, to, message):
    monkeypatch.setattr("bitscape.verbs.compress.search", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(bs.BitscapeError, match=message):
        bs.compress(classifier(), IMAGES, "4bit", [tmp_path / "policy.json", tmp_path / to])
    assert not (tmp_path / "policy.json").exists()


def test_too_few_samples_and_budgets_are_refused(tmp_path):
    with pytest.raises(bs.BitscapeError, match="data: 3 samples; give at least 4"):
        bs.compress(classifier(), IMAGES[:3], "4bit", tmp_path / "policy.json")
    with pytest.raises(InfeasibleBudget):
        bs.compress(classifier(), IMAGES, "weight_bytes=100", tmp_path / "policy.json")
