"""bs.search on inputs of any form, tasks of the user's own, and what methods take."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.engine.task import Follow
from bitscape.searches.methods import METHODS
from tests.cli.run import run_cli
from tests.verbs.test_verbs import IMAGES, LABELS, classifier

CANDIDATES = [bs.LayerBits(weight, 8) for weight in (2, 4, 8)]


def test_a_budget_may_be_a_generator() -> None:
    texts = ["weight_bytes=w8", "bitops=w8a8"]
    expected = bs.search(classifier(), IMAGES, texts, candidates=CANDIDATES, method="uniform").policy
    policy = bs.search(classifier(), IMAGES, iter(texts), candidates=CANDIDATES, method="uniform").policy
    assert policy == expected and len(policy.provenance["budget"]) == 2


class Pair(nn.Module):
    """Features of an image and of whole numbers, kept where a mask says so."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image, self.hidden = nn.Linear(12, 8), nn.Linear(8, 8)
            self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, image, words, *, keep=None):
        features = self.image(image.flatten(1)).relu() + self.words(words).mean(1)
        features = features if keep is None else features * keep
        return self.head(self.hidden(features).relu())


SIGNALS = torch.randn(24, 3, 4, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(0, 10, (24, 5), generator=torch.Generator().manual_seed(1))
KEEP = torch.arange(24)[:, None] % 3 > 0
FORMS = {
    "arguments": [((SIGNALS[start : start + 8], WORDS[start : start + 8]), None) for start in (0, 8, 16)],
    "keywords": [{"image": SIGNALS[:10], "words": WORDS[:10]}, {"image": SIGNALS[10:], "words": WORDS[10:]}],
}


@pytest.mark.parametrize("method", ["fisher", "hawq", "kl"])
def test_several_inputs_give_the_same_scores_in_any_form(method):
    model = Pair().eval()
    results = [bs.search(model, data, "weight_bytes=w4", candidates=CANDIDATES, method=method) for data in FORMS.values()]
    assert results[0].policy.layers == results[1].policy.layers
    assert results[0].scores.layers == ("hidden", "head")
    torch.testing.assert_close(torch.tensor(results[0].scores.values), torch.tensor(results[1].scores.values), rtol=1e-4, atol=1e-7)


def test_keyword_inputs_that_are_truth_values_reach_the_network():
    data = [{"image": SIGNALS, "words": WORDS, "keep": KEEP}]
    nothing_kept = [{"image": SIGNALS, "words": WORDS, "keep": torch.zeros_like(KEEP)}]
    kept, none = (bs.search(Pair().eval(), each, "weight_bytes=w4", candidates=CANDIDATES).scores.values for each in (data, nothing_kept))
    assert kept.max() > 0 and not (kept == none).all()


@pytest.mark.parametrize("method", ["fisher", "hawq", "kl", "local", "topological"])
def test_samples_of_several_shapes_are_scored_and_costs_are_those_of_the_first(method, caplog):
    data = [IMAGES[:8], IMAGES[8:16, :, :, :6]]
    result = bs.search(classifier(), data, "weight_bytes=w4", candidates=CANDIDATES, method=method)
    assert "samples of several shapes; costs are counted on the first, [[3, 8, 8]]" in caplog.text
    assert result.choices.network.by_name["0"].macs == 3 * 8 * 9 * 64
    assert result.policy.provenance["images"] == [16, 3, 8, 8]


@dataclass(frozen=True)
class Targeted(Follow):
    """The user's loss: the first output's distance from the target."""

    def drawn_losses(self, outputs, generator, targets=None, draws=1):
        return (outputs[:, 0] - targets).square()[None]


@pytest.mark.parametrize("batch_size", [5, 16])
def test_targets_of_the_data_reach_the_task(batch_size):
    class Spy(Targeted):
        def drawn_losses(self, outputs, generator, targets=None, draws=1):
            seen.append(targets)
            return super().drawn_losses(outputs, generator, targets, draws)

    seen: list[torch.Tensor] = []
    method = bs.Fisher(batch_size=batch_size)
    bs.search(classifier(), [(IMAGES, LABELS)], "weight_bytes=w4", candidates=CANDIDATES, task=Spy(), method=method)
    assert torch.equal(torch.cat(seen), LABELS)


def test_scores_follow_the_users_loss():
    """At targets equal to the outputs that loss is flat, so that next to nothing is lost; further away its gradient grows."""
    model = classifier()
    with torch.no_grad():
        first = model(IMAGES)[:, 0]
    met, near, far = (
        bs.search(model, [(IMAGES, first + off)], "weight_bytes=w4", candidates=CANDIDATES, task=Targeted()).scores.values
        for off in (0.0, 1.0, 2.0)
    )
    assert met.max() < 1e-9 * near.max()
    torch.testing.assert_close(torch.tensor(far), torch.tensor(4 * near), rtol=1e-4, atol=0.0)


def test_for_training_is_noted_whatever_the_method_and_changes_fisher_alone():
    model = classifier()
    for name in ("fisher", "kl", "uniform"):
        plain, trained = (
            bs.search(model, IMAGES, "weight_bytes=w4", candidates=CANDIDATES, method=name, for_training=said) for said in (False, True)
        )
        assert (plain.policy.provenance["for_training"], trained.policy.provenance["for_training"]) == (False, True)
        if plain.scores is not None:
            assert (plain.scores.values == trained.scores.values).all() == (name != "fisher")


def test_every_method_says_which_options_it_takes():
    takes = {name: sorted(kind.options) for name, kind in METHODS.items()}
    assert takes["fisher"] == ["for_training", "pick"]
    assert takes["differentiable"] == takes["seam"] == takes["asga"] == takes["trained-scores"] == ["folder", "pick"]
    assert takes["kl"] == takes["hawq"] == takes["local"] == takes["topological"] == ["pick"]
    assert takes["uniform"] == takes["random"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (
            ("--budget", "weight_bytes=0.7x", "--pin", "down*=6/8", "--keep-float", "block1.conv1"),
            {"budget": "weight_bytes=0.7x", "pins": {"down*": "6/8"}, "keep_float": ["block1.conv1"]},
        ),
        (
            ("--budget", "bitops=w4a4", "--budget", "weight_bytes=0.5x", "--candidates", "2,4,8", "--for-training", "--seed", 3),
            {"budget": ["bitops=w4a4", "weight_bytes=0.5x"], "widths": (2, 4, 8), "for_training": True, "seed": 3},
        ),
    ],
)
def test_the_command_line_finds_the_policy_that_python_finds(options, settings, tmp_path):
    from bitscape.cli.network import load_network
    from bitscape.searches.freedom import Pins

    settings = dict(settings)
    model = load_network("bitscape.models.digits:digits_net", None, "cpu", settings.get("seed", 0))
    digits = bs.Batches(dataset=bs.load_dataset("digits"), normalization=bs.Normalization((0.0,), (1.0,)))
    if pins := settings.pop("pins", None):
        settings["pinned"] = Pins(pins)
    if widths := settings.pop("widths", None):
        settings["candidates"] = [bs.LayerBits(weight, activation) for weight in widths for activation in widths]
    expected = bs.search(model, digits, settings.pop("budget"), count=32, **settings).policy
    command = ("search", "--model", "bitscape.models.digits:digits_net", "--data", "digits", "--images", 32, "--device", "cpu")
    shown = run_cli(*command, *options, "--out", tmp_path / "policy.json")
    assert shown.code == 0, shown.err
    policy = bs.Policy.load(tmp_path / "policy.json")
    assert policy.layers == expected.layers and policy.cost == expected.cost
    assert expected.provenance.items() <= policy.provenance.items()


class Overwriting(nn.Module):
    """Adds in place to what its second convolution's backward pass needs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.first(x).relu_()
        x += self.second(x)
        return x.mean((2, 3))


def test_a_network_that_breaks_its_backward_pass_is_told_so_in_one_line():
    model, images = Overwriting().eval(), torch.randn(8, 3, 4, 4)
    said = r"overwrites in place what its backward pass needs; write x = x \+ y for x \+= y"
    for method in ("fisher", "hawq"):
        with pytest.raises(bs.BitscapeError, match=said):
            bs.search(model, images, "mean_weight_bits=6", pinned={}, method=method)
    with pytest.raises(bs.BitscapeError, match=said):
        bs.train(model, (images, torch.zeros(8, dtype=torch.int64)), epochs=1)
    kept = bs.search(model, images, "mean_weight_bits=6", pinned={}, method="local")
    assert kept.policy.cost["mean_weight_bits"] <= 6


def test_layers_without_values_are_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with pytest.raises(bs.BitscapeError, match=r"0\.weight has no values yet.*call the network"):
        bs.search(model, torch.randn(2, 3, 4, 4), "4bit")


def test_the_gain_of_an_infeasible_budget_is_refused():
    with pytest.raises(bs.BitscapeError, match=r"no policy fits weight_bytes=10\.0 "):
        bs.gain(classifier(), IMAGES, "weight_bytes=10")


def test_an_infeasible_budget_names_layers_that_are_never_called():
    model = Overwriting().eval()
    model.spare = nn.Linear(100, 100)
    with pytest.raises(bs.BitscapeError, match=r"most of it in spare \(never called\).*or delete"):
        bs.search(model, torch.randn(2, 3, 4, 4), "mean_weight_bits=3", pinned={})
