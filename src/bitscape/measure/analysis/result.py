"""Analysis: the noise of every layer and the error it causes, as a table and as a file.

An analysis file is JSON with one layer a line; see docs/formats.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

from pydantic import ConfigDict, with_config

from bitscape.files import json_text, write_atomic
from bitscape.measure.analysis.layers import LayerNoise
from bitscape.measure.analysis.outputs import OutputError
from bitscape.measure.analysis.tensors import PERCENTILES, TensorNoise
from bitscape.schema import read_document
from bitscape.tables import Shown, Table
from bitscape.version import __version__
from bitscape.words import NONE, counted

FORMAT: Final = 1
SHOWN = 10
"""Layers of the table that an analysis prints as."""
COLUMNS = (
    "layer",
    "bits",
    "weight dB",
    "input dB",
    "output dB",
    "by",
    "its range",
    "99.9 %",
    "clipped %",
    "kurtosis",
    "error %",
    "divergence",
    "changed %",
    "saves",
)


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """One layer: what quantizing does to it, and to the network's outputs by it."""

    noise: LayerNoise
    """Of its weight, input and output."""
    alone: OutputError
    """Of the network with this layer alone quantized."""
    others: OutputError
    """Of the network with every layer quantized but this one."""

    @property
    def bits(self) -> str:
        """Bits of weight and input, such as "4/8"."""
        return f"{self.noise.weight.bits}/{self.noise.input.bits}"

    @property
    def noisier(self) -> Literal["weight", "input"]:
        """Which of the two adds more noise to the layer's output."""
        weight, input = self.noise.output_db_by_weight, self.noise.output_db_by_input
        return "weight" if _or_infinite(weight) <= _or_infinite(input) else "input"

    @property
    def noisier_tensor(self) -> TensorNoise:
        """The noise of that one."""
        return self.noise.weight if self.noisier == "weight" else self.noise.input

    @property
    def output_db(self) -> float | None:
        """Signal to noise of the layer's output from the noisier of the two, in dB."""
        noise = self.noise
        return noise.output_db_by_weight if self.noisier == "weight" else noise.output_db_by_input


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True, repr=False)
class Analysis(Shown):
    """Where the error of a quantized network comes from."""

    task: str
    """What the outputs are: "classes", "dense", "binary", "follow" or "user"."""
    samples: int
    """Samples of which noise and ranges are."""
    compared: int
    """Samples whose outputs were compared."""
    seconds: float
    """Wall-clock time that it took."""
    fingerprint: str
    """`bitscape.policy.fingerprint` of the network."""
    whole: OutputError
    """Every layer quantized."""
    weights: OutputError
    """All weights quantized, all inputs float."""
    inputs: OutputError
    """All inputs quantized, all weights float."""
    layers: Mapping[str, LayerAnalysis]
    """Layer -> what it does, in the network's order."""

    def by_error(self) -> list[str]:
        """Return the layers' names, the one that moves the outputs most by itself first."""
        return sorted(self.layers, key=lambda name: -self.layers[name].alone.divergence)

    def table(self) -> Table:
        """Return the ten layers that move the outputs most."""
        return self.layer_table(SHOWN)

    def layer_table(self, count: int | None = None) -> Table:
        """Return the `count` layers that move the outputs most by themselves, None: all of them.

            weight, input dB     signal to quantization noise of the tensor
            output dB, by        the same of the layer's output, from the noisier of the two
            its range            smallest and largest value of that one; 99.9 %: the size that so
                                 many of its values do not exceed
            clipped %            of its values, those more than half a step beyond the grid
            kurtosis             of its values; 3 is normal
            error %, divergence, changed %   of the network's outputs, this layer alone quantized
            saves                divergence that goes if this layer alone stays float
        """
        names = self.by_error()[:count]
        others = counted(len(self.layers) - len(names), "more layer")
        columns = [column for column in COLUMNS if self.has_answers or column != "changed %"]
        rows = [self._row(name) for name in names]
        states = {
            "all quantized": self.whole,
            "weights alone": self.weights,
            "inputs alone": self.inputs,
        }
        note = "; ".join(f"{state}: {self._said(error)}" for state, error in states.items())
        return Table(
            title=f"Analysis: {counted(len(self.layers), 'layer')}, task {self.task}, "
            f"{counted(self.samples, 'sample')}, outputs of {self.compared} compared",
            columns=columns,
            rows=rows,
            note=note if len(names) == len(self.layers) else f"less error: {others}. {note}",
        )

    @property
    def has_answers(self) -> bool:
        """Whether the outputs are answers, which may change."""
        return self.whole.changed is not None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the analysis file; a crash leaves the old file or the new one."""
        head = {"format": FORMAT, "tool": f"bitscape {__version__}"}
        write_atomic(path, json_text({**head, **asdict(self)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Analysis":
        """Read an analysis file. Raises BitscapeError, naming the file, if it is damaged."""
        file = read_document(_File, path, format=FORMAT)
        return cls(**{name: getattr(file, name) for name in cls.__dataclass_fields__})

    def _row(self, name: str) -> list[str]:
        layer = self.layers[name]
        noise, seen = layer.noise, layer.noisier_tensor
        texts = {
            "layer": name,
            "bits": layer.bits,
            "weight dB": _decibels(noise.weight.sqnr_db),
            "input dB": _decibels(noise.input.sqnr_db),
            "output dB": _decibels(layer.output_db),
            "by": layer.noisier,
            "its range": f"{seen.low:.3g}..{seen.high:.3g}",
            "99.9 %": f"{_reached(seen):.3g}",
            "clipped %": f"{100 * seen.clipped:.2g}",
            "kurtosis": NONE if seen.kurtosis is None else f"{seen.kurtosis:.3g}",
            "error %": _percent(layer.alone.relative_error),
            "divergence": f"{layer.alone.divergence:.3g}",
            "changed %": _percent(layer.alone.changed),
            "saves": f"{self.whole.divergence - layer.others.divergence:.3g}",
        }
        return [texts[column] for column in COLUMNS if self.has_answers or column != "changed %"]

    def _said(self, error: OutputError) -> str:
        changed = f", {_percent(error.changed)} % changed" if self.has_answers else ""
        relative = _percent(error.relative_error)
        return f"error {relative} %, divergence {error.divergence:.3g}{changed}"


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True, repr=False)
class _File(Analysis):
    """What `Analysis.save` writes."""

    format: Literal[1]
    tool: str = ""


def _or_infinite(decibels: float | None) -> float:
    return math.inf if decibels is None else decibels


def _decibels(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g}"


def _reached(values: TensorNoise) -> float:
    """The size that 99.9 % of the values at each end do not exceed."""
    low, high = values.percentiles[0], values.percentiles[len(PERCENTILES) - 1]
    return max(-low, high)
