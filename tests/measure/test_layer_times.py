import json
import logging
import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from bitscape.cost.latency import LatencyTable
from bitscape.errors import BitscapeError
from bitscape.measure import layer_times
from bitscape.measure.layer_times import LEAST_MS, build_table, layer_calls
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits
from bitscape.runtimes.sessions import OnnxRuntime, Timing
from bitscape.searches.fisher import Fisher
from bitscape.searches.problem import SearchProblem

pytest.importorskip("onnx")

PAIRS = [LayerBits(w, a) for w in (2, 3, 4, 8) for a in (4, 8)]
NOTHING = 0.125
CONTAINER_MS = {"int8": 1.0, "int4": 0.5, "int2": 0.25}
WIDE = 2.0  # factor of the layer of 8 outputs
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers 2 and 3 are alike; layer 3 runs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.third = (nn.Conv2d(8, 4 + 4, 3, padding=1, bias=bias) for bias in (True, False))
        self.head = nn.Linear(8, 10)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.third(self.third(self.second(self.first(x))).relu())
        return self.head(x.mean((2, 3)))


class FakeSession:
    def __init__(self, floats):
        self.floats = floats

    def run(self, images):
        return []

    def float_layers(self):
        return self.floats


@dataclass(frozen=True, kw_only=True)
class FakeRuntime(OnnxRuntime):
    floats: tuple[str, ...] = ()

    @property
    def version(self):
        return "fake 1.0"

    def open(self, model):
        return FakeSession(list(self.floats))


class OtherRuntime:
    threads, version, open = 1, "other 1.0", FakeRuntime.open
    floats = ()


def layer_ms(name):
    container = next(ms for kind, ms in CONTAINER_MS.items() if f"{kind} weights" in name)
    return container * (WIDE if name.startswith("Conv 8x8") else 1.0) + (0.0625 if "clipped" in name else 0.0)


def model_ms(name):
    """What a fake call takes; layers stand in it eight times."""
    return {"": NOTHING, "8/8": 3.0, "float": 9.0}.get(name) or NOTHING + 8 * layer_ms(name)


class Timer:
    """In the place of time_alternately; notes what it is asked."""

    def __init__(self, stop_at=None, factor=lambda visit: 1.0, ms=model_ms):
        self.asked, self.stop_at, self.factor, self.ms = [], stop_at, factor, ms

    def __call__(self, runs, *, rounds=1, round_s=0.0):
        assert rounds == 1
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(tuple(runs))
        factor = self.factor(len(self.asked))
        return {name: Timing(self.ms(name) * factor, 2 * self.ms(name) * factor, 0.0) for name in runs}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    for writer in ("save_onnx", "save_float_onnx"):
        monkeypatch.setattr(layer_times, writer, lambda *args, **named: None)

    def run(timer=None, pairs=PAIRS, runtime=None, rounds=1, **given):
        timer = timer or Timer()
        monkeypatch.setattr(layer_times, "time_alternately", timer)
        where = {"machine": "Xeon", "partial": tmp_path / "partial", "rounds": rounds, **given}
        torch.manual_seed(0)
        return build_table(Net(), IMAGES, pairs, runtime or FakeRuntime(), **where)

    return run


def test_the_table_holds_what_the_timer_says(measured):
    table = measured()
    assert (table.network_ms, table.float_ms) == (3.0, 9.0)
    assert (table.runtime, table.machine, table.threads, table.batch_size, table.input_shape) == ("fake 1.0", "Xeon", 1, 1, (3, 6, 6))
    assert list(table.layers) == ["first", "second", "third", "head"]
    assert table.layers["first"] == {
        **{"8/8": 1.0, "4/8": 0.5, "3/8": 0.5, "2/8": 0.25},
        **{"8/4": 1.0625, "4/4": 0.5625, "3/4": 0.5625, "2/4": 0.3125},
    }
    assert table.layers["second"]["4/8"] == 1.0
    assert table.layers["third"]["4/4"] == 2 * 1.0625  # it runs twice
    table.check(layer_shapes(Net()))


def test_8_8_is_measured_unasked(measured):
    assert measured(pairs=[LayerBits(4, 8)]).layers["head"] == {"8/8": 1.0, "4/8": 0.5}


def test_other_runtimes_than_onnxruntime_get_no_int2(measured):
    assert measured(pairs=[LayerBits(2, 8)], runtime=OtherRuntime()).layers["head"] == {"8/8": 1.0, "2/8": 0.5}


def test_equal_layers_and_equal_bits_are_measured_once(measured):
    timer = Timer()
    measured(timer)
    assert timer.asked[0] == ("8/8", "float")
    forms = [[name for name in asked if name] for asked in timer.asked[1:]]
    assert [len(names) for names in forms] == [6, 6, 6]  # three containers, clipped or not
    assert len({name for names in forms for name in names}) == 18
    assert {re.match(r"\w+ \w+", names[0]).group() for names in forms} == {"Conv 8x3x3x3", "Conv 8x8x3x3", "Gemm 10x8"}


def test_the_forms_have_the_batch_in_them(measured):
    timer = Timer()
    assert measured(timer, batch_size=6).batch_size == 6
    assert all(" on 6x" in name for asked in timer.asked[1:] for name in asked if name)


def test_a_stopped_run_goes_on_and_measures_nothing_twice(measured, tmp_path):
    whole = measured(partial=tmp_path / "other")
    stopped = Timer(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        measured(stopped)
    resumed = Timer()
    assert measured(resumed) == whole
    assert len(stopped.asked) == 3 and len(resumed.asked) == 1
    assert not {name for asked in stopped.asked for name in asked if name} & {name for asked in resumed.asked for name in asked}
    again = Timer()
    assert measured(again) == whole and again.asked == []


def test_times_of_another_run_are_not_taken(measured):
    measured()
    for other in ({"batch_size": 2}, {"machine": "Epyc"}, {"runtime": FakeRuntime(threads=2)}, {"rounds": 2}):
        timer = Timer()
        measured(timer, **other)
        assert len(timer.asked) == 4 * other.get("rounds", 1)


def test_a_damaged_partial_file_is_refused(measured, tmp_path):
    measured()
    text = (tmp_path / "partial").read_text()
    assert json.loads(text)["source"]["runtime"] == "fake 1.0"
    (tmp_path / "partial").write_text(text[:-20])
    with pytest.raises(BitscapeError, match=r"complete.*remove it to measure anew"):
        measured()


def test_of_the_rounds_the_quickest_counts(measured, tmp_path):
    slow = Timer(factor=lambda visit: 1.0 if visit % 3 == 2 else 1.7)
    assert measured(slow, rounds=3).layers == measured(partial=tmp_path / "other").layers


def test_by_several_threads_the_wall_clock_counts(measured):
    table = measured(runtime=FakeRuntime(threads=2))
    assert (table.threads, table.network_ms, table.layers["first"]["8/8"]) == (2, 6.0, 2.0)


def test_a_layer_quicker_than_nothing_takes_a_little(measured):
    table = measured(Timer(ms=lambda name: NOTHING if name == "" else NOTHING / 2))
    assert table.layers["head"] == {str(pair): LEAST_MS for pair in PAIRS}


def test_what_a_runtime_computes_in_float_is_told(measured, caplog):
    measured(runtime=FakeRuntime(floats=("Conv_1",)), pairs=[])
    texts = [text for logger, level, text in caplog.record_tuples if logger == "bitscape.exporters" and level == logging.WARNING]
    assert texts[0] == "the network at 8/8: fake 1.0 computes 1 of its layers (Conv_1) in float"
    assert len(texts) == 4 and texts[3].startswith("Gemm 10x8 on 1x8; int8 weights: fake 1.0 computes")


def test_a_search_under_a_cap_of_the_table_never_exceeds_it(measured, tmp_path):
    measured().save(tmp_path / "table.json")
    table, network = LatencyTable.load(tmp_path / "table.json"), Net()
    assert math.fsum(row["8/8"] for row in table.layers.values()) == 8.0  # 1 + 2 + 2 * 2 + 1, scaled to the network's 3 ms
    times = {name: {pair: ms * 3.0 / 8.0 for pair, ms in row.items()} for name, row in table.layers.items()}
    for cap in (1.0, 1.4, 2.0, 2.9):
        problem = SearchProblem.of(
            model=network, samples=IMAGES, budget=[f"latency_ms={cap}"], latency=table, candidates=tuple(PAIRS), pinned={}
        )
        policy = Fisher(images=4).search(problem).policy
        spent = math.fsum(times[name][str(policy.layers[name])] for name in times)
        assert spent <= cap + 1e-5  # each layer is rounded to a nanosecond


def test_layers_are_recorded_once_a_call_and_the_network_is_as_before():
    network = Net().train()
    calls = layer_calls(network, IMAGES[:2])
    assert [len(forms) for forms in calls.values()] == [1, 1, 2, 1]
    assert calls["second"] == calls["third"][:1]
    assert calls["head"][0].input_shape == (2, 8)
    assert network.training and not any(module._forward_hooks for module in network.modules())
    with pytest.raises(BitscapeError, match="nothing to measure"):
        layer_calls(nn.ReLU(), IMAGES)
