"""Every search method on every small problem, and a card on every method file.

Each method searches each network once; what is checked of the search shares its result. On some of the networks it searches once more,
with the same seed, and within the budgets in which only the allocation differs: what a method scores does not depend on them.
"""

import copy
import importlib
import inspect
import pkgutil
import re
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitscape.quant.quantizers
import bitscape.searches
from bitscape.errors import BitscapeError
from bitscape.models.digits import digits_net
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.methods import METHODS, SearchMethod
from bitscape.searches.problem import SearchProblem, SearchResult
from bitscape.steps.plain import Plain

CANDIDATES = tuple(LayerBits(w, a) for w, a in product((2, 3, 4, 6, 8), (2, 4, 8)))


class SharedLayer(nn.Module):
    """One convolution run twice, one weight under two layers, one layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.right.weight = self.left.weight
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x).relu()).relu())
        x = self.left(x) + self.right(x.relu())
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """A patch embedding, one encoder layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(x).flatten(2).mT)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class KeywordCalls(nn.Module):
    """Layers called by keyword, and one whose output nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.unread = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(input=self.stem(input=x)).relu()
        x = self.body(input=x).relu()
        self.unread(input=x)
        logits: Tensor = self.head(input=x.mean((2, 3)))
        return logits


def _frozen() -> nn.Module:
    return KeywordCalls().requires_grad_(False)


def _signal() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(1, 2),
        nn.Conv1d(24, 16, 3, padding=1),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Conv1d(16, 16, 3, groups=4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(96, 20),
        nn.Tanh(),
        nn.Linear(20, 5),
    )


NETWORKS = {
    "digits": (digits_net, 1),
    "frozen": (_frozen, 3),
    "shared": (SharedLayer, 3),
    "keywords": (KeywordCalls, 3),
    "attention": (Attention, 3),
    "signal": (_signal, 3),
}
BUDGETS = {
    "bitops": ("bitops=w4a4",),
    "joint": ("bitops=w4a4", "weight_bytes=w4", "mean_activation_bits=5"),
    "size": ("mean_weight_bits=4.5", "peak_activation_bytes=w8a8"),
}
WITHOUT_MAPS = {"attention", "signal"}
"""Networks whose layers make no square feature maps, the only thing that method topological looks at."""
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*enable_nested_tensor")]


def _model(network: str) -> tuple[nn.Module, Tensor]:
    build, channels = NETWORKS[network]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().eval(), torch.randn(8, channels, 8, 8)


def _problem(
    network: str, budget: str, seed: int = 0, model: nn.Module | None = None, images: Tensor | None = None
) -> SearchProblem:
    if model is None or images is None:
        model, images = _model(network)
    return SearchProblem.of(model, images, BUDGETS[budget], candidates=CANDIDATES, seed=seed)


def _cases() -> list[tuple[str, str]]:
    return [(name, network) for name in METHODS for network in NETWORKS if name != "topological" or network not in WITHOUT_MAPS]


def _method(name: str) -> SearchMethod:
    """The method; one that trains, for two epochs."""
    kind = METHODS[name]
    return kind(epochs=2, head_epochs=1) if hasattr(kind, "epochs") else kind()


@dataclass(frozen=True)
class Searched:
    problem: SearchProblem
    result: SearchResult
    changed: tuple[str, ...]
    """What of the network in training mode, of the images and of the random state the search changed."""


@cache
def _searched(name: str, network: str) -> Searched:
    """The first search of a network by a method, within several caps."""
    model, images = _model(network)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, same_images = copy.deepcopy(model), images.clone()
    with torch.random.fork_rng():
        torch.manual_seed(123)
        random_state = torch.get_rng_state()
        problem = _problem(network, "joint", seed=5, model=model, images=images)
        result = _method(name).search(problem)
        same = {
            "modes, hooks or gradients": _described(model) == _described(before),
            "images": torch.equal(images, same_images),
            "random state": torch.equal(torch.get_rng_state(), random_state),
        }
    state = model.state_dict()
    same |= {key: torch.equal(state[key], value) for key, value in before.state_dict().items()}
    return Searched(problem, result, tuple(key for key, equal in same.items() if not equal))


def _check(problem: SearchProblem, policy: Policy) -> None:
    """The policy covers the network within every cap."""
    policy.check(layer_shapes(problem.prepared))
    assert policy.fingerprint is not None
    assert problem.choices.budget.exceeded(problem.network, policy) == {}
    choices = problem.choices, problem.choices.with_first_free  # of which uniform takes the better
    assert any(each.freedom.pinned.items() <= policy.layers.items() for each in choices)
    assert {policy.layers[layer] for layer in problem.free_layers} <= set(CANDIDATES)
    for group in problem.choices.freedom.groups:
        assert len({policy.layers[layer] for layer in group}) == 1


@pytest.mark.parametrize("network", sorted(WITHOUT_MAPS))
def test_a_method_that_sees_nothing_names_one_that_does(network: str) -> None:
    with pytest.raises(BitscapeError, match=r"method topological gives every pair of bits of a layer the same score.*use method local"):
        METHODS["topological"]().search(_problem(network, "bitops"))


@pytest.mark.parametrize(("name", "network"), _cases())
class TestEveryMethodOnEveryProblem:
    def test_a_policy_covers_the_network_within_every_cap(self, name: str, network: str) -> None:
        searched = _searched(name, network)
        _check(searched.problem, searched.result.policy)

    def test_leaves_the_model_and_the_random_state_alone(self, name: str, network: str) -> None:
        assert _searched(name, network).changed == ()

    def test_tells_where_the_policy_comes_from(self, name: str, network: str, tmp_path) -> None:
        searched, method = _searched(name, network), _method(name)
        policy, caps = searched.result.policy, searched.problem.choices.budget.caps
        provenance = policy.provenance
        assert provenance.keys() >= {"method", "settings", "seed", "budget", "images", "version"}
        assert provenance["settings"] == asdict(method)
        assert provenance["seed"] == 5
        assert provenance["budget"] == dict(caps)
        assert policy.cost.keys() >= caps.keys()
        policy.save(tmp_path / "policy.json")
        assert Policy.load(tmp_path / "policy.json") == policy
        assert searched.result.seconds > 0


@pytest.mark.parametrize(("name", "network"), [case for case in _cases() if case[1] in ("digits", "shared", "attention")])
def test_repeats_for_one_seed(name: str, network: str) -> None:
    first = _searched(name, network).result
    torch.manual_seed(321)
    second = _method(name).search(_problem(network, "joint", seed=5))
    assert first.policy == second.policy
    if first.scores is not None:
        np.testing.assert_array_equal(first.scores.values, second.scores.values)


@pytest.mark.parametrize("budget", ["bitops", "size"])
@pytest.mark.parametrize(("name", "network"), [case for case in _cases() if case[1] in ("shared", "keywords")])
def test_other_budgets_are_met_as_well(name: str, network: str, budget: str) -> None:
    problem = _problem(network, budget)
    _check(problem, _method(name).search(problem).policy)


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethodWithoutFreeLayers:
    def test_gives_the_pinned_policy_at_once(self, name: str) -> None:
        model, pins = digits_net().eval(), dict.fromkeys(layer_shapes(digits_net()), LayerBits(3, 5))
        problem = SearchProblem.of(model=model, samples=torch.randn(8, 1, 8, 8), budget="bitops=0.9x", pinned=pins)
        problem.prepared.register_forward_pre_hook(_never)
        result = METHODS[name]().search(problem)
        assert result.policy.layers == pins
        assert result.scores is None or result.scores.values.shape == (0, len(problem.choices.candidates))

    def test_refuses_a_budget_that_the_pins_exceed(self, name: str) -> None:
        pins = dict.fromkeys(layer_shapes(digits_net()), LayerBits(8, 8))
        images = torch.randn(8, 1, 8, 8)
        with pytest.raises(InfeasibleBudget, match="bitops"):
            METHODS[name]().search(SearchProblem.of(model=digits_net().eval(), samples=images, budget="bitops=0.5x", pinned=pins))


def _never(*_: object) -> None:
    raise AssertionError("the network ran although nothing is to be decided")


def _described(model: nn.Module) -> list[object]:
    modules = [(name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    parameters = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return [*modules, *parameters]


def test_the_methods_are_listed_by_name():
    trained = ["differentiable", "seam", "asga", "trained-scores"]
    assert list(METHODS) == ["fisher", *trained, "local", "kl", "hawq", "topological", "uniform", "random"]


def test_no_method_file_is_left_out_of_the_list():
    files = [importlib.import_module(f"bitscape.searches.{m.name}") for m in pkgutil.iter_modules(bitscape.searches.__path__)]
    found = {
        kind
        for module in files
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and callable(getattr(kind, "search", None))
        if is_dataclass(kind) and not inspect.isabstract(kind)
    }
    assert found == set(METHODS.values())


def _method_files() -> list[str]:
    quantizers = bitscape.quant.quantizers
    files = {f"{quantizers.__name__}.{m.name}" for m in pkgutil.iter_modules(quantizers.__path__)} - {f"{quantizers.__name__}.base"}
    return sorted({kind.__module__ for kind in METHODS.values()} | files | {Plain.__module__})


@pytest.mark.parametrize("file", _method_files())
def test_every_method_file_opens_with_its_card(file: str) -> None:
    card = importlib.import_module(file).__doc__ or ""
    lines = [found.group(1) for found in re.finditer(r"^(Paper|Idea|Computes|Departs|Costs|Measured) +\S", card, re.M)]
    assert lines == ["Paper", "Idea", "Computes", "Departs", "Costs", "Measured"]
    assert re.match(r"\S.*[.]$", card.splitlines()[0])
