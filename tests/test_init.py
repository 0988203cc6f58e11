import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitscape


def test_importing_the_package_leaves_torch_out():
    code = "import sys, bitscape; bitscape.Policy; print('torch' in sys.modules, 'numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", sorted(bitscape._HOME))
def test_every_public_name_loads(name):
    home = importlib.import_module(f"bitscape.{bitscape._HOME[name]}")
    assert getattr(bitscape, name) is getattr(home, name)
    assert name in dir(bitscape)


def test_a_star_import_brings_every_public_name():
    names: dict[str, object] = {}
    exec("from bitscape import *", names)
    assert set(bitscape._HOME) == names.keys() - {"__builtins__"}
    assert names["Policy"] is bitscape.Policy


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(bitscape.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"bitscape.{module}" for name, module in bitscape._HOME.items()}


def test_no_public_name_is_hidden_by_a_submodule():
    submodules = {module.name for module in pkgutil.iter_modules(bitscape.__path__)}
    assert "policy" in submodules
    assert not submodules & set(bitscape._HOME)


def test_an_unknown_name_is_an_error_with_the_nearest_names():
    with pytest.raises(AttributeError, match="no attribute 'Polici'; nearest: Policy"):
        _ = bitscape.Polici


def test_the_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", bitscape.__version__)
