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


def stubbed() -> dict[str, str]:
    """Public name -> module that holds it, as the stub says."""
    tree = ast.parse(Path(bitscape.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.name == alias.asname for node in imports for alias in node.names)  # what type checkers re-export
    return {alias.name: f"bitscape.{node.module}" for node in imports for alias in node.names}


@pytest.mark.parametrize("name", sorted(stubbed()))
def test_every_public_name_loads(name):
    home = importlib.import_module(stubbed()[name])
    assert getattr(bitscape, name) is getattr(home, name)


def test_a_star_import_brings_every_public_name_and_these_are_few():
    names: dict[str, object] = {}
    exec("from bitscape import *", names)
    assert names.keys() - {"__builtins__"} == stubbed().keys()
    assert len(names) <= 23  # `__builtins__` is one of them


def test_no_public_name_is_hidden_by_a_submodule():
    submodules = {module.name for module in pkgutil.iter_modules(bitscape.__path__)}
    assert "policy" in submodules
    assert not submodules & stubbed().keys()


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="Polici"):
        _ = bitscape.Polici


def test_the_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", bitscape.__version__)
