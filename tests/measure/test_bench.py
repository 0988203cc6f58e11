from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bitscape.errors import BitscapeError
from bitscape.measure import bench
from bitscape.measure.bench import Contender, input_shape, measure_files
from bitscape.runtimes.sessions import RUNTIMES, OnnxRuntime, Timing
from tests.needs import runtime_or_skip

IMAGES = np.random.default_rng(0).random((11, 1, 2, 2), np.float32)


class FakeSession:
    """Its class of an image is the brightest pixel, moved on by `shift`; it takes batches of `batch` alone."""

    def __init__(self, shift, batch):
        self.shift, self.batch, self.ran = shift, batch, []

    def run(self, images):
        if self.batch not in (None, len(images)):
            raise RuntimeError("\nGot invalid dimensions\nindex 0")
        self.ran.append(len(images))
        return [np.roll(images.reshape(len(images), -1), self.shift, axis=1)]

    def float_layers(self):
        return ["conv1"] * self.shift


@dataclass(frozen=True, kw_only=True)
class FakeRuntime(OnnxRuntime):
    shift: int = 0
    batch: int | None = None

    @property
    def version(self):
        return "fake 1.0"

    def open(self, model):
        return FakeSession(self.shift, self.batch)


def _contender(name="a", **runtime):
    return Contender(name=name, path=Path(name), runtime=FakeRuntime(**runtime))


@pytest.fixture
def clock(monkeypatch):
    """Takes 2 ms of CPU for the first run, 4 for the second, and twice that by the wall clock."""
    asked = []

    def time(runs, *, rounds, round_s, progress):
        asked.append([session() for session in runs.values()])
        for done in range(rounds):
            progress(done + 1)
        return {name: Timing(2.0 + 2 * at, 4.0 + 4 * at, 0.01) for at, name in enumerate(runs)}

    monkeypatch.setattr(bench, "time_alternately", time)
    return asked


def test_times_and_classes_are_each_contenders_own(clock):
    found = measure_files([_contender("a"), _contender("b", shift=1)], (1, 2, 2), [1, 5], rounds=3, test=IMAGES)
    assert [[len(outputs[0]) for outputs in turn] for turn in clock] == [[1, 1], [5, 5]]
    assert [measured.ms(5) for measured in found] == [2.0, 4.0]
    assert found[0].images_per_s(5) == pytest.approx(5 / 0.004)
    assert found[1].images_per_s(1) == pytest.approx(1 / 0.008)
    assert [measured.float_layers for measured in found] == [(), ("conv1",)]
    brightest = IMAGES.reshape(11, 4).argmax(1)
    assert (found[0].classes == brightest).all() and (found[1].classes == (brightest + 1) % 4).all()
    rolled, flat = np.roll(IMAGES.reshape(11, 4), 1, axis=1), IMAGES.reshape(11, 4)
    assert found[0].difference == 0.0
    assert found[1].difference == pytest.approx(np.linalg.norm(rolled - flat) / np.linalg.norm(flat))


def test_with_several_threads_the_wall_clock_compares(clock):
    (found,) = measure_files([_contender(threads=2)], (1, 2, 2), [1], rounds=1)
    assert found.ms(1) == 4.0 and found.classes is None and found.difference is None


def test_a_file_of_a_fixed_batch_classifies_every_image(clock):
    (found,) = measure_files([_contender(batch=4)], (1, 2, 2), [4], rounds=1, test=IMAGES)
    assert (found.classes == IMAGES.reshape(11, 4).argmax(1)).all()


class DenseSession(FakeSession):
    """A map, and one value an image."""

    def run(self, images):
        return [images * (1 + self.shift), images.sum((1, 2, 3))[:, None]]


@dataclass(frozen=True, kw_only=True)
class DenseRuntime(FakeRuntime):
    def open(self, model):
        return DenseSession(self.shift, self.batch)


def test_outputs_that_are_no_classes_are_compared_by_their_values(clock):
    contenders = [Contender(name=name, path=Path(name), runtime=DenseRuntime(shift=shift)) for name, shift in (("a", 0), ("b", 2))]
    found = measure_files([*contenders, _contender("other")], (1, 2, 2), [2], rounds=1, test=IMAGES)
    assert [measured.difference for measured in found] == [0.0, pytest.approx(2.0), None]
    assert found[0].classes is found[1].classes is None


def test_a_file_that_does_not_take_the_images_is_named():
    with pytest.raises(BitscapeError, match=r"b: fake 1\.0 fails on images of shape \(3, 1, 2, 2\): Got invalid dimensions$"):
        measure_files([_contender("a"), _contender("b", batch=4)], (1, 2, 2), [3], rounds=1)


def test_the_size_of_an_openvino_file_includes_its_weights(tmp_path):
    (tmp_path / "net.xml").write_bytes(b"x" * 10)
    (tmp_path / "net.bin").write_bytes(b"x" * 300)
    (tmp_path / "net.onnx").write_bytes(b"x" * 7)
    sizes = [Contender(name=name, path=tmp_path / name, runtime=FakeRuntime()).file_bytes for name in ("net.xml", "net.onnx")]
    assert sizes == [310, 7]


@pytest.mark.parametrize("batch", [4, "batch"])
def test_the_shape_of_the_input_is_read_from_both_kinds_of_files(tmp_path, batch):
    onnx, openvino = pytest.importorskip("onnx"), runtime_or_skip("openvino")
    kind = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, kind, [batch, 3, 8, "width"]) for name in ("images", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["y"])], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    openvino.save_model(openvino.Core().read_model(tmp_path / "net.onnx"), tmp_path / "net.xml")
    expected = (4 if batch == 4 else None, 3, 8, None)
    assert input_shape(tmp_path / "net.onnx") == input_shape(tmp_path / "net.xml") == expected


@pytest.mark.parametrize(("name", "needs"), [("net.onnx", "onnx"), ("net.xml", "openvino")])
def test_files_of_something_else_are_refused(tmp_path, name, needs):
    pytest.importorskip(needs)
    (tmp_path / name).write_text("no network")
    with pytest.raises(BitscapeError, match=rf"{name}: not readable as a file of a network"):
        input_shape(tmp_path / name)


def test_the_runtimes_have_the_names_that_the_command_offers():
    from bitscape.cli.bench import RUNTIME_NAMES

    assert tuple(RUNTIMES) == RUNTIME_NAMES
