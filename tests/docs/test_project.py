"""The files by which a project is found, cited and released agree with the package."""

import re
import tomllib
from pathlib import Path

import pytest

from bitscape.version import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAPERS = ("2302.06845", "2505.04877", "2111.12273", "2302.04453")


def test_the_citation_is_of_this_version_and_names_the_papers():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.M) == [__version__]
    assert re.findall(r"value: arXiv:(.*)$", citation, re.M) == list(PAPERS)
    assert PROJECT["project"]["urls"]["Repository"] in citation


def test_the_changelog_begins_with_this_version_and_its_days_fall():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+), ", text, re.M)[0] == __version__
    days = re.findall(r"^### (\d{4}-\d\d-\d\d)$", text, re.M)
    assert days == sorted(days, reverse=True) != []


def test_the_source_distribution_names_what_exists():
    listed = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [path for path in listed if not (ROOT / path.lstrip("/")).exists()] == []


def test_the_files_of_the_server_are_valid_yaml():
    yaml = pytest.importorskip("yaml")
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]
    assert len(files) > 5
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
