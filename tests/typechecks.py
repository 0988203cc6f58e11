"""The run-time type checker of the tests: array shapes as annotated, and an int where a float is asked for."""

from importlib.util import find_spec
from pathlib import Path

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def modules_with_shapes() -> list[str]:
    """Modules of quantization that annotate shapes of arrays, by name."""
    spec = find_spec("bitscape")
    assert spec is not None and spec.submodule_search_locations
    (folder,) = map(Path, spec.submodule_search_locations)
    files = (path for path in sorted((folder / "quant").rglob("*.py")) if "from jaxtyping import" in path.read_text(encoding="utf-8"))
    return [".".join((folder.name, *path.relative_to(folder).with_suffix("").parts)) for path in files]
