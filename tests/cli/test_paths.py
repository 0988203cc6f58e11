import os
from pathlib import Path

import click
import pytest

from bitscape.cli.app import commands
from bitscape.cli.paths import InputPath, ModelText, OutputFile, OutputFolder, SourceText, TrackerText, keep_locked
from bitscape.errors import BitscapeError
from tests.cli.run import MODEL

PATH_TYPES = {
    "FILE": (InputPath, OutputFile),
    "FILE...": (InputPath,),
    "RUN...": (InputPath,),
    "FOLDER": (InputPath, OutputFolder),
    "SOURCE": (SourceText,),
    "NAME=WHERE": (TrackerText,),
}
NET = "bitscape.models.digits:digits_net"


def _parameters(group=commands, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _parameters(command, (*path, name))
        else:
            yield from (pytest.param(p, id=" ".join((*path, name, p.name))) for p in command.params)


@pytest.mark.parametrize("parameter", list(_parameters()))
def test_every_parameter_that_names_a_path_has_a_type_that_notes_it(parameter):
    assert not isinstance(parameter.type, click.Path | click.File) or isinstance(parameter.type, InputPath)
    if parameter.metavar in PATH_TYPES:
        assert isinstance(parameter.type, PATH_TYPES[parameter.metavar])
    if parameter.name == "model":
        assert isinstance(parameter.type, ModelText)
    if parameter.name in ("out", "scores", "folder", "json_file", "corruptions") and parameter.metavar != "NAME":
        assert isinstance(parameter.type, InputPath | OutputFile | OutputFolder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files and folders as users have them; refusals come before any of them is read."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/model.safetensors", "run/policy.json", "p.json", "s.json", "w.safetensors", "photos/cat/1.png", "hub/config.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("link.json").symlink_to("p.json")
    os.link("w.safetensors", "hard.safetensors")
    Path("runs").symlink_to("run")
    return tmp_path


SEARCH = ("search", *MODEL, "--budget", "bitops=w4a4")
EXPORT = ("--model", NET, "--calibration", "digits")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("solve", "--model", NET, "--scores", "s.json", "--out", "s.json"), "--out 's.json' is what --scores 's.json' reads"),
        (("solve", "--model", NET, "--out", "./run/../s.json", "--scores", "s.json"), "--out './run/../s.json' is what --scores"),
        (("export", "packed", *EXPORT, "--policy", "p.json", "--weights", "w.safetensors", "--out", "w.safetensors"), "what --weights"),
        (("export", "packed", *EXPORT, "--policy", "p.json", "--weights", "hard.safetensors", "--out", "w.safetensors"), "what --weights"),
        (("export", "packed", *EXPORT, "--checkpoint", "run", "--out", "run/model.safetensors"), "inside of the folder that --checkpoint"),
        (("export", "packed", *EXPORT, "--checkpoint", "runs", "--out", "run/model.safetensors"), "inside of the folder that --checkpoint"),
        ((*SEARCH, "--data", "digits", "--out", "a.json", "--scores", "a.json"), "is what --out 'a.json' writes"),
        ((*SEARCH, "--data", "digits", "--folder", "run", "--out", "run/policy.json"), "--out 'run/policy.json' is inside of the folder"),
        ((*SEARCH, "--data", "digits", "--latency", "p.json", "--out", "link.json"), "is what --latency 'p.json' reads"),
        (("train", *MODEL, "--data", "digits", "--weights", "run/model.safetensors", "--out", "run"), "replace 'run/model.safetensors'"),
        (("train", *MODEL, "--data", "digits", "--policy", "runs/policy.json", "--out", "run"), "would replace 'run/policy.json'"),
        (("train", "--model", NET, "--data", "photos", "--out", "photos"), "is what --data 'photos' reads"),
        (("train", "--model", NET, "--data", "photos", "--out", "photos/run"), "inside of the folder that --data 'photos' reads"),
        (("train", *MODEL, "--data", "photos", "--tracker", "tensorboard=photos/logs", "--out", "n"), "inside of the folder that --data"),
        (("train", "--model", "hf:hub", "--data", "digits", "--out", "hub"), "is what --model 'hf:hub' reads"),
        (("tiers", *MODEL, "--data", "digits", "--checkpoint", "run", "--out", "run"), "is what --checkpoint 'run' reads"),
        (("evaluate", *MODEL, "--data", "digits", "--policy", "p.json", "--corruptions", "p.svg"), "is what --policy 'p.json' reads"),
        (("bench", "run/model.safetensors", "--data", "p.json", "--json", "p.json"), "is what --data 'p.json' reads"),
        (("report", "run", "--out", "r.pdf"), "--out 'r.pdf': the file is written as .html; give e.g. r.html"),
        ((*SEARCH, "--data", "digits", "--out", "p.yaml"), "the file is written as .json; give e.g. p.json"),
        ((*SEARCH, "--data", "digits", "--out", "photos"), "--out 'photos' is a folder; give a file"),
        ((*SEARCH, "--data", "digits", "--out", "no/p.json"), "no folder 'no'; make it first"),
        (("train", *MODEL, "--data", "digits", "--out", "p.json/run"), "p.json' is not a folder"),
    ],
)
def test_an_output_over_an_input_or_another_output_is_refused(folder, refused, args, message):
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert message in refused(*args)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    "args",
    [
        ("report", "run", "--out", "run/report.html"),
        ("export", "packed", *EXPORT, "--checkpoint", "run", "--out", "run/packed.safetensors"),
        ("train", *MODEL, "--data", "digits", "--weights", "w.safetensors", "--out", "."),
        ("train", *MODEL, "--data", "digits", "--tracker", "tensorboard=run2", "--out", "run2"),
        ("tiers", *MODEL, "--data", "digits", "--checkpoint", "run", "--out", "run/tiers"),
        (*SEARCH, "--data", "photos", "--out", "photos/policy.json"),
    ],
)
def test_outputs_that_harm_nothing_are_taken(folder, args):
    Path("run/report.html").write_text("of an earlier report")
    group, words = commands, list(args)
    while isinstance(group, click.Group):
        group = group.commands[words.pop(0)]
    group.make_context("command", words)


@pytest.mark.parametrize(
    ("text", "message"),
    [("-", "--out '-': results go into files"), ("/dev/null", "is a device; give the path of a file")],
)
def test_results_go_into_files(text, message):
    with pytest.raises((BitscapeError, OSError), match=message):
        OutputFile(".json").convert(text, click.Option(["--out"]), None)


@pytest.mark.parametrize(("rank", "files"), [("0", {".lock", ".lock-owner"}), ("1", set())])
def test_the_first_of_several_workers_locks_a_folder_for_all(tmp_path, monkeypatch, rank, files):
    monkeypatch.setenv("RANK", rank)
    with click.Context(click.Command("train")):
        keep_locked(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == files
