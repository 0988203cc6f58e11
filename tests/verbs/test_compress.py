import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.data.samples import Samples
from bitscape.engine.task import Classes
from bitscape.engine.user_task import User
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


def test_16_bit_activations_for_openvino_are_refused_before_the_search(tmp_path):
    offered = [bs.LayerBits(4, 8), bs.LayerBits(4, 16)]
    with pytest.raises(bs.BitscapeError, match=r"candidates: 4/16 have 16-bit activations, and OpenVINO computes in 8, .*net\.xml"):
        bs.compress(classifier(), IMAGES, "4bit", tmp_path / "net.xml", candidates=offered)


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
        ("net.pb", "unknown suffix; use .safetensors .packed., .*or .json .the policy."),
        ("absent/net.onnx", "there is no folder"),
        ("policy.json", "stands twice; give each file once"),
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


def test_a_drop_is_measured_on_the_data_for_evaluation_and_has_no_uniform_form(tmp_path):
    model = classifier()
    with torch.no_grad():
        labels = model(IMAGES).argmax(1)
    made = bs.compress(model, IMAGES, "drop=40", tmp_path / "policy.json", evaluation=iter([(IMAGES, labels)]))
    told = made.result.policy.provenance["drop"]
    assert [form.name for form in made.forms] == ["float", "quantized"]
    assert (told["metric"], told["float"], made.forms[0].evaluation.value) == ("top1", 100.0, 100.0)
    assert told["value"] == pytest.approx(made.forms[1].evaluation.value) and told["value"] >= 60

    def negative_distance(outputs, targets):
        return -(outputs - targets).abs().mean(1)

    with torch.no_grad():
        pairs = (IMAGES, model(IMAGES))
    made = bs.compress(model, IMAGES, "drop=0.1", tmp_path / "policy.json", evaluation=pairs, metric=negative_distance)
    told = made.result.policy.provenance["drop"]
    assert told["metric"] == made.forms[1].evaluation.metric == "negative_distance"
    assert told["value"] == pytest.approx(made.forms[1].evaluation.value, abs=1e-6)


def test_a_drop_without_data_for_evaluation_is_measured_on_samples_held_out(tmp_path):
    model = classifier()
    with torch.no_grad():
        labelled = IMAGES, model(IMAGES).argmax(1)
    made = bs.compress(model, labelled, "drop=40", tmp_path / "policy.json")
    assert made.measured_on == "10 samples held out" and made.forms[0].evaluation.samples == 10
    assert made.result.policy.provenance["drop"]["value"] == pytest.approx(made.forms[1].evaluation.value)
    followed = bs.compress(model, IMAGES, "drop=0.9", tmp_path / "policy.json", task="follow")
    told = followed.result.policy.provenance["drop"]
    assert told["metric"] == "-relative_error"
    assert told["value"] == pytest.approx(-followed.forms[1].evaluation.value, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repair": "tuned"}, "repair='tuned': allowed are .*'tune', 'reconstruct' and None; nearest: tune"),
        ({"repair_folder": "kept"}, "folder='kept': repair='compensate' keeps nothing there"),
        ({"evaluation": "absent/folder"}, "data: str; pass a tensor"),
        ({"evaluation": (IMAGES, torch.zeros(3, dtype=torch.int64))}, "rows"),
        ({"metric": len}, "metric: it is measured on evaluation=, which is missing"),
        ({"taks": "follow"}, "taks: compress has no such argument"),
        ({"pined": {}}, "pined: compress has no such argument; nearest: pinned"),
        ({"for_training": True}, "for_training: compress has no such argument"),
        ({"method": "fishers"}, "method='fishers': unknown; nearest: fisher"),
    ],
)
def test_arguments_that_cannot_be_used_are_named_before_any_work(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr("bitscape.verbs.compress.search", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(bs.BitscapeError, match=message):
        bs.compress(classifier(), IMAGES, "4bit", tmp_path / "policy.json", **settings)


@pytest.mark.parametrize(("name", "package"), [("net.onnx", "onnxruntime"), ("net.xml", "openvino"), ("net.qonnx.onnx", "onnxscript")])
def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr("bitscape.verbs.compress.search", lambda *_, **__: pytest.fail("searched"))
    for each in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, each, None if each == package else ModuleType(each))
    with pytest.raises(bs.BitscapeError, match=rf"a package is missing .*{package}.*pip install 'bitscape\["):
        bs.compress(classifier(), IMAGES, "4bit", tmp_path / name)


def test_files_are_checked_with_the_float_network_and_the_task(tmp_path, monkeypatch):
    model = classifier()
    made = bs.compress(model, IMAGES, "4bit", tmp_path / "net.safetensors", task="follow")
    assert made.files[0].compared == 30
    asked = []
    monkeypatch.setattr("bitscape.verbs.compress.check_packages", lambda form: None)
    monkeypatch.setattr("bitscape.verbs.compress.export", lambda *_, **settings: asked.append(settings))
    for task, told in (("follow", "follow"), (Classes(), "classes"), (User(), "follow")):
        bs.compress(model, IMAGES, "4bit", tmp_path / "net.onnx", task=task)
        assert asked[-1]["task"] == told and asked[-1]["float_model"] is model
