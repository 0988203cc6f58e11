import logging
import os
import subprocess
import sys

import click
import pytest

from bitscape.cli.app import commands
from bitscape.policy import LayerBits, uniform_policy
from bitscape.searches.fisher import Fisher
from bitscape.version import __version__
from tests.cli.run import MODEL, run_cli

_RUN = """
import sys
from bitscape.cli import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    print("code", left.code, "torch", "torch" in sys.modules)
"""


@pytest.mark.parametrize("args", [["--help"], ["search", "--help"], ["policy", "show", "policy.json"]])
def test_help_and_policies_leave_torch_out(args, tmp_path):
    uniform_policy(["conv1"], LayerBits(4, 8)).save(tmp_path / "policy.json")
    command = [sys.executable, "-c", _RUN, *args]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout.endswith("code 0 torch False\n")
    assert shown.stderr == ""


_SEARCHED = """
import sys
from bitscape.cli import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    slow = ("torch._dynamo", "sympy", "scipy", "bitscape.searches.fisher", "bitscape.searches.mixture_search")
    print("code", left.code, [name for name in slow if name in sys.modules])
"""


def test_a_uniform_search_leaves_out_the_compiler_the_solver_and_other_methods():
    search = ("search", *MODEL, "--data", "digits", "--method", "uniform", "--budget", "weight_bytes=w4", "--device", "cpu")
    shown = subprocess.run([sys.executable, "-c", _SEARCHED, *search], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("code 0 []\n")


def _every_command(group=commands, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from _every_command(command, (*path, name))


_HELP = """
import sys
from bitscape.cli import main
for path in sys.argv[1:]:
    try:
        main([*path.split(), "--help"])
    except SystemExit:
        pass
print([name for name in ("torch", "numpy", "scipy", "pydantic", "rich") if name in sys.modules])
"""


def test_the_help_of_every_command_leaves_large_packages_out():
    paths = [" ".join(path) for path, _ in _every_command()]
    shown = subprocess.run([sys.executable, "-c", _HELP, *paths], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(("path", "command"), list(_every_command()), ids=lambda value: str(value))
def test_every_command_says_what_it_does_and_shows_an_example(path, command):
    shown = run_cli(*path, "--help")
    assert shown.code == 0
    if not isinstance(command, click.Group):
        assert f"Example:\n    bitscape {' '.join(path)}" in shown.out
        assert all(p.help for p in command.params if isinstance(p, click.Option) and not isinstance(p.type, click.Choice))


@pytest.mark.parametrize("args", [(), ("policy",), ("export",)])
def test_a_group_alone_shows_its_help(cli, args):
    assert "Usage: bitscape" in cli(*args).out


def test_the_version_is_shown(cli):
    assert cli("--version").out == f"bitscape {__version__}\n"


def test_an_unknown_command_names_the_nearest(refused):
    assert "serch" in refused("serch")


def test_a_missing_option_points_to_the_help(refused):
    assert "See `bitscape search --help`" in refused("search", "--data", "digits")


def test_ctrl_c_ends_with_130_and_a_word(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Fisher, "search", interrupt)
    shown = run_cli("search", *MODEL, "--data", "digits", "--images", 8, "--budget", "bitops=0.5x")
    assert shown.code == 130
    assert "interrupted: no result was written; run the command again" in shown.err


def test_log_handlers_do_not_pile_up():
    before = list(logging.getLogger("bitscape").handlers)
    run_cli("methods")
    assert logging.getLogger("bitscape").handlers == before


@pytest.mark.parametrize(("given", "used"), [(None, "passive"), ("active", "active")])
def test_threads_wait_without_spinning_unless_told_otherwise(monkeypatch, given, used):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    run_cli("--version")
    assert os.environ["OMP_WAIT_POLICY"] == used


@pytest.mark.parametrize("name", ["--repair", "--repair-folder", "--method", "--task", "--pin"])
def test_an_option_is_the_same_in_every_command_that_has_it(name):
    parameters = [option for _, command in _every_command() for option in command.params]
    options = [option.to_info_dict() for option in parameters if name in option.opts]
    assert len(options) > 1 and all(option == options[0] for option in options)
