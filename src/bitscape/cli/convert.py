"""`bitscape policy convert`: a policy file as other tools take it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitscape.cli.network import load_network
from bitscape.cli.options import all_of, shape_option
from bitscape.cli.parsing import parse_shape
from bitscape.cli.paths import FILE, MODEL, OutputFile
from bitscape.errors import BitscapeError
from bitscape.files import parse_json, read_limited, write_atomic
from bitscape.policy import Policy

if TYPE_CHECKING:
    from bitscape.searches.scores import ScoreTable


@dataclass(frozen=True)
class Tool:
    """Another tool that takes a policy."""

    write: Callable[..., str]
    """From the policy and the options below, by keyword, to the content of its file."""
    options: tuple[str, ...]
    """What it takes beside the policy."""
    needed: tuple[str, ...] = ()
    """Of these what must be given."""


def _torchao(policy: Policy, model: str, **rounding: Any) -> str:
    from bitscape.adapters.torchao import to_torchao, torchao_document

    config = to_torchao(policy, load_network(model, None, "cpu"), **rounding)
    return _json(torchao_document(config))


def _executorch_arm(policy: Policy, **rounding: Any) -> str:
    from bitscape.adapters.executorch_arm import to_executorch_arm

    return _json(to_executorch_arm(policy, **rounding))


def _model_explorer(
    policy: Policy, model: str, input_shape: str, program: Path | None = None, **shown: Any
) -> str:
    import torch

    from bitscape.adapters.model_explorer import to_model_explorer

    shape = parse_shape(input_shape)
    assert shape is not None
    exported = torch.export.export(load_network(model, None, "cpu"), (torch.zeros(1, *shape),))
    if "scores" in shown:
        shown["scores"] = _scores(shown["scores"])
    document = to_model_explorer(policy, exported, **shown)
    if program is not None:
        torch.export.save(exported, program)
    return _json(document)


def _hailo(policy: Policy, names: Path, **rounding: Any) -> str:
    from bitscape.adapters.hailo import to_hailo

    return to_hailo(policy, _names(names), **rounding)


TOOLS: Mapping[str, Tool] = {
    "torchao": Tool(_torchao, ("model", "rounding"), needed=("model",)),
    "executorch-arm": Tool(_executorch_arm, ("rounding",)),
    "model-explorer": Tool(
        _model_explorer,
        ("model", "input_shape", "program", "value", "scores"),
        needed=("model", "input_shape"),
    ),
    "hailo": Tool(_hailo, ("names", "rounding"), needed=("names",)),
}
tool_options = all_of(
    click.option(
        "--to",
        "tool",
        required=True,
        type=click.Choice(list(TOOLS)),
        help="Tool that will read the file.",
    ),
    click.option(
        "--model",
        type=MODEL,
        metavar="NAME",
        help="torchao, model-explorer: the float network, timm:name or package.module:function.",
    ),
    shape_option,
    click.option(
        "--program",
        type=OutputFile(".pt2"),
        metavar="FILE",
        help="model-explorer: where the exported network goes, whose graph it shows.",
    ),
    click.option(
        "--value",
        type=click.Choice(["weight", "activation", "score"]),
        help="model-explorer: what nodes show: weight bits (default), activation bits, or the "
        "score, which is the layer's "
        "sensitivity at its bits.",
    ),
    click.option(
        "--scores",
        type=FILE,
        metavar="FILE",
        help="model-explorer: what `bitscape search --scores` wrote.",
    ),
    click.option(
        "--names",
        type=FILE,
        metavar="FILE",
        help='hailo: JSON, layer -> its name in Hailo\'s compiler: {"conv1": "net/conv1"}.',
    ),
    click.option(
        "--rounding",
        type=click.Choice(["exact", "up"]),
        help="Of widths that the tool lacks. exact: refuse them (default); up: take the next wider "
        "ones, and say where.",
    ),
    click.option(
        "--out",
        required=True,
        type=OutputFile({".json": (), ".alls": ()}),
        metavar="FILE",
        help="Where it goes; of hailo .alls.",
    ),
)


def write_converted(policy: Policy, tool: str, out: Path, **options: Any) -> None:
    """Write the file of a tool. Raises BitscapeError for options that it lacks or does not take."""
    chosen = {name: value for name, value in options.items() if value is not None}
    about = TOOLS[tool]
    if missing := [_option(name) for name in about.needed if name not in chosen]:
        raise BitscapeError(f"--to {tool} needs {missing[0]}; see bitscape policy convert --help")
    if foreign := [_option(name) for name in chosen if name not in about.options]:
        takes = ", ".join(map(_option, about.options))
        raise BitscapeError(f"--to {tool} takes no {foreign[0]}, only {takes}")
    write_atomic(out, about.write(policy, **chosen))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _json(document: Any) -> str:
    return json.dumps(document, indent=2) + "\n"


def _scores(path: Path) -> "ScoreTable":
    from bitscape.searches.scores import ScoreTable

    return ScoreTable.load(path)


def _names(path: Path) -> dict[str, str]:
    try:
        names = parse_json(read_limited(path))
    except ValueError as error:
        raise BitscapeError(f"--names {path}: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BitscapeError(
            f'--names {path}: it must be a JSON object of texts, e.g. {{"conv1": "net/conv1"}}'
        )
    return names
