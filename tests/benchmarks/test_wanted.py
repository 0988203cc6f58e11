"""The lists of runs: a script that cannot make its list, or lists a run twice, fails here instead of after hours."""

import importlib
import inspect
import pkgutil

import pytest

import benchmarks
from bitscape.report.records import identity, missing

ARGUMENTS = {
    "variants": True,
    "networks": ["mobilenetv2_tfslim", "squeezenet1_1"],
    "widths": [8, 6],
    "seeds": 3,
    "images": 15_000,
    "epochs": 2,
    "threads": 1,
    "allocator": "default",
    "files": True,
}
"""What `wanted` of some script needs, as its command line would give it."""
MODULES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
SCRIPTS = [name for name in MODULES if hasattr(importlib.import_module(f"benchmarks.{name}"), "KEYS")]


def test_scripts_are_found():
    assert {"packed_sizes", "ptq_imagenet", "qat_cifar10"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_wanted_run_is_listed_twice(name: str):
    script = importlib.import_module(f"benchmarks.{name}")
    needed = [parameter.name for parameter in inspect.signature(script.wanted).parameters.values() if parameter.default is parameter.empty]
    runs = list(script.wanted(**{parameter: ARGUMENTS[parameter] for parameter in needed}))
    assert runs
    identities = [identity(run, script.KEYS) for run in runs]
    assert len(set(identities)) == len(identities)
    assert missing(runs, runs, script.KEYS) == []


def test_a_part_of_the_networks_can_be_asked_for():
    script = importlib.import_module("benchmarks.packed_sizes")
    assert [run["network"] for run in script.wanted(("resnet20",))] == ["resnet20"] * 3
