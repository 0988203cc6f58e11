from pathlib import Path

import pytest
import safetensors.torch
from torch import nn

import bitscape as bs
from bitscape.data.batches import DIGITS
from bitscape.data.reading import BatchReader, read_samples
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.folders import replaced_if_good
from bitscape.policy import LayerBits, Policy
from bitscape.verbs.export import SUFFIXES
from tests.needs import runtime_or_skip
from tests.networks import conv_norm

CALIBRATION, HELD_OUT = 16, 256
POLICY = Policy({"0": LayerBits(8, 8), "3": LayerBits(3, 4), "7": LayerBits(8, 8)})


def small() -> nn.Module:
    """Every form of file is written of it twice: each node takes time."""
    body = [*conv_norm(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


@pytest.fixture(scope="module")
def samples() -> Samples:
    """What the command draws: images that set ranges, and behind them those that set none."""
    batches = bs.Batches(dataset=bs.load_dataset("digits"), normalization=DIGITS)
    return read_samples(batches, BatchReader.of(small()), count=CALIBRATION + HELD_OUT, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "form"), SUFFIXES.items())
def test_the_command_and_the_verb_write_the_same_bytes(cli, samples, suffix, form, tmp_path):
    if form == "tflite":
        runtime_or_skip("ai_edge_litert")
    elif form != "packed":
        pytest.importorskip("onnx", reason="pip install 'bitscape[onnx]'")
        runtime_or_skip("openvino" if form == "openvino" else "onnxruntime")
    model, weights, policy = small().eval(), tmp_path / "weights.safetensors", tmp_path / "policy.json"
    safetensors.torch.save_file(model.state_dict(), weights)
    POLICY.save(policy)
    by_command, by_verb = tmp_path / f"command{suffix}", tmp_path / f"verb{suffix}"
    options = ("--policy", policy, "--calibration", "digits", "--calibration-images", CALIBRATION, "--seed", 3)
    cli("export", form, "--model", f"{__name__}:small", "--weights", weights, *options, "--out", by_command)

    network = bs.quantize(model, POLICY, samples.first(CALIBRATION))
    report = bs.export(network, by_verb, samples.first(CALIBRATION), held_out=samples.after(CALIBRATION), policy=POLICY)
    assert by_verb.read_bytes() == by_command.read_bytes()
    if form == "openvino":
        assert by_verb.with_suffix(".bin").read_bytes() == by_command.with_suffix(".bin").read_bytes()
    assert report.compared == (HELD_OUT if form in ("onnx", "openvino", "tflite") else 0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    out = tmp_path / "net.xml"
    out.write_text("old")
    out.with_suffix(".bin").write_bytes(b"old weights")
    return out, out.with_suffix(".bin")


def test_a_draft_that_fails_leaves_the_old_files(files: tuple[Path, Path]) -> None:
    with pytest.raises(BitscapeError, match="differ"), replaced_if_good(*files) as draft:
        draft.write_text("new")
        draft.with_suffix(".bin").write_bytes(b"new weights")
        raise BitscapeError("codes differ")
    assert (files[0].read_text(), files[1].read_bytes()) == ("old", b"old weights")
    assert not draft.parent.exists()


def test_a_good_draft_replaces_them(files: tuple[Path, Path]) -> None:
    with replaced_if_good(*files) as draft:
        assert (draft.name, draft.parent == files[0].parent) == ("net.xml", False)
        draft.write_text("new")
        draft.with_suffix(".bin").write_bytes(b"new weights")
        assert files[0].read_text() == "old"
    assert (files[0].read_text(), files[1].read_bytes()) == ("new", b"new weights")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["net.bin", "net.xml"]
    assert not draft.parent.exists()
