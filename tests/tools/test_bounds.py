import tomllib
from pathlib import Path

import pytest

from tools.bounds import lowest

PROJECT = {"dependencies": ["torch>=2.11", "numpy>=1.26"], "optional-dependencies": {"data": ["pyarrow>=15"], "free": ["x"]}}


def test_each_dependency_stands_at_its_bound_and_torch_at_the_given_version():
    assert lowest(PROJECT, [], "2.13.0") == ["torch==2.13.0", "numpy==1.26"]
    assert lowest(PROJECT, ["data"], "2.12.1") == ["torch==2.12.1", "numpy==1.26", "pyarrow==15"]


@pytest.mark.parametrize(
    ("project", "extras", "message"),
    [
        (PROJECT, ["date"], "extra 'date' does not exist; allowed are data, free"),
        (PROJECT, ["free"], "dependency 'x' has no lower bound"),
        ({"dependencies": ["a>=1", "a>=2"]}, [], "dependency 'a' has the bounds 1 and 2"),
    ],
)
def test_what_has_no_one_bound_is_refused(project, extras, message):
    with pytest.raises(ValueError, match=message):
        lowest(project, extras, "2.13.0")


def test_every_dependency_of_this_project_has_one_bound():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "scipy==1.15" in lowest(project, list(project["optional-dependencies"]), "2.13.0")
