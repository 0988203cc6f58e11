"""Float weights in files: safetensors, or what `torch.save` wrote, of which nothing is run."""

import argparse
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitscape.errors import BitscapeError, first_line
from bitscape.files import check_safetensors_header

_log = logging.getLogger("bitscape.models")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "module", "params")
"""Entries of a training checkpoint under which the weights may be, the first that is there first."""
MOST_WRAPPERS = 4
"""One within the other; an entry may be the very object that holds it."""
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_REFUSED = re.compile(r"GLOBAL (\S+)")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Raises BitscapeError for a file that is missing, damaged, or holds no state dict."""
    if not path.is_file():
        raise BitscapeError(f"path: no file {str(path)!r}; give a .safetensors or .pt file")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix != ".safetensors" and start[8:] != b"{" and start.startswith((_ZIP, _PICKLE)):
        return _state_dict(path, _unwrapped(path, _loaded(path)))
    try:
        check_safetensors_header(path)
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise BitscapeError(
            f"path: {str(path)!r} is not a complete safetensors file ({error}); copy it again, or convert it with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights without a prefix that all of them share, such as "module.", where only that way they are `names`."""
    current = dict(weights)
    while not any(name in names for name in current):
        prefixes = {name.partition(".")[0] for name in current if name != "n_averaged"}  # a count that averaged models keep
        if len(prefixes) != 1 or not all("." in name for name in current if name != "n_averaged"):
            return dict(weights)
        current = {name.partition(".")[2]: value for name, value in current.items() if name != "n_averaged"}
    return current


def _loaded(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # options beside the weights
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of the unpickler, the zip reader and others
        refused = _REFUSED.search(str(error))
        if refused:
            reason = f"holds more than tensors ({refused[1]}), which is not loaded, for it could run code"
        else:
            # torch goes on with how to run what the file holds
            reason = f"cannot be read as weights ({first_line(error).partition(' In PyTorch 2.6')[0]})"
        raise BitscapeError(f"path: {str(path)!r} {reason}; save the weights alone: torch.save(model.state_dict(), path)") from error


def _unwrapped(path: Path, document: Any) -> Any:
    """The innermost entry that may be a state dict."""
    for _ in range(MOST_WRAPPERS):
        wrapped = [name for name in WRAPPERS if isinstance(document, Mapping) and isinstance(document.get(name), Mapping)]
        if not wrapped:
            break
        _log.info("%s: using its entry %r", path, wrapped[0])
        document = document[wrapped[0]]
    return document


def _state_dict(path: Path, document: Any) -> dict[str, Tensor]:
    """What was saved, if it is a state dict."""
    if not isinstance(document, Mapping):
        raise BitscapeError(f"path: {str(path)!r} holds {type(document).__name__}; save a state dict: torch.save(model.state_dict(), path)")
    others = [name for name, value in document.items() if not isinstance(value, Tensor)]
    if others or not document:
        shown = ", ".join(map(str, list(document)[:5])) or "nothing"
        raise BitscapeError(
            f"path: {str(path)!r} holds {shown}; looked for a state dict, or one as an entry {', '.join(WRAPPERS)}: "
            "save the weights alone: torch.save(model.state_dict(), path)"
        )
    return {str(name): value for name, value in document.items()}
