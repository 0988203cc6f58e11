"""Run the tests with the lowest versions that pyproject.toml allows, in a virtual environment of their own.

    python3.11 tools/bounds.py --torch 2.13.0 --extra huggingface tests/searches

torch is installed first, at the version asked for, so that nothing resolved later brings another build of it.
"""

import argparse
import os
import re
import subprocess
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")


def lowest(project: dict[str, object], extras: Sequence[str], torch: str) -> list[str]:
    """Lines of a pip constraints file: each dependency at its bound, torch at the given version.

    Raises ValueError for an extra that does not exist, a dependency without a bound, and one with two bounds.
    """
    optional = project.get("optional-dependencies", {})
    assert isinstance(optional, dict)
    unknown = [extra for extra in extras if extra not in optional]
    if unknown:
        raise ValueError(f"extra {unknown[0]!r} does not exist; allowed are {', '.join(optional)}")
    dependencies = project["dependencies"]
    assert isinstance(dependencies, list)
    versions: dict[str, str] = {}
    for text in [*dependencies, *(text for extra in extras for text in optional[extra])]:
        bound = BOUND.fullmatch(text)
        if bound is None:
            raise ValueError(f"dependency {text!r} has no lower bound; write NAME>=VERSION")
        name, version = bound.groups()
        if versions.setdefault(name, version) != version:
            raise ValueError(f"dependency {name!r} has the bounds {versions[name]} and {version}; give it one")
    return [f"{name}=={version}" for name, version in {**versions, "torch": torch}.items()]


def run(*command: object, **environment: str) -> None:
    """Run a command in the repository; CalledProcessError if it fails."""
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env={**os.environ, **environment})


def main() -> None:
    """Make the environment, install, and run pytest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", default="2.13.0", help="version of torch")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml beside dev")
    parser.add_argument("--folder", type=Path, help="where the environment stays; by default a temporary folder")
    parser.add_argument("tests", nargs="*", help="what pytest runs; by default all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, extras = options.folder or Path(temporary), ["dev", *options.extra]
        constraints = Path(temporary) / "lowest.txt"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        constraints.write_text("\n".join(lowest(project, extras, options.torch)) + "\n")
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        run(python, "-m", "pip", "install", f"torch=={options.torch}")
        run(python, "-m", "pip", "install", "-c", constraints, "-e", f".[{','.join(extras)}]")
        run(python, "-m", "pytest", *options.tests, PYTHONPATH=str(ROOT / "src"))


if __name__ == "__main__":
    main()
