import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitscape.dynamic.build import dynamic_network
from bitscape.dynamic.dqmq import Dqmq, DqmqSgd
from bitscape.dynamic.network import DynamicBits, DynamicNetwork
from bitscape.engine import Batch, Sgd, train
from bitscape.engine.step import CrossEntropy, StepRecord
from bitscape.errors import BitscapeError
from bitscape.quant.layers import quantized_layers
from tests.dynamic.small import dynamic, float_net, mixed_images, policy_of, set_heads, vary_heads
from tests.engine.tiny import same_state, tiny_batches

pytestmark = pytest.mark.slow

IMAGES, LABELS = mixed_images(16), torch.arange(16) % 4
SCHEDULE = {"warm_up": 0.1, "ramp": 0.2, "hard_from": 0.6, "hard_until": 1.0}
AMPLE = 1e12
"""BitOps that nothing reaches."""


class Nothing:
    """A loss that is 0 with a slope of 0: leaves the other terms of the objective."""

    def for_batch(self, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda logits, labels: 0 * logits.sum()


@cache
def _built(norm: bool) -> DynamicNetwork:
    return dynamic(net=float_net(norm=norm)).train()


def fresh(*, middle: float | None = 4.5, spread: float = -1.0, norm: bool = False) -> DynamicNetwork:
    network = copy.deepcopy(_built(norm))
    if middle is not None:
        set_heads(network, middle=middle, spread=spread)
    return network


def run(network: nn.Module, *, done: float = 0.5, loss: object = None, parts: int = 1, seed: int = 0, **settings: object) -> StepRecord:
    given = {"hardening_weight": 0.0, **SCHEDULE, **settings}
    step = Dqmq(**given).build()
    torch.manual_seed(seed)
    return step(network, Batch.of(IMAGES, LABELS, loss or CrossEntropy(), parts, done))


def head_slopes(network: DynamicNetwork) -> Tensor:
    """(heads,): the gradient of what each says whatever the image."""
    return torch.stack([head.linear.bias.grad[0] for head in network.heads])


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled widths are the middle ones."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


def level_cost(network: DynamicNetwork, bits: float) -> float:
    """BitOps of an image at one width for all dynamic inputs, the decision included."""
    below, above = (float(network.level(width, 1).bitops(network.cost)) for width in (int(bits), int(bits) + 1))
    return below + (bits - int(bits)) * (above - below) + network.decision_bitops


# The objective


@pytest.mark.parametrize("norm", [False, True])
def test_one_pass_reaches_heads_weights_and_scales(norm: bool) -> None:
    network = fresh(norm=norm)
    run(network, bitops=AMPLE)
    assert bool((head_slopes(network) != 0).all())
    for name, layer in quantized_layers(network.model).items():
        assert float(layer.weight.grad.abs().max()) > 0
        assert float(layer.weight_quantizer.scale.grad.abs().max()) > 0
        if name in network.names:
            used = [layer.input_quantizer.at(bits) for bits in (4, 5)]
            assert all(float(quantizer.scale.grad) != 0 for quantizer in used)
        else:
            assert float(layer.input_quantizer.scale.grad) != 0


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("done", "weight"), [(0.1, 0.0), (0.2, 0.5), (0.3, 1.0), (0.55, 1.0)])
def test_the_objective_by_hand(done: float, weight: float) -> None:
    network = vary_heads(fresh(), slope=0.3)
    twin, budget = copy.deepcopy(network), 0.7 * level_cost(network, 5)
    record = run(network, done=done, bitops=budget, cost_weight=3.0)

    logits = twin(IMAGES)
    used = twin.decision.bitops(twin.cost) + twin.decision_bitops
    excess = used.mean() / budget - 1
    assert float(excess.detach()) > 0
    loss = cross_entropy(logits, LABELS)
    (loss + weight * 3.0 * excess).backward()
    for (name, one), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)

    assert float(record.loss) == pytest.approx(float(loss.detach())) and not record.loss.requires_grad
    assert int(record.sums[0]) == int((logits.argmax(1) == LABELS).sum())
    expected = {"bits": float(twin.spent.bits.mean()), "bitops": float(twin.spent.bitops.mean()), "excess": float(excess.detach())}
    assert {name: float(value) for name, value in record.extras.items()} == pytest.approx(expected, rel=1e-5)
    assert not any(value.requires_grad for value in record.extras.values())


def test_above_the_budget_the_cost_pushes_down_by_the_share_of_each_layer() -> None:
    network = fresh(middle=6.0, spread=-20.0)
    budget = level_cost(network, 5)
    record = run(network, loss=Nothing(), bitops=budget, cost_weight=2.0)
    macs = torch.tensor([network.cost.by_name[name].macs for name in network.names])
    torch.testing.assert_close(head_slopes(network), 2.0 * 4 * macs / budget)  # weights of 4 bits
    assert float(record.extras["excess"]) == pytest.approx(level_cost(network, 6) / budget - 1, rel=0.1)


def test_below_the_budget_the_cost_has_no_slope() -> None:
    network = fresh(middle=4.0, spread=-20.0)
    record = run(network, loss=Nothing(), bitops=level_cost(network, 5), cost_weight=2.0)
    assert float(record.extras["excess"]) == 0
    assert all(not head.linear.bias.grad.any() and not head.linear.weight.grad.any() for head in network.heads)


@pytest.mark.usefixtures("quiet")
def test_the_decision_itself_counts_in_the_budget() -> None:
    network = fresh(middle=5.0)
    budget = level_cost(network, 5) - 0.5 * network.decision_bitops
    record = run(network, bitops=budget)
    assert float(record.extras["excess"]) == pytest.approx(0.5 * network.decision_bitops / budget, rel=1e-4)


@pytest.mark.usefixtures("quiet")
def test_cheap_images_pay_for_others_unless_each_is_held_to_the_budget() -> None:
    network = vary_heads(fresh(), slope=0.5)
    network(IMAGES)
    budget = 1.01 * float(network.spent.bitops.mean())
    above = (network.spent.bitops / budget - 1).clamp(min=0)
    assert 2 < int((above > 0).sum()) < 14
    whole = run(network, loss=Nothing(), bitops=budget)
    assert float(whole.extras["excess"]) == 0 and not head_slopes(network).any()
    network.zero_grad()
    each = run(network, loss=Nothing(), bitops=budget, budget_of="image")
    assert float(each.extras["excess"]) == pytest.approx(float(above.mean()), rel=1e-4)
    assert bool((head_slopes(network) > 0).all())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("done", [0.55, 1.0], ids=["continuous", "rounded"])
@pytest.mark.parametrize(("middle", "sign"), [(5.7, -1), (5.3, 1), (2.2, 1), (7.9, -1)])
def test_hardening_draws_widths_to_the_nearest_whole_number(middle: float, sign: int, done: float) -> None:
    network = fresh(middle=middle)
    run(network, done=done, loss=Nothing(), bitops=AMPLE, hardening_weight=1.0)
    assert bool((sign * head_slopes(network) > 0).all())


@pytest.mark.usefixtures("quiet")
def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    one, other = (vary_heads(fresh(), slope=0.3) for _ in range(2))
    budget = 0.5 * level_cost(one, 5)  # all parts are above it
    settings = {"bitops": budget, "hardening_weight": 0.1}
    whole, parted = run(one, **settings), run(other, parts=3, **settings)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(whole.loss, parted.loss)
    assert torch.equal(whole.sums, parted.sums)
    for name, value in whole.extras.items():
        torch.testing.assert_close(value, parted.extras[name])


# The course of a run


def test_the_warm_up_draws_whole_widths_evenly_and_leaves_the_heads() -> None:
    network = fresh(middle=3.0)
    counts = torch.zeros(9, dtype=torch.long)
    for seed in range(12):
        record = run(network, done=0.05, seed=seed, bitops=1.0)
        drawn = network.decision.activation[:, 1:3]
        torch.manual_seed(seed)
        assert torch.equal(network.decision.activation, network.even(16).activation)
        counts += drawn.flatten().int().bincount(minlength=9)
        assert float(record.extras["bits"]) == pytest.approx(float(network.spent.bits.mean()))
    assert int(counts[:2].sum()) == 0 and bool((counts[2:] > 30).all())  # 55 expected
    assert all(parameter.grad is None for parameter in network.heads.parameters())
    layer = quantized_layers(network.model)[network.names[0]]
    assert all(float(layer.input_quantizer.at(bits).scale.grad) != 0 for bits in range(2, 9))
    run(network, done=0.1, bitops=1.0)
    assert all(parameter.grad is not None for parameter in network.heads.parameters())


@pytest.mark.parametrize(("done", "hardness"), [(0.0, 0.0), (0.6, 0.0), (0.7, 0.25), (0.8, 0.5), (1.0, 1.0)])
def test_widths_are_rounded_more_and_more_until_all_are(done: float, hardness: float) -> None:
    network = fresh()
    run(network, done=done, bitops=AMPLE)
    assert network.hardness == pytest.approx(hardness)
    if hardness == 1:
        assert torch.equal(network.decision.activation, network.decision.activation.round())
        assert bool((head_slopes(network) != 0).all())


def test_norms_see_a_batch_once() -> None:
    for estimator in ("pathwise", "both", "score"):
        network = fresh(norm=True)
        run(network, bitops=AMPLE, estimator=estimator)
        assert [int(m.num_batches_tracked) for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [1, 1, 1]


# The score function


def losses_at(network: DynamicNetwork) -> Tensor:
    """(n,), at the nearest whole widths to the last decision."""
    twin = copy.deepcopy(network)
    with torch.no_grad(), twin.using(network.decision.detach().rounded()):
        return cross_entropy(twin(IMAGES), LABELS, reduction="none")


def score_slopes(network: DynamicNetwork) -> Tensor:
    """(heads,), of the mean over images of standardized loss * log density, over the number of heads; widths are inside the limits."""
    losses = losses_at(network)
    advantage = (losses - losses.mean()) / losses.std()
    deviation = float(network.heads[0](torch.zeros(1, 6))[1].detach())
    drawn = network.decision.activation[:, 1:3].detach()
    assert bool(((drawn > 2) & (drawn < 8)).all())
    return (advantage[:, None] * (drawn - 4.5) / deviation**2).mean(0) / len(network.heads)


def test_the_score_term_by_hand() -> None:
    network = fresh()
    run(network, bitops=AMPLE, estimator="score", score_weight=0.7)
    # 4 %: the deviation of 16 losses may be taken with or without the correction.
    torch.testing.assert_close(head_slopes(network), 0.7 * score_slopes(network), rtol=0.04, atol=1e-5)
    assert bool((network.model[3].weight.grad != 0).any())  # weights learn from the loss itself


def test_both_estimators_are_the_sum_of_each() -> None:
    path, both = fresh(), fresh()
    run(path, bitops=AMPLE)
    decision = path.decision.detach()
    run(both, bitops=AMPLE, estimator="both", score_weight=0.7)
    torch.testing.assert_close(head_slopes(both) - head_slopes(path), 0.7 * score_slopes(path), rtol=0.04, atol=1e-5)
    assert torch.equal(path.model[3].weight.grad, both.model[3].weight.grad)
    assert torch.equal(both.decision.activation.round(), decision.activation.round())


def test_the_score_function_finds_that_a_sure_network_needs_bits() -> None:
    # Labels are what the network says at high bits, so the loss falls with bits, and descent must raise them; by either estimator.
    network = fresh(middle=None)
    with torch.no_grad():
        network.model[11].weight.mul_(40)
        images = mixed_images(400)
        with network.using(network.level(8, 400)):
            labels = network(images).argmax(1)
    slopes = {}
    for estimator in ("score", "pathwise"):
        network.zero_grad()
        set_heads(network, middle=2.6, spread=-0.5)
        settings = Dqmq(bitops=AMPLE, estimator=estimator, hardening_weight=0.0, **SCHEDULE)
        for seed in range(8):  # gradients add up: one draw of the score estimator may have either sign
            torch.manual_seed(seed)
            settings.build()(network, Batch.of(images, labels, CrossEntropy(), 1, 0.5))
        slopes[estimator] = head_slopes(network)
    assert bool((slopes["score"] < 0).all()) and bool((slopes["pathwise"] < 0).all())


@pytest.mark.parametrize("estimator", ["pathwise", "both", "score"])
def test_a_single_image_gives_a_finite_gradient(estimator: str) -> None:
    # The last batch of an epoch may hold one; standardized within it, a loss says nothing.
    network = fresh()
    torch.manual_seed(0)
    step = Dqmq(bitops=AMPLE, estimator=estimator, **SCHEDULE).build()
    step(network, Batch.of(IMAGES[:1], LABELS[:1], CrossEntropy(), 1, 0.5))
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


# Settings


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"bitops": 0.0}, "bitops = 0.0: .* above 0"),
        ({"bitops": float("inf")}, "bitops = inf"),
        ({"bitops": float("nan")}, "bitops = nan"),
        ({"budget_of": "epoch"}, "budget_of = 'epoch': allowed are 'batch', 'image'"),
        ({"estimator": "reinforce"}, "estimator = 'reinforce': allowed are 'pathwise', 'both', 'score'"),
        ({"cost_weight": -1.0}, "'cost_weight': -1.0.* at least 0"),
        ({"hardening_weight": float("inf")}, "'hardening_weight': inf"),
        ({"score_weight": -0.1}, "'score_weight': -0.1"),
        ({"warm_up": -0.1}, "'warm_up': -0.1"),
        ({"ramp": 1.5}, "'ramp': 1.5"),
        ({"warm_up": 0.6, "ramp": 0.5}, "warm_up \\+ ramp must not exceed 1"),
        ({"hard_from": 0.9, "hard_until": 0.8}, "nor hard_from hard_until"),
    ],
)
def test_wrong_settings_are_explained(wrong: Mapping[str, object], text: str) -> None:
    with pytest.raises(BitscapeError, match=text):
        Dqmq(**{"bitops": 1e6, **wrong})


def test_other_networks_are_refused() -> None:
    net = float_net()
    with pytest.raises(BitscapeError, match=r"model is a Sequential; .*dynamic_network"):
        run(net, bitops=1e6)
    with pytest.raises(BitscapeError, match="model is a Sequential"):
        DqmqSgd().build(net)


def test_heads_have_a_rate_of_their_own_and_no_decay() -> None:
    network = fresh()
    optimizer = DqmqSgd(sgd=Sgd(lr=0.03, weight_decay=0.2, quantizer_lr=0.001, momentum=0.5), head_lr=0.7).build(network)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"weights": 0.03, "vectors": 0.03, "quantizers": 0.001, "heads": 0.7}
    assert groups["heads"]["weight_decay"] == 0 and groups["weights"]["weight_decay"] == 0.2 and groups["heads"]["momentum"] == 0.5
    assert {id(p) for p in groups["heads"]["params"]} == {id(p) for p in network.heads.parameters()}
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(network.parameters()))


# With the loop


def small_dynamic() -> DynamicNetwork:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(16, 3)
    )
    return dynamic_network(net, policy_of(net), tiny_batches().dataset.images, DynamicBits(static=()))


def trained(network: DynamicNetwork, *, epochs: int = 2, **options: object) -> tuple[Mapping[str, float], ...]:
    settings = Dqmq(bitops=level_cost(network, 5), cost_weight=4.0, estimator="both")
    optimizer = DqmqSgd(sgd=Sgd(lr=0.02), head_lr=1.0)
    records = train(network, tiny_batches(), step=settings, optimizer=optimizer, epochs=epochs, **options).records
    return tuple({name: value for name, value in record.items() if name != "train_s"} for record in records)


def test_a_run_comes_down_to_its_budget() -> None:
    network = small_dynamic()
    records = trained(network, epochs=8)
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["excess"] < 0.1 < max(record["excess"] for record in records)
    network.eval()(tiny_batches().dataset.images)
    assert float(network.spent.bitops.mean()) < level_cost(network, 6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = small_dynamic(), small_dynamic()
    expected = trained(whole)

    def stop(epoch: int) -> Mapping[str, float]:
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        trained(broken, folder=tmp_path, after_epoch=stop)
    resumed = small_dynamic()
    assert trained(resumed, folder=tmp_path) == expected
    assert same_state(resumed, whole)


@pytest.mark.parametrize(("hard_until", "expected"), [(0.5, [0.0, 1.0, 1.0]), (0.9, [0.0, 0.5, 1.0])])
def test_hardness_rises_from_its_start_to_its_end(hard_until: float, expected: list[float]) -> None:
    network = dynamic()
    step = Dqmq(bitops=AMPLE, warm_up=0.0, hard_from=0.5, hard_until=hard_until).build()
    for progress, hardness in zip((0.4, 0.7, 0.95), expected, strict=True):
        step(network, Batch.of(IMAGES, LABELS, CrossEntropy(), 1, progress))
        assert network.hardness == pytest.approx(hardness)
