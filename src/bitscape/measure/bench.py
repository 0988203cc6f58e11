"""Exported files beside one another: size, time, what a runtime computes in float, and the classes that come out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError, first_line, needs_extra
from bitscape.exporters.agreement import Comparison, is_scores
from bitscape.progress import track
from bitscape.runtimes.packages import runtime_module
from bitscape.runtimes.sessions import Runtime, Session, Timing, time_alternately

Array = NDArray[Any]
OPENVINO_SUFFIX, OPENVINO_WEIGHTS = ".xml", ".bin"
ROUND_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A file in a runtime."""

    name: str
    """What tables call it."""
    path: Path
    runtime: Runtime

    @property
    def file_bytes(self) -> int:
        """Size of the file, with the weights that OpenVINO keeps beside it."""
        paths = [self.path, *([self.path.with_suffix(OPENVINO_WEIGHTS)] if self.path.suffix == OPENVINO_SUFFIX else [])]
        return sum(path.stat().st_size for path in paths if path.is_file())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a contender takes and gives."""

    contender: Contender
    float_layers: tuple[str, ...]
    """Convolutions and products with weights that the runtime computes in float."""
    timings: Mapping[int, Timing]
    """Batch size -> time of a batch."""
    classes: Array | None = field(repr=False)
    """Class of each test image, by the first output that is (images, classes); None without such an output or images."""
    difference: float | None
    """Largest `Agreement.difference` of an output from the first contender's on the test images; None without such images, or where the
    outputs are others."""

    def ms(self, batch_size: int) -> float:
        """Time of a batch by which contenders are compared."""
        return self.timings[batch_size].ms(self.contender.runtime.threads)

    def images_per_s(self, batch_size: int) -> float:
        """Throughput, by the wall clock."""
        return 1000 * batch_size / self.timings[batch_size].wall_ms


def measure_files(
    contenders: Sequence[Contender], shape: Sequence[int], batch_sizes: Sequence[int], *, rounds: int, test: Array | None = None
) -> list[Measured]:
    """Time all contenders alternately in this process, and run test images through each.

    Args:
        contenders: files and their runtimes.
        shape: of one image, (c, h, w).
        batch_sizes: images in a batch; each is timed.
        rounds: visits of each contender; the median counts.
        test: normalized float32 (n, c, h, w), or None.

    Raises:
        BitscapeError: a file that its runtime refuses, or that does not take images of this shape in such batches.
    """
    sessions = [contender.runtime.open(contender.path) for contender in contenders]
    timings: list[dict[int, Timing]] = [{} for _ in contenders]
    ticks = track(range(rounds * len(batch_sizes)), label="bench, round")
    next(ticks)
    for batch_size in batch_sizes:
        images = np.random.default_rng(0).standard_normal((batch_size, *shape), dtype=np.float32)
        for contender, session in zip(contenders, sessions, strict=True):
            _run(contender, session, images)
        runs = {str(at): lambda session=session: session.run(images) for at, session in enumerate(sessions)}  # noqa: B023 # called in this turn
        found = time_alternately(runs, rounds=rounds, round_s=ROUND_S, progress=lambda _: _advance(ticks))
        for at, own in enumerate(timings):
            own[batch_size] = found[str(at)]
    results = [_Results() for _ in contenders]
    for images, count in _whole_batches(test, max(batch_sizes)):
        outputs = [_run(contender, session, images) for contender, session in zip(contenders, sessions, strict=True)]
        for result, computed in zip(results, outputs, strict=True):
            result.add(count, _first(outputs[0], count), _first(computed, count))
    return [
        Measured(
            contender=contender,
            float_layers=tuple(session.float_layers()),
            timings=own,
            classes=result.classes(),
            difference=result.difference(),
        )
        for contender, session, own, result in zip(contenders, sessions, timings, results, strict=True)
    ]


def figures(
    measured: Sequence[Measured], batch_size: int, images: int, labels: Array | None
) -> list[dict[str, Any]]:
    """Return the figures of each file at one batch size, beside what the first contender runs, in
    the same runtime; of `images` test images in percent, where there are any.
    """
    first = measured[0]
    rows = []
    for one in measured:
        timing, beside = one.timings[batch_size], _beside(first, one, measured)
        row = {
            "file": one.contender.name,
            "runtime": one.contender.runtime.version,
            "batch_size": batch_size,
            "file_bytes": one.contender.file_bytes,
            "float_layers": len(one.float_layers),
            "cpu_ms": timing.cpu_ms,
            "cpu_spread": timing.spread,
            "wall_ms": timing.wall_ms,
            "images_per_s": one.images_per_s(batch_size),
            "times_faster": None
            if beside is None
            else beside.ms(batch_size) / one.ms(batch_size),
        }
        rows.append(row | _of_test_images(one, first, images, labels))
    return rows


def _of_test_images(one: Measured, first: Measured, images: int, labels: Array | None) -> dict[str, Any]:
    """What a file computes of the test images, beside the first one, in percent."""
    results: dict[str, Any] = {"images": images} if images else {}
    if one.difference is not None:
        results["difference"] = 100 * one.difference
    if one.classes is not None and first.classes is not None:
        results["agreement"] = 100 * float((one.classes == first.classes).mean())
        if labels is not None:
            results["top1"] = 100 * float((one.classes == labels).mean())
    return results


def _beside(first: Measured, one: Measured, measured: Sequence[Measured]) -> Measured | None:
    """What the first contender runs, in the runtime of `one`; None where it was not timed there."""
    name, runtime = first.contender.name, one.contender.runtime.version
    same = (m for m in measured if (m.contender.name, m.contender.runtime.version) == (name, runtime))
    return next(same, None)


def _advance(ticks: Iterator[int]) -> None:
    next(ticks, None)


def _whole_batches(images: Array | None, batch_size: int) -> Iterator[tuple[Array, int]]:
    """Batches, and how many images of each count: a file may take no other number, so that the last one begins again."""
    for start in range(0, 0 if images is None else len(images), batch_size):
        assert images is not None
        yield images[np.arange(start, start + batch_size) % len(images)], min(batch_size, len(images) - start)


def _first(outputs: Sequence[Array], count: int) -> dict[str, Array]:
    """What belongs to the first `count` images, by the outputs' order: in other files they have other names."""
    return {str(at): values[:count] if values.ndim else values for at, values in enumerate(outputs)}


class _Results:
    """What one contender computes of the test images."""

    def __init__(self) -> None:
        self._classes: list[Array] = []
        self._comparison = Comparison()
        self._comparable = True

    def add(self, images: int, first: Mapping[str, Array], own: Mapping[str, Array]) -> None:
        scores = next((values for values in own.values() if is_scores(values, images)), None)
        if scores is not None:
            self._classes.append(scores.argmax(1))
        self._comparable &= [values.shape for values in first.values()] == [values.shape for values in own.values()]
        if self._comparable:
            self._comparison.add(images, first, own)

    def classes(self) -> Array | None:
        return np.concatenate(self._classes) if self._classes else None

    def difference(self) -> float | None:
        agreements = self._comparison.result().values() if self._comparable else ()
        return max((agreement.difference for agreement in agreements), default=None)


def _run(contender: Contender, session: Session, images: Array) -> list[Array]:
    try:
        return session.run(images)
    except Exception as error:  # each runtime has its own
        raise BitscapeError(
            f"{contender.name}: {contender.runtime.version} fails on images of shape {images.shape}: {first_line(error)}"
        ) from error


def input_shape(path: str | os.PathLike[str]) -> tuple[int | None, ...]:
    """Shape of a file's input, with the batch; None where it is free. Raises BitscapeError for a file that cannot be read."""
    try:
        return _openvino_shape(path) if Path(path).suffix == OPENVINO_SUFFIX else _onnx_shape(path)
    except BitscapeError:
        raise
    except Exception as error:  # of protobuf, or OpenVINO's own
        raise BitscapeError(f"{os.fspath(path)}: not readable as a file of a network ({type(error).__name__})") from error


def _onnx_shape(path: str | os.PathLike[str]) -> tuple[int | None, ...]:
    with needs_extra("onnx"):
        import onnx
    dimensions = onnx.load(os.fspath(path), load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in dimensions)


def _openvino_shape(path: str | os.PathLike[str]) -> tuple[int | None, ...]:
    sizes = runtime_module("openvino").Core().read_model(os.fspath(path)).inputs[0].partial_shape
    return tuple(size.get_length() if size.is_static else None for size in sizes)
