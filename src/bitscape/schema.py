"""JSON files read strictly as dataclasses: pydantic checks the types of their fields."""

import os
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from bitscape.errors import BitscapeError
from bitscape.files import parse_json, read_limited

Document = TypeVar("Document")


def read_document(kind: type[Document], path: str | os.PathLike[str], *, format: int) -> Document:
    """Read a JSON file as the dataclass `kind`.

    Raises BitscapeError, naming the file and the entry, for a damaged file, and for entries that the dataclass does not allow; `format` is
    the number of those that it does.
    """
    try:
        content = read_limited(path)
        parse_json(content)  # refuses NaN, entries that stand twice and huge numbers, which pydantic takes
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BitscapeError(
            f"{os.fspath(path)}: {where}{': ' if where else ''}{first['msg']}; this version reads format {format}"
        ) from None
    except ValueError as error:
        raise BitscapeError(f"{os.fspath(path)}: {error}") from error
