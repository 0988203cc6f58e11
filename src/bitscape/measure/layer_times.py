"""How long each layer of a network takes in a runtime at each pair of bits: what a `LatencyTable` holds.

A layer is timed alone, as several copies in one model (`layer_model`):

    time of a layer = (time of the model - time of the model without layers) / copies

for one call from Python takes OpenVINO 0.1 ms without any layer, and a layer of a small network a tenth of that. All bits of a layer are
timed beside one another, and of the rounds the quickest counts: on a shared machine a core slows down by half for seconds, and medians
fall on either side. Bits with the same container and the same operators are the same model, measured once: 3 bits are stored in 4.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call
from bitscape.cost.latency import LatencyTable
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, explained_forward
from bitscape.exporters.integer.interface import Interface, checked_samples
from bitscape.exporters.onnx.qdq import CONTAINERS, PORTABLE, save_onnx
from bitscape.files import json_text, parse_json, read_limited, write_atomic
from bitscape.folders import scratch_folder
from bitscape.measure.baselines import save_float_onnx
from bitscape.measure.layer_model import LayerForm, LayerModel, form_of, without_layers
from bitscape.models.layers import KINDS, layer_shapes, weighted_layers
from bitscape.models.modes import evaluating, in_eval_mode
from bitscape.models.prepare import prepare
from bitscape.policy import LayerBits, fingerprint, uniform_policy
from bitscape.progress import track
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.runtimes.sessions import OnnxRuntime, Runtime, Session, time_alternately

_log = logging.getLogger("bitscape.exporters")
EIGHT = LayerBits(8, 8)
ROUND_S = 0.02
"""How long a model is timed in a round, seconds; three runs at least."""
LEAST_MS = 1e-4
"""What a layer takes at least: below, calls differ among themselves by more."""
FLOAT = "float"


def build_table(
    network: nn.Module,
    data: Samples | Inputs,
    pairs: Iterable[LayerBits],
    runtime: Runtime,
    *,
    machine: str,
    partial: str | os.PathLike[str],
    batch_size: int = 1,
    rounds: int = 15,
) -> LatencyTable:
    """Measure every layer at every pair of bits, and the whole network at 8/8 and in float.

    Args:
        network: float network; it stays as it is.
        data: samples, or what the network is called with, normalized, two at least, of one shape; they calibrate it at 8/8.
        pairs: bits of weights and activations; 8/8 is always measured.
        runtime: what runs the layers, with its threads. By one thread CPU time is measured, by several wall-clock time.
        machine: name of the processor, for the table.
        partial: a file that keeps what is measured, so that the same call goes on after an interruption. The caller removes it.
        batch_size: samples in a batch.
        rounds: visits of each model; the quickest counts.

    Raises:
        BitscapeError: packages of the runtime's extra are missing; or the network cannot be exported, see `save_onnx`.
    """
    network = in_eval_mode(prepare(network))
    shapes = layer_shapes(network)
    samples = checked_samples(data, network)
    part = samples.parts[0]
    batch = part.rows(torch.arange(batch_size) % len(part)).inputs
    calls = layer_calls(network, batch)
    models = _models(calls, pairs, CONTAINERS if isinstance(runtime, OnnxRuntime) else PORTABLE)
    source: dict[str, Any] = {
        "runtime": runtime.version,
        "machine": machine,
        "threads": runtime.threads,
        "batch_size": batch_size,
        "input_shape": samples.shapes[0],
        "fingerprint": fingerprint(shapes),
    }
    kept = _Kept(Path(partial), {**source, "rounds": rounds})
    _log.info("%d layers of %d forms, each in %d models", len(calls), len(models), len(next(iter(models.values()))))
    if FLOAT not in kept.times:
        kept.add(_network_times(network, samples, batch, runtime, rounds))
    missing = {form: [model for model in set(at.values()) if str(model) not in kept.times] for form, at in models.items()}
    for form in track([form for form, those in missing.items() if those], label="layer form"):
        kept.add(_layer_times(form, sorted(missing[form], key=str), runtime, rounds))
    times = kept.times
    layers = {
        name: {str(pair): math.fsum(times[str(models[form][pair])] for form in forms) for pair in models[forms[0]]}
        for name, forms in calls.items()
    }
    return LatencyTable(**source, network_ms=times[str(EIGHT)], float_ms=times[FLOAT], layers=layers)


def layer_calls(network: nn.Module, batch: Inputs) -> dict[str, list[LayerForm]]:
    """Run the network on a batch and return layer -> the form of each of its calls, in order of first call."""
    calls: dict[str, list[LayerForm]] = {}

    def hook_for(name: str) -> Any:
        def record(layer: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Tensor) -> None:
            taken = inputs[0] if inputs else named["input"]
            calls.setdefault(name, []).append(form_of(layer, taken.shape, output.shape))

        return record

    handles = [layer.register_forward_hook(hook_for(name), with_kwargs=True) for name, layer in weighted_layers(network).items()]
    try:
        with evaluating(network), explained_forward(batch):
            call(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise BitscapeError(f"network: it runs no {KINDS} layer, so there is nothing to measure")
    return calls


def _models(
    calls: Mapping[str, Sequence[LayerForm]], pairs: Iterable[LayerBits], containers: Sequence[int]
) -> dict[LayerForm, dict[LayerBits, LayerModel]]:
    wanted = dict.fromkeys([EIGHT, *pairs])
    forms = dict.fromkeys(form for own in calls.values() for form in own)
    return {form: {pair: LayerModel.at(form, pair, containers) for pair in wanted} for form in forms}


def _network_times(network: nn.Module, samples: Samples, batch: Inputs, runtime: Runtime, rounds: int) -> dict[str, float]:
    """Milliseconds of the whole network at 8/8 and in float."""
    uniform = calibrate(with_quantizers(network, uniform_policy(layer_shapes(network), EIGHT)), samples)
    feed = Interface.of(network, samples).feed(batch)
    with scratch_folder() as folder:
        eight, plain = folder / "8.onnx", folder / "float.onnx"
        save_onnx(uniform, eight, samples, containers=(8,))
        save_float_onnx(network, plain, samples)
        sessions = {str(EIGHT): runtime.open(eight), FLOAT: runtime.open(plain)}
        _warn_of_floats("the network at 8/8", sessions[str(EIGHT)], runtime)
    runs = {name: lambda session=session: session.run(feed) for name, session in sessions.items()}
    return _quickest(runs, runtime.threads, rounds)


def _layer_times(form: LayerForm, models: Sequence[LayerModel], runtime: Runtime, rounds: int) -> dict[str, float]:
    """Milliseconds of one layer in each of the models, by their names."""
    codes = np.random.default_rng(0).integers(0, 256, form.input_shape, dtype=np.uint8)
    sessions: dict[str, Session] = {"": runtime.open(without_layers(form))}
    for model in models:
        sessions[str(model)] = runtime.open(model.content())
        _warn_of_floats(str(model), sessions[str(model)], runtime)
    runs = {name: lambda session=session: session.run(codes) for name, session in sessions.items()}
    times = _quickest(runs, runtime.threads, rounds)
    nothing = times.pop("")
    return {name: max(LEAST_MS, (time - nothing) / form.copies) for name, time in times.items()}


def _quickest(runs: Mapping[str, Callable[[], object]], threads: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each run: of the medians of the rounds the smallest."""
    measured = [time_alternately(runs, rounds=1, round_s=ROUND_S) for _ in range(rounds)]
    return {name: min(timings[name].ms(threads) for timings in measured) for name in runs}


def _warn_of_floats(what: str, session: Session, runtime: Runtime) -> None:
    if found := session.float_layers():
        _log.warning("%s: %s computes %s in float", what, runtime.version, f"{len(found)} of its layers ({', '.join(found[:3])})")


class _Kept:
    """Times by name, in a file that is written after every change."""

    def __init__(self, path: Path, source: Mapping[str, Any]) -> None:
        self.path = path
        self.source = dict(source)
        self.times: dict[str, float] = self._found() if path.is_file() else {}

    def _found(self) -> dict[str, float]:
        try:
            document = parse_json(read_limited(self.path))
            source, times = document["source"], document["times"]
            if not all(isinstance(time, float) and time > 0 for time in times.values()) or not isinstance(source, dict):
                raise ValueError("its times are no positive numbers")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BitscapeError(f"{self.path}: damaged ({error}); remove it to measure anew") from error
        if other := [name for name in self.source if source.get(name) != self.source[name]]:
            _log.info("%s is of another %s: everything is measured anew", self.path, ", ".join(other))
            return {}
        _log.info("%s: %d times are measured already", self.path, len(times))
        return dict(times)

    def add(self, times: Mapping[str, float]) -> None:
        self.times |= times
        write_atomic(self.path, json_text({"source": self.source, "times": self.times}))
