"""The documents themselves: links lead somewhere, and examples run."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.cards import card_of
from bitscape.models.digits import digits_net
from bitscape.policy import Policy
from bitscape.search.problem import SearchProblem
from bitscape.search.scores import ScoreTable

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _blocks(name: str, language: str) -> list[str]:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_resolve(document: Path):
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert ROOT in target.parents, link
        assert not anchor or anchor in _anchors(target), link


def test_the_pipeline_of_the_index_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks("index.md", "python")
    namespace: dict[str, object] = {}
    with torch.random.fork_rng():
        exec(compile(example, "docs/index.md", "exec"), namespace)
    assert (tmp_path / "packed.safetensors").is_file()
    policy = namespace["policy"]
    assert isinstance(policy, Policy)
    assert policy.provenance["method"] == "fisher"


@pytest.fixture
def relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The method of docs/extending.md, as the file it says it is."""
    (example,) = _blocks("extending.md", "python")
    (tmp_path / "relative.py").write_text(example, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("relative", tmp_path / "relative.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "relative", module)
    spec.loader.exec_module(module)
    return module


def test_the_example_method_searches_within_its_budget(relative: ModuleType):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = SearchProblem(model=digits_net().eval(), images=torch.randn(8, 1, 8, 8), budget=["bitops=w4a4", "weight_bytes=w4"])
    result = relative.Relative(images=4).search(problem)
    assert problem.parsed_budget.exceeded(problem.network, result.policy) == {}
    assert result.policy.provenance["method"] == "relative"
    assert len({result.policy.layers[name] for name in problem.free_layers}) > 1


def test_the_example_method_has_a_card(relative: ModuleType):
    card = card_of(relative)
    assert card is not None
    assert list(card.settings) == ["Relative"]


def test_the_files_in_the_description_of_formats_load(tmp_path: Path):
    policy, scores = _blocks("formats.md", "json")
    path = tmp_path / "file.json"
    path.write_text(policy, encoding="utf-8")
    assert Policy.load(path).layers["conv1"].weight == 8
    path.write_text(scores, encoding="utf-8")
    assert ScoreTable.load(path).repairs == 3
