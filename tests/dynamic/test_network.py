import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from bitscape.cost.policy_cost import policy_cost
from bitscape.dynamic.budget import begin_at, keep_bitops
from bitscape.dynamic.build import dynamic_network, unset_network
from bitscape.dynamic.decision import Decision
from bitscape.dynamic.layers import DynamicActivation
from bitscape.dynamic.network import FEATURES, DynamicBits, DynamicNetwork, Sampling, decide
from bitscape.dynamic.quality import image_features, layer_features
from bitscape.dynamic.widths import Widths
from bitscape.engine.spending import Spending
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import QuantConv2d, QuantLinear, quantized_layers, static_bits
from tests.dynamic.small import NAMES, dynamic, float_net, mixed_images, policy_of, set_heads, vary_heads, whole_widths
from tests.networks import resnet20

pytestmark = pytest.mark.slow

ALL = DynamicBits(static=())
WEIGHTS = DynamicBits(weights=True)
every_kind = pytest.mark.parametrize(
    "bits", [DynamicBits(), ALL, WEIGHTS, DynamicBits(low=3, high=5)], ids=["ends", "all", "weights", "3..5"]
)


@cache
def _built(bits: DynamicBits) -> DynamicNetwork:
    return dynamic(bits)


def fresh(bits: DynamicBits | None = None) -> DynamicNetwork:
    return copy.deepcopy(_built(bits or DynamicBits()))


def same(one: Decision, other: Decision) -> bool:
    return torch.equal(one.weight, other.weight) and torch.equal(one.activation, other.activation)


@contextmanager
def noted(network: DynamicNetwork) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Within the block every head adds its (features, middle, deviation)."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [head.register_forward_hook(lambda _, given, said: seen.append((given[0], *said))) for head in network.heads]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def used_widths(network: DynamicNetwork) -> Iterator[dict[str, Widths]]:
    """Within the block: name -> the widths that the layer's input was quantized at."""
    used: dict[str, Widths] = {}
    layers = quantized_layers(network.model)
    hooks = [
        layers[name].input_quantizer.register_forward_pre_hook(lambda quantizer, _, name=name: used.__setitem__(name, quantizer.widths))
        for name in network.names
    ]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


# In eval mode


@every_kind
def test_a_new_network_takes_the_highest_bits(bits: DynamicBits) -> None:
    network = fresh(bits)
    assert same(decide(network, mixed_images()), network.level(bits.high, 16))


@every_kind
def test_widths_are_whole_within_the_limits_and_repeatable(bits: DynamicBits) -> None:
    network, images = vary_heads(fresh(bits), slope=3.0), mixed_images(32)
    first = network(images)
    decision = network.decision.detach()
    columns = [list(network.cost.by_name).index(name) for name in network.names]
    dynamic_values = torch.cat([decision.activation[:, columns], *([decision.weight[:, columns]] if bits.weights else [])])
    assert torch.equal(dynamic_values, dynamic_values.round())
    assert dynamic_values.min() >= bits.low and dynamic_values.max() <= bits.high
    assert len(dynamic_values.unique()) > 2
    assert torch.equal(network(images), first) and same(network.decision, decision)


@every_kind
def test_an_image_does_not_see_the_others(bits: DynamicBits) -> None:
    network, images = vary_heads(fresh(bits)), mixed_images(12)
    together, logits = decide(network, images), network(images)
    assert len(torch.cat([together.weight, together.activation], 1).unique(dim=0)) > 4
    for at in (0, 5, 11):
        assert same(decide(network, images[at : at + 1]), together[slice(at, at + 1)])
        torch.testing.assert_close(network(images[at : at + 1])[0], logits[at], rtol=1e-4, atol=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert same(decide(network, images[order]), together[order])


def test_decisions_of_a_batch_are_the_mean_of_its_images() -> None:
    network, images = vary_heads(fresh()), mixed_images(12)
    network.decisions = "per_batch"
    with noted(network) as seen:
        network(images)
    found = network.decision.activation
    assert torch.equal(found, found[:1].expand(12, -1))
    for at, name in enumerate(network.names):
        column = list(network.cost.by_name).index(name)
        assert float(found[0, column]) == round(float(seen[at][1].detach().clamp(2, 8).mean()))
    assert bool((decide(network, images[:3]).activation[0] != found[0]).any())  # other images, another mean


def test_what_heads_see() -> None:
    network, images = vary_heads(fresh(), slope=3.0), mixed_images()
    inputs: dict[str, Tensor] = {}
    for name in network.names:
        network.model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0]))
    with noted(network) as seen:
        network(images)
    spent, decided = torch.zeros(16), dict(zip(network.cost.by_name, network.decision.activation.T, strict=True))
    for name, (features, _, _) in zip(network.names, seen, strict=True):
        assert features.shape == (16, len(FEATURES))
        expected = torch.cat([image_features(images), layer_features(inputs[name]), spent[:, None]], 1)
        torch.testing.assert_close(features, expected)
        macs = network.cost.by_name[name].macs / sum(layer.macs for layer in network.cost.layers)
        spent = spent + macs * decided[name] / 8
    assert float(spent.max() - spent.min()) > 0


def test_features_are_standardized_on_the_calibration_images() -> None:
    network = fresh()
    with noted(network) as seen:
        decide(network, mixed_images())
    for head, (features, _, _) in zip(network.heads, seen, strict=True):
        torch.testing.assert_close(head.center, features.mean(0))
        torch.testing.assert_close(head.spread[:3], features[:, :3].std(0, correction=0))


@every_kind
def test_what_is_static_is_not_in_the_state_and_moves_with_the_network(bits: DynamicBits) -> None:
    network = fresh(bits)
    assert not any("_rows" in name for name in network.state_dict())
    moved = network.to("meta").level(bits.high, 2)
    assert moved.weight.device.type == moved.activation.device.type == "meta"


# In training mode


def test_sampled_widths_are_continuous_within_the_limits_and_differ() -> None:
    network, images = fresh().train(), mixed_images(32)
    set_heads(network, middle=7.5, spread=0.5)
    torch.manual_seed(0)
    network(images)
    first = network.decision.activation[:, [1, 2]].detach()
    network(images)
    second = network.decision.activation[:, [1, 2]].detach()
    assert not torch.equal(first, second)
    assert float(first.min()) >= 2 and float(first.max()) == 8
    between = first[(first > 2) & (first < 8)]
    assert len(between) > 20 and bool((between != between.round()).all())


def test_samples_are_drawn_from_what_the_head_says() -> None:
    network = fresh().train()
    set_heads(network, middle=5.0, spread=-1.0)
    torch.manual_seed(0)
    with noted(network) as seen:
        network(mixed_images(8).repeat(250, 1, 1, 1))
    drawn = network.decision.activation[:, [1, 2]].detach()
    deviation = float(seen[0][2][0, 0].detach())
    assert float(drawn.mean()) == pytest.approx(5, abs=4 * deviation / math.sqrt(4000))
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.05)
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.1  # layers apart


@pytest.mark.parametrize("bits", [DynamicBits(), WEIGHTS], ids=["inputs", "weights too"])
@pytest.mark.parametrize("sampling", ["continuous", "whole"])
def test_log_density_is_that_of_the_normal_distribution(bits: DynamicBits, sampling: Sampling) -> None:
    network, images = fresh(bits).train(), mixed_images()
    vary_heads(network, slope=0.1)
    set_spread(network, -1.0)
    network.sampling = sampling
    torch.manual_seed(1)
    with noted(network) as seen:
        network(images)
    expected, columns = torch.zeros(16), [list(NAMES).index(name) for name in network.names]
    for (_, middle, deviation), at in zip(seen, columns, strict=True):
        drawn = [network.decision.activation[:, at], *([network.decision.weight[:, at]] if bits.weights else [])]
        beta = torch.stack(drawn, 1).detach()
        assert bool(((beta > 2) & (beta < 8)).all())  # not limited, so this is what was drawn
        expected = expected + (Normal(middle, deviation).log_prob(beta) + math.log(2 * math.pi) / 2).sum(1)
    torch.testing.assert_close(network.log_density, expected, rtol=1e-4, atol=1e-4)
    mine = torch.autograd.grad(network.log_density.sum(), list(network.heads.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), list(network.heads.parameters()))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def set_spread(network: DynamicNetwork, spread: float) -> None:
    with torch.no_grad():
        for head in network.heads:
            head.linear.bias[len(head.linear.bias) // 2 :] = spread


@pytest.mark.parametrize(("hardness", "least", "most"), [(0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 1.0, 1.0)])
def test_hardness_is_the_share_of_whole_widths(hardness: float, least: float, most: float) -> None:
    network = fresh().train()
    set_heads(network, middle=5.0, spread=1.0)
    network.hardness = hardness
    torch.manual_seed(0)
    network(mixed_images(200))
    drawn = network.decision.activation[:, [1, 2]]
    inside = drawn[(drawn > 2.5) & (drawn < 7.5)].detach()
    assert least <= float((inside == inside.round()).float().mean()) <= most
    slopes = torch.autograd.grad(drawn.sum(), [head.linear.bias for head in network.heads])
    assert all(float(slope[0]) > 100 for slope in slopes)  # rounded straight through


@pytest.mark.parametrize("bits", [DynamicBits(), WEIGHTS], ids=["inputs", "weights too"])
def test_the_loss_has_a_slope_in_every_decision(bits: DynamicBits) -> None:
    network = fresh(bits).train()
    set_heads(network, middle=3.0, spread=-1.0)
    torch.manual_seed(0)
    network(mixed_images()).square().sum().backward()
    for head in network.heads:
        assert bool((head.linear.bias.grad != 0).all())


def test_without_the_path_widths_are_whole_and_only_the_cost_has_a_slope() -> None:
    network, images = fresh(WEIGHTS).train(), mixed_images()
    set_heads(network, middle=4.0, spread=0.0)
    network.sampling = "whole"
    torch.manual_seed(0)
    with used_widths(network) as used:
        logits = network(images)
    decided = dict(zip(network.cost.by_name, network.decision.activation.T, strict=True))
    for name, widths in used.items():
        assert widths.share is None and torch.equal(widths.below, widths.below.round())
        assert torch.equal(widths.below, decided[name].detach().round())
    heads = list(network.heads.parameters())
    assert all(slope is None for slope in torch.autograd.grad(logits.sum(), heads, retain_graph=True, allow_unused=True))
    slopes = torch.autograd.grad(network.decision.bitops(network.cost).sum(), [head.linear.bias for head in network.heads])
    assert all(bool((slope[:2] > 0).all()) for slope in slopes)


@pytest.mark.parametrize("bits", [DynamicBits(), DynamicBits(weights=True, static=())], ids=["ends", "all with weights"])
def test_mixed_precision_leaves_decisions_in_float32(bits: DynamicBits) -> None:
    network = fresh(bits).train()
    set_heads(network, middle=6.3, spread=-1.0)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(mixed_images())
    assert network.decision.activation.dtype == network.decision.weight.dtype == network.log_density.dtype == torch.float32
    network.decision.bitops(network.cost).mean().backward()
    drawn = network.decision.activation[:, 1].detach()
    assert bool((drawn != drawn.bfloat16().float()).any())  # bfloat16 has 32 steps between 4 and 8


# Given decisions, and static networks


@every_kind
def test_given_widths_are_taken(bits: DynamicBits) -> None:
    network, images = vary_heads(fresh(bits)), mixed_images()
    free = network(images)
    decision = whole_widths(network, 16)
    for mode in (network.eval, network.train):
        mode()
        with network.using(decision), used_widths(network) as used:
            network(images)
            assert same(network.decision, decision)
        for name, widths in used.items():
            assert torch.equal(widths.value, decision.activation[:, list(NAMES).index(name)])
    network.load_state_dict(fresh(bits).state_dict())
    vary_heads(network.eval())
    torch.testing.assert_close(network(images), free)


def test_an_error_ends_the_given_decision() -> None:
    network, images = vary_heads(fresh()), mixed_images()
    network(images)
    free = network.decision
    with pytest.raises(BitscapeError, match=r"3.* for a batch of 16"), network.using(whole_widths(network, 3)):
        network(images)
    network(images)
    assert same(network.decision, free)


@every_kind
def test_static_layers_keep_the_bits_of_the_policy(bits: DynamicBits) -> None:
    network, policy = vary_heads(fresh(bits)), policy_of(float_net())
    for decision in (decide(network, mixed_images()), network.level(bits.low, 3), network.even(3)):
        for at, name in enumerate(NAMES):
            is_static = name not in network.names
            if is_static or not bits.weights:
                assert bool((decision.weight[:, at] == policy.layers[name].weight).all())
            if is_static:
                assert bool((decision.activation[:, at] == policy.layers[name].activation).all())
    assert network.names == (NAMES if bits.static == () else NAMES[1:-1])


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_one_width_for_all_is_the_ordinary_quantized_network(bits: int) -> None:
    net, images = float_net(), mixed_images()
    policy = policy_of(net)
    ordinary = Policy({**policy.layers, **{name: LayerBits(4, bits) for name in NAMES[1:-1]}})
    expected = calibrate(with_quantizers(net, ordinary), images).eval()(images)
    network = fresh()
    with network.using(network.level(bits, 16)):
        assert torch.equal(network(images), expected)
    assert network.policy(network.level(bits, 1)).layers == ordinary.layers


@every_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_the_static_network_of_a_policy_is_the_dynamic_one_at_it(bits: DynamicBits, seed: int) -> None:
    network, images = vary_heads(fresh(bits)), mixed_images()
    network.train()
    network(images)  # leaves a graph behind
    network.eval()
    decision = whole_widths(network, 1, seed)
    policy = network.policy(decision)
    made = network.static(policy)
    with network.using(Decision(decision.weight.expand(16, -1), decision.activation.expand(16, -1))):
        expected = network(images)
    assert torch.equal(made(images), expected)
    layers = quantized_layers(made)
    assert {name: static_bits(layer) for name, layer in layers.items()} == policy.layers
    assert {type(layer) for layer in layers.values()} == {QuantConv2d, QuantLinear}
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    assert policy_cost(network.cost, policy)["bitops"] == float(decision.bitops(network.cost))


def test_a_static_network_leaves_the_dynamic_one_as_it_was() -> None:
    network, images = vary_heads(fresh()), mixed_images()
    before, state = network(images), copy.deepcopy(network.state_dict())
    made = network.static(network.policy(network.level(3, 1)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(network(images), before)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())


# Copies and state


def test_a_copy_after_training_decides_for_itself() -> None:
    network, images = vary_heads(fresh()).train(), mixed_images()
    network(images)
    before = network.decision
    twin = copy.deepcopy(network).eval()
    set_heads(twin, middle=2.0)
    twin(images)
    assert same(twin.decision, twin.level(2, 16))
    assert network.decision is before and before.activation.requires_grad
    network.eval()(images)
    assert not same(network.decision, twin.decision)


@every_kind
def test_the_state_goes_into_an_unset_network(bits: DynamicBits) -> None:
    network, images = vary_heads(fresh(bits)), mixed_images()
    network.shift.fill_(-0.5)
    other = unset_network(float_net(seed=1), policy_of(float_net()), (3, 8, 8), bits).eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images), network(images)) and same(other.decision, network.decision)
    assert other.cost == network.cost and other.names == network.names


def test_the_float_network_is_left_alone() -> None:
    net = float_net()
    before = copy.deepcopy(net.state_dict())
    dynamic(net=net)
    assert not quantized_layers(net)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


# Costs


def test_spent_counts_the_decision_too() -> None:
    network = vary_heads(fresh())
    assert isinstance(network, Spending)  # asked of every network, before and after a batch
    network(mixed_images())
    for at in (0, 9):
        expected = policy_cost(network.cost, network.policy(network.decision[slice(at, at + 1)]))
        assert float(network.spent.bitops[at]) == pytest.approx(expected["bitops"] + network.decision_bitops, rel=1e-6)
        assert float(network.spent.bits[at]) == pytest.approx(expected["mean_activation_bits"], rel=1e-6)


def test_the_cost_of_decisions_by_hand() -> None:
    # 9 passes over 3 * 8 * 8 values; of both dynamic layers 16 positions of 8 channels, for mean and deviation; 6 features to 2 numbers.
    assert fresh().decision_bitops == (9 * 192 + 2 * 2 * 8 * 16 + 2 * 12) * 64


def test_decisions_cost_little_in_a_usual_network() -> None:
    net = resnet20(10)
    network = unset_network(net, policy_of(net), (3, 32, 32))
    assert len(network.names) == 20
    assert 0 < network.decision_bitops < 0.01 * float(network.level(4, 1).bitops(network.cost))


@pytest.mark.parametrize("bits", [DynamicBits(), WEIGHTS], ids=["inputs", "weights too"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_budget_is_kept_and_used(bits: DynamicBits, share: float) -> None:
    network, images = vary_heads(fresh(bits)), mixed_images(64)
    least, most = (float(network.level(width, 1).bitops(network.cost)) + network.decision_bitops for width in (2, 8))
    budget = least + share * (most - least)
    reached = keep_bitops(network, images, budget)
    network(images)
    assert reached == pytest.approx(float(network.spent.bitops.mean()), rel=1e-6)
    assert budget - 0.05 * (most - least) < reached <= budget
    more = float(network.shift) + 0.02
    network.shift.fill_(more)
    network(images)
    assert float(network.spent.bitops.mean()) > budget or more > 16


def test_a_wide_budget_is_the_highest_bits() -> None:
    network = vary_heads(fresh())
    most = float(network.level(8, 1).bitops(network.cost)) + network.decision_bitops
    assert keep_bitops(network, mixed_images(), 2 * most) == pytest.approx(most)


def test_an_impossible_budget_is_explained_and_changes_nothing() -> None:
    network = vary_heads(fresh())
    least = float(network.level(2, 1).bitops(network.cost)) + network.decision_bitops
    network.shift.fill_(-0.25)
    with pytest.raises(BitscapeError, match=r"bitops = .*at the least widths"):
        keep_bitops(network, mixed_images(), 0.99 * least)
    assert float(network.shift) == -0.25


# Drawing, deciding


@pytest.mark.parametrize("bits", [DynamicBits(low=3, high=5), DynamicBits(low=3, high=5, weights=True)], ids=["inputs", "weights too"])
def test_even_draws_every_width_alike(bits: DynamicBits) -> None:
    torch.manual_seed(0)
    drawn = fresh(bits).even(3000)
    columns = [drawn.activation[:, 1], drawn.activation[:, 2], *([drawn.weight[:, 1], drawn.weight[:, 2]] if bits.weights else [])]
    for column in columns:
        counts = column.int().bincount(minlength=6)
        assert int(counts[:3].sum()) == 0 and bool((counts[3:] > 900).all())
    pairs = torch.corrcoef(torch.stack(columns))
    assert float((pairs - torch.eye(len(columns))).abs().max()) < 0.1


def test_deciding_takes_all_images_and_leaves_modes() -> None:
    network, images = vary_heads(fresh()), mixed_images(150)
    network.train()
    network.model[1].eval()
    statistics = network.model[4].running_mean.clone()
    found = decide(network, images)
    assert network.training and network.model[4].training and not network.model[1].training
    assert torch.equal(network.model[4].running_mean, statistics)
    network.eval()
    network(images)
    assert len(found) == 150 and same(found, network.decision)


# A network that is unlike others


class Shared(nn.Module):
    """One convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.body(self.stem(x).relu()).relu())
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("bits", [DynamicBits(), WEIGHTS], ids=["inputs", "weights too"])
def test_a_layer_that_runs_twice_takes_the_same_bits(bits: DynamicBits) -> None:
    images = mixed_images()
    network = vary_heads(dynamic(bits, net=Shared()), slope=4.0)
    with torch.no_grad():
        network.heads[0].linear.weight[:, 3:5] = 4.0  # so that the second run's input would decide otherwise
    logits = network(images)
    with network.using(network.decision.detach()):
        assert torch.equal(network(images), logits)


class Skipping(nn.Module):
    """Leaves its middle layer out when told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.other = nn.Conv2d(4, 4, 1)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.stem(x).relu()).relu()
        x = x if self.skip else self.body(x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_layer_that_does_not_run_is_explained_and_forgotten() -> None:
    network, images = vary_heads(dynamic(net=Skipping())), mixed_images()
    logits = network(images)
    network.model.skip = True
    with pytest.raises(BitscapeError, match=r"layers body did not run.*`static`"):
        network(images)
    network.model.skip = False
    assert torch.equal(network(images), logits)


def test_the_inner_network_alone_is_explained() -> None:
    network = fresh()
    with pytest.raises(BitscapeError, match="DynamicNetwork"):
        network.model(mixed_images())


def test_widths_do_not_outlive_their_batch() -> None:
    network = fresh(WEIGHTS)
    network(mixed_images())
    for name in network.names:
        layer = quantized_layers(network.model)[name]
        assert isinstance(layer.input_quantizer, DynamicActivation) and layer.input_quantizer.widths is None
        assert layer.weight_quantizer.widths is None


# Errors


@pytest.mark.parametrize(("low", "high"), [(0, 4), (4, 4), (5, 4), (2, 9)])
def test_impossible_limits_are_explained(low: int, high: int) -> None:
    with pytest.raises(BitscapeError, match=f"low = {low}, high = {high}: give widths from 1 to 8"):
        DynamicBits(low=low, high=high)


@pytest.mark.parametrize(
    ("static", "text"),
    [(("0", "7"), "static: 7 is no layer that runs; layers are 0, 3, 6, 11"), (NAMES, "every layer is static")],
)
def test_wrong_static_layers_are_explained(static: tuple[str, ...], text: str) -> None:
    net = float_net()
    makers: list[Callable[[], DynamicNetwork]] = [
        lambda: dynamic_network(net, policy_of(net), mixed_images(), DynamicBits(static=static)),
        lambda: unset_network(net, policy_of(net), (3, 8, 8), DynamicBits(static=static)),
    ]
    for make in makers:
        with pytest.raises(BitscapeError, match=text):
            make()


@pytest.mark.parametrize(
    ("net", "shape", "text"),
    [
        (nn.Sequential(*(nn.Conv1d(4, 4, 3) for _ in range(3)), nn.Flatten()), (4, 16), r"\(4, 16\), to the Conv1d layer 0;"),
        (nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))), (5,), r"\(5,\), to the Linear layer 0;"),
    ],
)
def test_inputs_that_are_no_images_are_explained(net: nn.Module, shape: tuple[int, ...], text: str) -> None:
    layers = {name: LayerBits(8, 8) for name, layer in net.named_modules() if isinstance(layer, nn.Conv1d | nn.Linear)}
    for make in (
        lambda: dynamic_network(net, Policy(layers), torch.randn(4, *shape)),
        lambda: unset_network(net, Policy(layers), shape),
    ):
        with pytest.raises(BitscapeError, match=text + r".*images \(n, c, h, w\): give a network that takes those, or quantize"):
            make()


def test_other_limits_than_the_state_has_are_refused() -> None:
    other = unset_network(float_net(), policy_of(float_net()), (3, 8, 8), DynamicBits(low=3))
    with pytest.raises(RuntimeError, match="of_width"):
        other.load_state_dict(fresh().state_dict())


@pytest.mark.parametrize("weights", [False, True])
def test_decisions_begin_at_the_width_that_costs_the_budget(weights: bool) -> None:
    network = dynamic(DynamicBits(low=2, high=6, weights=weights))
    bitops = float(network.level(4, 1).bitops(network.cost)) + network.decision_bitops
    assert begin_at(network, bitops) == pytest.approx(4, abs=0.01)
    middles = [head.linear.bias[: 1 + weights].tolist() for head in network.heads]
    assert all(width == pytest.approx(4, abs=0.01) for each in middles for width in each)
    assert begin_at(network, 1.0) == 2 and begin_at(network, 1e12) == pytest.approx(6, abs=0.01)


def test_the_budget_of_every_image_holds_for_the_dearest() -> None:
    network, images = vary_heads(fresh()), mixed_images(24)
    costs = decide(network, images).bitops(network.cost) + network.decision_bitops
    middle = float((costs.min() + costs.max()) / 2)
    largest = keep_bitops(network, images, middle, budget_of="image")
    assert largest == pytest.approx(float((decide(network, images).bitops(network.cost) + network.decision_bitops).max()))
    assert largest <= middle


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda made: made.activation[1].fill_(3.4), r"decision.activation: .* bits for layer .*, image 1"),
        (lambda made: made.activation[:, 1].fill_(9), r"decision.activation: 9.0 bits .*a whole width in 2\.\."),
        (lambda made: made.weight[0, 1].add_(1), r"decision.weight: .*it is static"),
    ],
)
def test_widths_that_cannot_be_taken_are_explained(change: Callable[[Decision], object], text: str) -> None:
    network = fresh()
    level = network.level(3, 2)
    made = Decision(level.weight.clone(), level.activation.clone())
    change(made)
    with pytest.raises(BitscapeError, match=text), network.using(made):
        pass


def test_a_static_network_of_other_weight_bits_or_unknown_widths_is_refused() -> None:
    network = fresh()
    policy = network.policy(network.level(3, 1))
    name, bits = network.names[0], policy.layers[network.names[0]]
    for wrong, text in (
        (LayerBits(bits.weight + 1, 3), f"policy: {bits.weight + 1} bits for the weight of {name}, which is static at {bits.weight}"),
        (LayerBits(bits.weight, 1), "1 bits: this layer has scales for 2 to"),
    ):
        with pytest.raises(BitscapeError, match=text):
            network.static(Policy({**policy.layers, name: wrong}))
