"""The documents themselves: links lead somewhere, and examples run."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from benchmarks import cards
from benchmarks.cards import card_of
from bitscape.cost.latency import LatencyTable
from bitscape.cost.policy_cost import CAPS
from bitscape.engine import Batch, Sgd, train
from bitscape.engine.step import Part
from bitscape.models.digits import digits_net
from bitscape.models.products import products
from bitscape.policy import Policy
from bitscape.searches.methods import METHODS
from bitscape.searches.problem import SearchProblem
from bitscape.searches.scores import ScoreTable
from bitscape.steps import STEPS, Plain
from tests.engine.tiny import tiny_batches, tiny_net

ROOT = Path(__file__).parents[2]
ROOT_PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS = [*ROOT_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = ("relative", "damped", "webhook", "similarity")
"""Of the examples of docs/extending.md, as files."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _blocks(name: str, language: str) -> list[str]:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def _anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)  # comments in code are no headings
    headings = re.findall(r"^#+ (.*)$", text, re.M)
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


def test_every_page_can_be_reached_from_the_index():
    seen, left = set(), [ROOT / "docs" / "index.md"]
    while left:
        page = left.pop()
        if page in DOCUMENTS and page not in seen and ROOT / "docs" in page.parents:
            seen.add(page)
            links = (link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")))
            left += [(page.parent / name).resolve() for name in links if name]
    assert set(DOCUMENTS) - seen == set(ROOT_PAGES)


def test_names_of_the_notation_exist():
    text = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8")
    names = re.findall(r"`(bitscape(?:\.\w+)+)`", text)
    assert len(names) > 20
    for module, _, name in (each.rpartition(".") for each in names):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    assert [kind for kind in CAPS if f"`{kind}`" not in text] == []


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


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ModuleType]]:
    """The method, the step, the tracker and the product of docs/extending.md, as files."""
    folder, blocks = tmp_path_factory.mktemp("examples"), _blocks("extending.md", "python")
    with pytest.MonkeyPatch.context() as patch:
        yield [_module(folder / f"{name}.py", text, patch) for name, text in zip(NAMES, blocks, strict=True)]


def _module(path: Path, text: str, patch: pytest.MonkeyPatch) -> ModuleType:
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def relative(examples: list[ModuleType]) -> ModuleType:
    return examples[0]


@pytest.fixture
def damped(examples: list[ModuleType]) -> ModuleType:
    return examples[1]


def test_the_example_tracker_posts_a_line_for_each_epoch(examples: list[ModuleType]):
    lines: list[str] = []
    result = train(
        tiny_net(), tiny_batches(), step=Plain(), optimizer=Sgd(lr=0.001), epochs=2, trackers=(examples[2].Webhook(lines.append),)
    )
    epochs = [f"epoch {record['epoch']}: loss {record['loss']:.3f}" for record in result.records]
    assert lines == ["2 epochs, 0 done before", *epochs, "end"]


def test_the_example_product_takes_bits(examples: list[ModuleType]):
    model = examples[3].Similarity().eval()
    assert list(products(model)) == ["product"]
    assert model(torch.ones(2, 3, 4)).tolist() == torch.full((2, 3, 3), 4.0).tolist()


def test_the_example_method_searches_within_its_budget(relative: ModuleType):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = SearchProblem.of(model=digits_net().eval(), samples=torch.randn(8, 1, 8, 8), budget=["bitops=w4a4", "weight_bytes=w4"])
    result = relative.Relative(images=4).search(problem)
    assert problem.choices.budget.exceeded(problem.network, result.policy) == {}
    assert result.policy.provenance["method"] == "relative"
    assert len({result.policy.layers[name] for name in problem.free_layers}) > 1


def test_the_examples_have_cards_and_in_the_lists_settings(relative: ModuleType, damped: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cards, "METHODS", {**METHODS, "relative": relative.Relative})
    monkeypatch.setitem(STEPS, "damped", damped.Damped)
    of_method, of_step = card_of(relative), card_of(damped)
    assert of_method is not None and of_step is not None
    assert of_method.settings == {"Relative": [["images=32", "Proxy images, at least 1."]]}
    assert of_step.settings == {"Damped": [["kept=0.9", "Share of the running mean that is kept at each step."]]}


def test_the_example_step_shortens_the_gradient_of_a_high_loss(damped: ModuleType):
    model, step = torch.nn.Linear(2, 3), damped.Damped(kept=0.75).build()
    images, labels = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])

    def batch(factor: float) -> Batch:
        return Batch((Part(images, labels, lambda logits, classes: factor * functional.cross_entropy(logits, classes), 1.0),))

    gradients = []
    for factor, share in ((1.0, 1.0), (3.0, 0.5), (1.0, 1.0)):  # running mean: 1, 0.75 + 0.25 * 3 = 1.5, then above the loss
        model.zero_grad()
        assert float(step(model, batch(factor)).extras["share"]) == pytest.approx(share)
        gradients.append(model.weight.grad)
    torch.testing.assert_close(gradients[1], 1.5 * gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_the_example_step_goes_on_after_a_stop(damped: ModuleType, tmp_path: Path):
    runs = {"step": damped.Damped(), "optimizer": Sgd(lr=0.001), "epochs": 2, "checkpoint_every_s": 0.0}
    whole, resumed = tiny_net(), tiny_net()
    train(whole, tiny_batches(), **runs)

    def stop(epoch: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(resumed, tiny_batches(), **runs, folder=tmp_path, after_epoch=stop)
    _, last = train(resumed, tiny_batches(), **runs, folder=tmp_path).records
    assert 0 < last["share"] < 1
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_files_in_the_description_of_formats_load(tmp_path: Path):
    policy, scores, latency = _blocks("formats.md", "json")
    path = tmp_path / "file.json"
    path.write_text(policy, encoding="utf-8")
    assert Policy.load(path).layers["conv1"].weight == 8
    path.write_text(scores, encoding="utf-8")
    assert ScoreTable.load(path).repairs == 3
    path.write_text(latency, encoding="utf-8")
    assert LatencyTable.load(path).layers["conv1"] == {"8/8": 0.31, "4/8": 0.31}
