import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bitscape.dynamic import DynamicBits
from bitscape.engine import Sgd
from bitscape.engine.describe import bits_of, describe, described_code
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import with_quantizers
from bitscape.quant.mixture import Mixture
from tests.dynamic.small import dynamic
from tests.engine.tiny import tiny_batches, tiny_net


def test_equal_things_read_equal_and_different_ones_differ() -> None:
    assert describe(tiny_batches()) == describe(tiny_batches())
    assert describe(tiny_batches()) != describe(tiny_batches(seed=1))
    assert describe(tiny_net()) == describe(tiny_net())
    assert describe(tiny_net()) != describe(tiny_net(seed=1))


def test_everything_is_json() -> None:
    value = {"a": (Sgd(), tiny_net(), torch.bfloat16, len, None), "b": torch.tensor(1.0), "c": torch.zeros(0, 3)}
    assert json.loads(json.dumps(describe(value))) == describe(value)
    assert describe(len) == "len"


def scaled(factor: float) -> Callable[[float], float]:
    return lambda value: value * factor


def test_functions_differ_by_code_defaults_and_what_they_close_over() -> None:
    functions: list[Any] = [
        lambda value: value + 1,
        lambda value: value + 2,
        lambda value: value.abs() + 1,
        lambda value: [item + 1 for item in value],
        lambda value: [item + 2 for item in value],
        lambda value, by=1: value + by,
        lambda value, by=2: value + by,
        lambda value, *, by=3: value + by,
        lambda value: value in {"a", "b"},
        scaled(1.0),
        scaled(2.0),
        partial(max, 1),
        partial(max, 2),
        partial(scaled(3.0), 1),
    ]
    described = [json.dumps(describe(function)) for function in functions]
    assert len(set(described)) == len(functions)
    assert describe(scaled(2.0)) == describe(scaled(2.0))


def test_a_function_is_told_by_its_name_and_no_method_by_the_object() -> None:
    named = str(describe(scaled))
    assert re.fullmatch("scaled, code [0-9a-f]{16}", named)
    assert describe(Sgd(lr=0.1).build) == describe(Sgd(lr=0.2).build)


def test_what_a_function_counts_up_or_calls_itself_by_is_no_setting() -> None:
    calls = 0

    def again(depth: int) -> int:
        nonlocal calls
        calls += 1
        return again(depth - 1) if depth else calls

    before = describe(again)
    assert again(2) == 3 and describe(again) == before


def test_a_hash_of_code_is_the_same_in_every_process() -> None:
    source = "from bitscape.engine.describe import describe; print(describe(lambda value: value in {'a', 'b', 'c'}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", source], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1 and seen.pop().startswith("<lambda>, code ")


def test_large_tensors_are_sampled_along_their_whole_length() -> None:
    large = torch.zeros(3000, 1000, dtype=torch.uint8)
    other = large.clone()
    other[2000:] = 1
    assert describe(large) != describe(other)


def test_bits_of_every_quantized_layer_and_all_of_one_that_has_several() -> None:
    assert bits_of(tiny_net()) == {}
    policy = Policy({"0": LayerBits(8, 8), "4": LayerBits(2, 3), "7": LayerBits(4, 5)})
    assert bits_of(with_quantizers(tiny_net(), policy)) == {
        "0": {"weight": 8, "activation": 8},
        "4": {"weight": 2, "activation": 3},
        "7": {"weight": 4, "activation": 5},
    }
    widths = DynamicBits(low=2, high=4, weights=True)
    static, several = {"weight": 8, "activation": 8}, {"weight": [2, 3, 4], "activation": [2, 3, 4]}
    assert bits_of(dynamic(widths)) == {"model.0": static, "model.3": several, "model.6": several, "model.11": static}


def test_mixtures_of_other_widths_differ_and_are_json() -> None:
    found = []
    for widths in ((2, 4), (2, 4), (2, 8)):
        network = with_quantizers(nn.Sequential(nn.Linear(2, 2)), Policy({"0": LayerBits(8, 8)}))
        network[0].weight_quantizer = Mixture(widths, signed=True)
        found.append(bits_of(network))
    assert found[0] == found[1] != found[2]
    assert json.loads(json.dumps(found)) == found


SCALE = 1.0


def doubled(value: float) -> float:
    return 2 * value


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, value: float) -> float:
        return self.scale * value


def _shifted(shift: float) -> Callable[[float], float]:
    return lambda value: value + shift


def _counting() -> Callable[[float], float]:
    calls = 0

    def counted(value: float) -> float:
        nonlocal calls
        calls += 1
        return value

    return counted


def test_functions_of_one_name_differ_by_code_and_by_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: list[Any] = [
        lambda value: value,
        lambda value: -value,
        lambda value: doubled(value),
        lambda value: doubled(doubled(value)),
        lambda value, scale=2.0: value * scale,
        lambda value, scale=3.0: value * scale,
        lambda value: value in {"a", "b"},
        lambda value: value in {"a", "c"},
        _shifted(1.0),
        _shifted(2.0),
        Scaled(1.0),
        Scaled(2.0),
        Scaled(1.0).__call__,
        partial(doubled, value=1.0),
        partial(doubled, value=2.0),
        torch.sum,
    ]
    told = [json.dumps(described_code(function)) for function in functions]
    assert len(set(told)) == len(functions)
    assert told == [json.dumps(described_code(function)) for function in functions]
    assert described_code(_shifted(1.0)) == described_code(_shifted(1.0))

    def scaled(value: float) -> float:
        return SCALE * value

    before = described_code(scaled)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert described_code(scaled) != before


def test_what_a_function_counts_is_no_part_of_it() -> None:
    function = _counting()
    before = described_code(function)
    function(1.0)
    assert described_code(function) == before


def test_functions_that_refer_to_themselves_are_described() -> None:
    def factorial(number: int) -> int:
        return number * factorial(number - 1) if number else 1

    assert json.dumps(described_code(factorial)) == json.dumps(described_code(factorial))
