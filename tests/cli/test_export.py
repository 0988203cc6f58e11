from pathlib import Path

import pytest

import bitscape as bs
from bitscape.data.batches import DIGITS
from bitscape.data.reading import BatchReader, read_samples
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.folders import replaced_if_good
from bitscape.models.digits import digits_net
from bitscape.models.find import load_weights
from bitscape.verbs.export import SUFFIXES
from tests.cli.run import MIXED, MODEL
from tests.needs import runtime_or_skip

CALIBRATION, HELD_OUT = 16, 256


@pytest.fixture(scope="module")
def samples() -> Samples:
    """What the command draws: images that set ranges, and behind them those that set none."""
    batches = bs.Batches(dataset=bs.load_dataset("digits"), normalization=DIGITS)
    return read_samples(batches, BatchReader.of(digits_net()), count=CALIBRATION + HELD_OUT, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "form"), SUFFIXES.items())
def test_the_command_and_the_verb_write_the_same_bytes(cli, trained, samples, suffix, form, tmp_path):
    if form == "tflite":
        runtime_or_skip("ai_edge_litert")
    elif form != "packed":
        pytest.importorskip("onnx", reason="pip install 'bitscape[onnx]'")
        runtime_or_skip("openvino" if form == "openvino" else "onnxruntime")
    by_command, by_verb = tmp_path / f"command{suffix}", tmp_path / f"verb{suffix}"
    weights = trained / "model.safetensors"
    options = ("--policy", trained / "mixed.json", "--calibration", "digits", "--calibration-images", CALIBRATION, "--repair", "--seed", 3)
    cli("export", form, *MODEL, "--weights", weights, *options, "--out", by_command)

    model = digits_net().eval()
    load_weights(model, weights)
    network = bs.quantize(model, MIXED, samples.first(CALIBRATION))
    report = bs.export(network, by_verb, samples.first(CALIBRATION), held_out=samples.after(CALIBRATION), policy=MIXED)
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
