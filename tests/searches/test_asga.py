import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.quant.layers import quantized_layers
from bitscape.searches.asga import Asga, Radius
from bitscape.searches.mixed_network import MixtureStep, mixed_network
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import proxy_task
from tests.searches.small import square
from tests.sharpness.small import batch, float_net, gradients, same, whole

pytestmark = pytest.mark.slow

TINY = {"rho": 1e-9, "rho_min": 1e-9}


def ready(dropout=0.0, **settings):
    """A step of Asga, and the network that it is for."""
    images, labels = batch(24)
    given = SearchProblem.of(
        model=float_net(dropout=dropout), samples=Samples.of(images, labels), budget="bitops=w4a4", candidates=square(2, 4, 8), pinned={}
    )
    task = proxy_task(given, "labels", batch_size=12, head_epochs=1, folder=None)
    network = mixed_network(given, task.model)
    network.model.train()
    return Asga(**settings).make_step(network, task), network


def run(step, network, images=12):
    torch.manual_seed(3)  # of dropout
    return step(network.model, whole(*batch(images)))


def plain(network):
    """The mixture's step on a copy: its record, its gradients and the copy."""
    twin = copy.deepcopy(network)
    return run(MixtureStep(mixed=twin), twin), gradients(twin.model), twin


def members_by_hand(network):
    """What the ball moves, with its gradient: quantized weights, norms and biases, all as leaves or retained tensors."""
    twin, seen = copy.deepcopy(network), {}
    twin.keep_budget()
    handles = []
    for name, layer in quantized_layers(twin.model).items():

        def keep(_module, _args, output, name=name):
            output.retain_grad()
            seen[f"{name}.weight"] = output

        handles.append(layer.weight_quantizer.register_forward_hook(keep))
    cross_entropy(twin.model(batch()[0]), batch()[1]).backward()
    found = {name: (tensor.detach(), tensor.grad) for name, tensor in seen.items()}
    for name, parameter in twin.model.named_parameters():
        if name.endswith(".bias") or name == "1.weight":
            found[name] = parameter.detach(), parameter.grad
    for handle in handles:
        handle.remove()
    return found


def length(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_without_alignment_a_tiny_radius_gives_the_mixtures_gradient(dropout):
    step, network = ready(alignment=0.0, dropout=dropout, **TINY, radius="fixed")
    expected, of_plain, _ = plain(network)
    record = run(step, network)
    assert torch.equal(record.loss, expected.loss) and torch.equal(record.sums, expected.sums)
    found = gradients(network.model)
    assert found.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(record.extras["cosine"], torch.tensor(1.0))
    torch.testing.assert_close(record.extras["gap"], torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alignment", [0.0, 0.05])
def test_the_second_pass_sees_exactly_the_moved_quantized_weights(alignment):
    step, network = ready(alignment=alignment, rho=0.1)
    expected = members_by_hand(network)
    norm = length(gradient for _, gradient in expected.values())
    seen = []
    for layer in (network.model[0], network.model[4]):
        inner = layer._conv_forward

        def noted(x, weight, bias, inner=inner):
            seen.append((weight.detach().clone(), bias.detach().clone()))
            return inner(x, weight, bias)

        layer._conv_forward = noted
    record = run(step, network)
    torch.testing.assert_close(float(record.extras["ascent_norm"]), norm, rtol=1e-4, atol=0)
    assert record.extras["rho"] == pytest.approx(0.1)
    assert len(seen) == 4
    for name, first, second in (("0", seen[0], seen[2]), ("4", seen[1], seen[3])):
        for part, before, after in zip(("weight", "bias"), first, second, strict=True):
            value, gradient = expected[f"{name}.{part}"]
            assert torch.equal(before, value)
            torch.testing.assert_close(after, value + (0.1 / norm - alignment) * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("perturb", ["quantized", "latent"])
@pytest.mark.parametrize("settings", [{}, {"alignment": 0.02}, {"radius": "fixed", "rho": 0.2}])
def test_the_gradient_is_the_mean_of_both_passes(perturb, settings):
    step, network = ready(perturb=perturb, dropout=0.3, **settings)
    alone, other = ready(perturb=perturb, dropout=0.3, descent="perturbed", **settings)
    expected, first, _ = plain(network)
    record, of_second = run(step, network), run(alone, other)
    second, found = gradients(other.model), gradients(network.model)
    assert not same(first, second)
    assert found.keys() == first.keys() == second.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-7)
    assert torch.equal(record.loss, expected.loss) and torch.equal(record.extras["gap"], of_second.extras["gap"])
    flat = [torch.cat([of[name].flatten() for name in sorted(of)]).double() for of in (first, second)]
    cosine = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert float(record.extras["cosine"]) == pytest.approx(cosine, abs=1e-5)


def test_descent_along_the_perturbed_gradient_is_sam():
    """Foret et al., Algorithm 1, by hand on the latent weights, norms and biases."""
    rho = 0.15
    step, network = ready(descent="perturbed", alignment=0.0, radius="fixed", rho=rho, perturb="latent")
    _, first, twin = plain(network)
    moved = [name for name in first if "quantizer" not in name]
    norm = length(first[name] for name in moved)
    twin.model.zero_grad()
    parameters = dict(twin.model.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in moved}
    with torch.no_grad():
        for name in moved:
            parameters[name].add_(first[name], alpha=rho / norm)
    value = cross_entropy(twin.model(batch()[0]), batch()[1])
    value.backward()
    record = run(step, network)
    for name, gradient in gradients(twin.model).items():
        torch.testing.assert_close(gradients(network.model)[name], gradient, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(record.loss + record.extras["gap"], value.detach())
    for name, before in saved.items():
        assert torch.equal(dict(network.model.named_parameters())[name], before)  # the move is undone, bit for bit


def test_norm_statistics_and_the_random_state_go_on_as_after_one_pass():
    step, network = ready(dropout=0.4, rho=0.2)
    _, _, twin = plain(network)
    following = torch.rand(3)
    before = {name: parameter.detach().clone() for name, parameter in network.model.named_parameters()}
    run(step, network)
    assert torch.equal(torch.rand(3), following)
    assert int(network.model[1].num_batches_tracked) == 1
    for (name, buffer), (_, other) in zip(network.model.named_buffers(), twin.model.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.model.named_parameters())


def test_logits_and_scales_are_not_moved():
    step, network = ready(rho=0.2)
    seen = []
    for mixture in (*network.weights, *network.inputs):
        mixture.register_forward_hook(lambda module, *_: seen.append((module.logits.detach().clone(), module.scale.detach().clone())))
    run(step, network)
    half = len(seen) // 2
    assert half == 6
    for (logits, scale), (again, other) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(logits, again) and torch.equal(scale, other)


class TestRadius:
    def test_it_starts_where_told_and_follows_the_running_mean_of_the_gap(self):
        radius = Radius(adaptive=True, start=0.05, low=0.01, high=0.2)
        assert radius.rho() == pytest.approx(0.05)
        gap = math.expm1(0.05)
        for seen in (0.1, 0.12, 0.02):
            radius.see(seen)
            gap = 0.9 * gap + 0.1 * seen
            assert radius.gap == pytest.approx(gap) and radius.rho() == pytest.approx(math.log(1 + gap))

    @pytest.mark.parametrize(("gap", "rho"), [(-3.0, 0.01), (0.0, 0.01), (5.0, 0.2), (math.expm1(0.1), 0.1)])
    def test_it_stays_within_its_limits_also_for_negative_gaps(self, gap, rho):
        radius = Radius(adaptive=True, start=0.05, low=0.01, high=0.2)
        radius.gap = gap
        assert radius.rho() == pytest.approx(rho)

    def test_a_fixed_one_stays(self):
        radius = Radius(adaptive=False, start=0.05, low=0.01, high=0.2)
        radius.see(100.0)
        assert radius.rho() == 0.05 and radius.gap > 9


class TestSteps:
    def test_the_radius_of_a_step_comes_from_the_gaps_before_it(self):
        step, network = ready(rho=0.05, rho_max=1.0)
        gap = math.expm1(0.05)
        for _ in range(4):
            record = run(step, network)
            network.model.zero_grad()
            assert float(record.extras["rho"]) == pytest.approx(min(max(math.log1p(max(gap, 0)), 0.01), 1.0), rel=1e-5)
            gap = 0.9 * gap + 0.1 * float(record.extras["gap"])
        assert gap != pytest.approx(math.expm1(0.05))

    def test_the_gap_goes_round_as_a_state_in_full_precision(self):
        (step, network), (other, _) = ready(), ready()
        run(step, network)
        other.load_state_dict(step.state_dict())
        assert other.radius.gap == step.radius.gap != math.expm1(0.05)

    def test_the_gap_is_the_rise_of_the_loss_at_the_moved_point(self):
        step, network = ready(rho=0.2, radius="fixed", alignment=0.0)
        losses = []

        def noted(logits, labels):
            losses.append(cross_entropy(logits, labels))
            return losses[-1]

        record = step(network.model, whole(*batch(), noted))
        assert len(losses) == 2 and torch.equal(record.loss, losses[0].detach())
        assert torch.equal(record.extras["gap"], (losses[1] - losses[0]).detach()) and record.extras["gap"] > 0

    def test_a_fall_of_the_loss_counts_as_a_negative_gap(self):
        step, network = ready()
        factors = iter((1.0, 0.2))
        record = step(network.model, whole(*batch(), lambda logits, labels: next(factors) * cross_entropy(logits, labels)))
        assert record.extras["gap"] < -0.1
        assert step.radius.gap == pytest.approx(0.9 * math.expm1(0.05) + 0.1 * float(record.extras["gap"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.3}, "rho = 0.3: it must lie between rho_min = 0.01 and rho_max = 0.2"),
        ({"rho_min": 0.0}, "rho = 0.05"),
        ({"rho_max": math.inf}, "rho_max = inf"),
        ({"alignment": -0.1}, "alignment = -0.1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(BitscapeError, match=message):
        Asga(**settings)


@pytest.mark.parametrize(
    "wrong", [{"radius": "adaptve"}, {"descent": "sum"}, {"perturb": "both"}, {"readout": "drop-two"}, {"task": "label"}], ids=str
)
def test_a_choice_that_is_none_is_told_with_the_allowed_ones(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(BitscapeError, match=f"{name} = '{value}': allowed are '"):
        Asga(**wrong)


def test_the_settings_reach_the_step():
    step, _ = ready(radius="fixed", rho=0.1, rho_min=0.02, rho_max=0.3, alignment=0.5, descent="perturbed", perturb="latent")
    assert step.radius == Radius(adaptive=False, start=0.1, low=0.02, high=0.3)
    assert (step.alignment, step.descent, step.ball.weights, step.ball.adaptive) == (0.5, "perturbed", "latent", False)
