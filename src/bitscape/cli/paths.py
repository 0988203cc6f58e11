"""Types of options that name files and folders.

Each path is noted with its option while the command line is read. An output that would overwrite an input or another output is refused
there and then, so that a new option is covered by its type alone.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from bitscape.cli.output import is_first_worker
from bitscape.errors import BitscapeError
from bitscape.files import check_replaceable
from bitscape.folders import is_written, locked

Role = Literal["file", "run", "source", "model", "logs"]
"""A file or a folder of `train`, `tiers` or `search`; images; a network's folder; a folder for files with names of their own."""
_NOTED = "bitscape.paths"
if TYPE_CHECKING:
    PathType: TypeAlias = click.ParamType[Path]
    TextType: TypeAlias = click.ParamType[str]
else:
    PathType = TextType = click.ParamType  # cannot be subscripted in older versions


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one option names."""

    option: str
    """As in `--out 'x.json'`."""
    path: Path
    role: Role
    output: bool
    also: tuple[Path, ...] = ()
    """Files written beside it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything it stands for."""
        return (self.path, *self.also)


class OutputFile(PathType):
    """A file that will be written. Refuses, before any work is done, a wrong suffix and a folder that cannot take the file."""

    name = "file"

    def __init__(self, suffix: str | Mapping[str, tuple[str, ...]], also: tuple[str, ...] = ()) -> None:
        self.suffixes: Mapping[str, tuple[str, ...]] = {suffix: also} if isinstance(suffix, str) else suffix
        """Suffix of the file, which tells its format -> suffixes of files written beside it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        path, option = Path(value), _option(param, value)
        if value == "-":
            raise BitscapeError(f"{option}: results go into files, and stdout takes the tables; give the path of a file")
        if path.is_dir():
            raise BitscapeError(f"{option} is a folder; give a file")
        check_replaceable(path)
        if path.suffix not in self.suffixes:
            forms = " or ".join(self.suffixes)
            raise BitscapeError(f"{option}: the file is written as {forms}; give e.g. {path.with_suffix(next(iter(self.suffixes))).name}")
        if not path.parent.is_dir():
            raise BitscapeError(f"{option}: no folder {str(path.parent)!r}; make it first")
        _check_writable(option, path.parent)
        also = tuple(path.with_suffix(suffix) for suffix in self.suffixes[path.suffix])
        return _noted(ctx, Place(option=option, path=path, role="file", output=True, also=also))


class OutputFolder(PathType):
    """A folder that will be written, and made if it is not there."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        path, option = Path(value), _option(param, value)
        there = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
        if not there.is_dir():
            raise BitscapeError(f"{option}: {str(there)!r} is not a folder; give another one")
        _check_writable(option, there)
        return _noted(ctx, Place(option=option, path=path, role="run", output=True))


class InputPath(click.Path):
    """A file or a folder that is read."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        role: Role = "run" if path.is_dir() else "file"
        return _noted(ctx, Place(option=_option(param, value), path=path, role=role, output=False))


class SourceText(TextType):
    """Images: a name, a file or a folder."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        if value != "digits" and (path := Path(value)).exists():
            _noted(ctx, Place(option=_option(param, value), path=path, role="source" if path.is_dir() else "file", output=False))
        return str(value)


class ModelText(TextType):
    """A network by name; "hf:" may name a folder, "onnx:" names a file."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        kind, _, name = value.partition(":")
        roles: dict[str, tuple[bool, Role]] = {"hf": (Path(name).is_dir(), "model"), "onnx": (Path(name).is_file(), "file")}
        exists, role = roles.get(kind, (False, "file"))
        if exists:
            _noted(ctx, Place(option=_option(param, value), path=Path(name), role=role, output=False))
        return str(value)


class TrackerText(TextType):
    """NAME=WHERE, where the second half may be a folder of logs."""

    name = "tracker"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        if folder := value.partition("=")[2]:
            _noted(ctx, Place(option=_option(param, value), path=Path(folder), role="logs", output=True))
        return str(value)


FILE = InputPath(exists=True, dir_okay=False)
FOLDER = InputPath(exists=True, file_okay=False)
FILE_OR_FOLDER = InputPath(exists=True)
OUTPUT_FOLDER, SOURCE, MODEL, TRACKER = OutputFolder(), SourceText(), ModelText(), TrackerText()


def keep_locked(folder: Path, file: str = "") -> None:
    """Lock a folder, or one file in it, until the command ends.

    Of several workers the first locks it for all of them.
    """
    if is_first_worker():
        click.get_current_context().with_resource(locked(folder, file))


def _option(parameter: click.Parameter | None, value: object) -> str:
    if isinstance(parameter, click.Option):
        return f"{parameter.opts[0]} {str(value)!r}"
    return repr(str(value))


def _check_writable(option: str, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BitscapeError(f"{option}: the folder {str(folder)!r} cannot be written; give another one")


def _noted(context: click.Context | None, place: Place) -> Path:
    """Note a place, and raise BitscapeError if one of two noted places would be written over the other."""
    noted: list[Place] = [] if context is None else context.meta.setdefault(_NOTED, [])
    for earlier in noted:
        for output, other in ((place, earlier), (earlier, place)):
            if output.output and (reason := _clash(output, other)):
                raise BitscapeError(reason)
    noted.append(place)
    return place.path


def _clash(output: Place, other: Place) -> str:
    """Say why `output` must not be written; "" if it harms nothing that `other` names."""
    verb = "writes" if other.output else "reads"
    if {output.role, other.role} <= {"run", "logs"} and "logs" in (output.role, other.role):
        return ""  # files of logs have names of their own
    if any(_same(path, file) for path in output.files for file in other.files):
        return f"{output.option} is what {other.option} {verb}; give another path"
    if output.role == "run" and (inside := next(_below(output.path, other.files), None)) and is_written(inside.parts[0]):
        return f"{output.option} would replace {str(output.path / inside)!r}, which {other.option} {verb}; give another folder"
    inside = next(_below(other.path, output.files), None)
    if inside is not None and _harms(output, other, inside):
        return f"{output.option} is inside of the folder that {other.option} {verb}, and would change it; give another path"
    return ""


def _harms(output: Place, other: Place, inside: Path) -> bool:
    """Whether writing to the path `inside` of a folder changes what is read from it."""
    if other.role == "run":
        return is_written(inside.parts[0])
    if other.role == "source" and output.role != "file":
        return True  # the folders in it are classes
    return (other.path / inside).exists()


def _below(folder: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """Where in `folder` the paths are that it contains."""
    for path in map(_real, paths):
        for parent in path.parents:
            if _same(parent, folder):
                yield path.relative_to(parent)


def _same(first: Path, second: Path) -> bool:
    """Whether two paths are one file or folder, by whatever links, there or not."""
    if _real(first) == _real(second):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
