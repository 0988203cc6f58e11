import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitscape.engine import Batch
from bitscape.engine.forward import loop_forward
from bitscape.engine.step import CrossEntropy
from bitscape.errors import BitscapeError
from bitscape.steps import Sam, Saq, SharpSettings
from tests.engine.tiny import same_state
from tests.sharpness.small import batch, float_net, gradients, quantized, same, small_net, whole

SETTINGS = [Sam(rho=0.03), Saq(case=1, rho=0.03), Saq(case=2, rho=0.03), Saq(rho=0.03), Saq(rho=0.03, descent="sum")]
SETTINGS += [Saq(rho=0.1, relative=False, adaptive=True, norms=False)]
IDS = ["sam", "case 1", "case 2", "case 3", "sum", "asam"]
EVERY = pytest.mark.parametrize("settings", SETTINGS, ids=IDS)


def net(*, dropout: float = 0.5, norm: bool = True) -> nn.Module:
    return small_net(dropout=dropout, norm=norm).train()


def backward(network: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    cross_entropy(network(inputs), labels).backward()


def engine_step(settings: SharpSettings, network: nn.Module) -> dict[str, Tensor]:
    """Gradients of one step of the engine, from no gradients."""
    network.zero_grad()
    settings.build()(network, whole(*batch()))
    return gradients(network)


# The engine's arithmetic.


@EVERY
def test_gradients_statistics_and_random_numbers_are_those_of_one_engine_step(settings: SharpSettings) -> None:
    network, twin = net(), net()
    torch.manual_seed(0)
    expected = engine_step(settings, twin)
    drawn = torch.rand(2)
    saq = settings.attach(network)
    torch.manual_seed(0)
    backward(network, *batch())
    with saq.ascent():
        backward(network, *batch())
    assert same(gradients(network), expected) and same_state(network, twin)
    assert torch.equal(torch.rand(2), drawn) and int(network[1].num_batches_tracked) == 1


@EVERY
def test_several_steps_of_an_optimizer_are_those_of_the_engine(settings: SharpSettings) -> None:
    network, twin = net(dropout=0.0), net(dropout=0.0)
    saq, step = settings.attach(network), settings.build()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (network, twin)]
    for seed in range(3):
        inputs, labels = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(seed)), batch()[1]
        backward(network, inputs, labels)
        with saq.ascent():
            backward(network, inputs, labels)
        step(twin, whole(inputs, labels))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert same_state(network, twin)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=IDS[:4])
def test_parts_of_a_batch_ascend_together_and_drop_the_same(settings: SharpSettings) -> None:
    network, twin = net(), net()
    torch.manual_seed(0)
    settings.build()(twin, Batch.of(*batch(), CrossEntropy(), 3))
    torch.manual_seed(0)
    saq, (inputs, labels) = settings.attach(network), batch()

    def passes(*, drawn_between: bool = False) -> None:
        for x, y in zip(inputs.tensor_split(3), labels.tensor_split(3), strict=True):
            (cross_entropy(network(x), y) * (len(x) / 12)).backward()
            if drawn_between:
                torch.rand(5)

    passes()
    with saq.ascent():
        passes(drawn_between=True)  # each pass draws what its first one drew, whatever is drawn between
    # The engine adds the parts' gradients up before they go through the quantizers of weights.
    torch.testing.assert_close(gradients(network), gradients(twin), rtol=1e-4, atol=1e-7)
    assert same_state(network, twin)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=IDS[:4])
def test_autocast(settings: SharpSettings) -> None:
    network, twin = net(), net()
    torch.manual_seed(0)
    with loop_forward(twin, autocast=torch.bfloat16, compiled=False, read=lambda output, _: output.float()):
        settings.build()(twin, whole(*batch()))
    saq, (inputs, labels) = settings.attach(network), batch()

    def one_pass() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(inputs)
        cross_entropy(logits.float(), labels).backward()

    torch.manual_seed(0)
    one_pass()
    with saq.ascent():
        one_pass()
    assert same(gradients(network), gradients(twin)) and same_state(network, twin)


def test_the_direction_does_not_depend_on_the_factor_of_a_gradient_scaler() -> None:
    network = net(dropout=0.0)
    expected = engine_step(SETTINGS[3], copy.deepcopy(network))
    saq = SETTINGS[3].attach(network)
    (1024 * cross_entropy(network(batch()[0]), batch()[1])).backward()
    with saq.ascent():
        backward(network, *batch())
    assert same(gradients(network), expected)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = float_net(norm=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
        return logits


def test_activation_checkpoints_run_the_watched_layers_again() -> None:
    network = quantized(Checkpointed()).train()
    twin, settings = net(dropout=0.0, norm=False), Saq(rho=0.03)
    expected = {f"inner.{name}": value for name, value in engine_step(settings, twin).items()}
    saq, (inputs, labels) = settings.attach(network), batch()
    for autocast in (False, True):

        def one_pass(autocast: bool = autocast) -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = cross_entropy(network(inputs), labels)
            loss.backward()

        network.zero_grad()
        one_pass()
        with saq.ascent():
            one_pass()
        torch.testing.assert_close(gradients(network), expected)


def test_a_network_that_is_one_layer() -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(6, 3), images=batch()[0].flatten(0, 2)).train()
    inputs, labels = batch()[0][:, 0, 0], batch()[1]
    twin = copy.deepcopy(layer)
    Saq(rho=0.03).build()(twin, whole(inputs, labels))
    saq = Saq(rho=0.03).attach(layer)
    backward(layer, inputs, labels)
    with saq.ascent():
        backward(layer, inputs, labels)
    assert same(gradients(layer), gradients(twin))


# Which passes count.


def evaluated(network: nn.Module) -> None:
    with torch.no_grad():
        network.eval()(batch()[0])
    with torch.inference_mode():
        network(batch()[0])
    network.train()


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("zero_first", [True, False])
def test_only_passes_since_the_last_step_count(to_none: bool, zero_first: bool) -> None:
    network = net(dropout=0.0)
    saq, (inputs, labels) = Saq(rho=0.03).attach(network), batch()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(3):  # plain steps, which end without an ascent
        loss = cross_entropy(network(inputs.flip(0)), labels)
        if zero_first:
            optimizer.zero_grad(to_none)
        loss.backward()
        optimizer.step()
        if not zero_first:
            optimizer.zero_grad(to_none)
        evaluated(network)
    loss = cross_entropy(network(inputs), labels)
    twin = copy.deepcopy(network)
    expected = engine_step(Saq(rho=0.03), twin)
    optimizer.zero_grad(to_none)
    loss.backward()
    evaluated(network)
    with saq.ascent():
        evaluated(network)
        backward(network, inputs, labels)
    assert same(gradients(network), expected)


def test_parameters_that_are_frozen_or_replaced_between_two_steps() -> None:
    network = net(dropout=0.0)
    saq = Saq(rho=0.03).attach(network)
    network[4].weight.requires_grad_(False)
    network.load_state_dict({name: 0.9 * value for name, value in network.state_dict().items()}, assign=True)
    twin = copy.deepcopy(network)
    backward(network, *batch())
    with saq.ascent():
        backward(network, *batch())
    expected = engine_step(Saq(rho=0.03), twin)
    assert same(gradients(network), expected) and "0.weight" in expected and "4.weight" not in expected


def test_an_error_in_the_block_leaves_the_weights_as_they_were() -> None:
    network = net()
    saq, before = Saq(rho=0.03).attach(network), copy.deepcopy(network)
    backward(network, *batch())
    with pytest.raises(KeyError), saq.ascent():
        raise KeyError
    assert all(torch.equal(value, dict(before.named_parameters())[name]) for name, value in network.named_parameters())
    network.zero_grad()
    backward(network, *batch())
    with saq.ascent():
        backward(network, *batch())


# What is left of it on the network.


def test_detached_and_copied_networks_are_free_of_it() -> None:
    network, plain = net(), net()
    saq = Saq(rho=0.03).attach(network)
    backward(network, *batch())
    copied = copy.deepcopy(network)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for free in (copied, torch.load(file, weights_only=False)):
        free.zero_grad()
        torch.manual_seed(0)
        backward(free, *batch())
        torch.manual_seed(0)
        plain.load_state_dict(network.state_dict())
        plain.zero_grad()
        backward(plain, *batch())
        assert same(gradients(free), gradients(plain))
        Saq().attach(free).detach()
    with saq.ascent():  # a backward pass of a copy is none of the network's
        backward(network, *batch())
    saq.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not any(p._backward_hooks for p in network.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, while it compiles
def test_a_compiled_forward_is_refused_and_runs_eagerly_on_request() -> None:
    network = quantized(nn.Sequential(nn.Flatten(), nn.Linear(72, 3))).train()
    twin, compiled = copy.deepcopy(network), torch.compile(network, backend="eager")
    compiled(batch()[0])
    saq = Saq(rho=0.03).attach(network)
    backward(compiled, *batch())
    with pytest.raises(BitscapeError, match="no quantized weight received a gradient; a compiled forward"), saq.ascent():
        pass
    network.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        backward(compiled, *batch())
    with saq.ascent():
        backward(compiled, *batch())
    assert same(gradients(network), engine_step(Saq(rho=0.03), twin))


# Misuse.


def test_blocks_without_passes_are_refused() -> None:
    network = net()
    saq = Saq(rho=0.03).attach(network)
    with pytest.raises(BitscapeError, match=r"ascent: no backward pass since the last step; call loss\.backward\(\)"), saq.ascent():
        pass
    network(batch()[0])
    with pytest.raises(BitscapeError, match="no backward pass since the last step"), saq.ascent():
        pass
    backward(network, *batch())
    with pytest.raises(BitscapeError, match="ascent: no backward pass in the block"), saq.ascent():
        network(batch()[0])
    with pytest.raises(BitscapeError, match="no backward pass since the last step"), saq.ascent():
        backward(network, *batch())
    saq.detach()
    saq = Saq(descent="sum").attach(network)
    backward(network, *batch())
    with pytest.raises(BitscapeError, match="ascent: no backward pass in the block"), saq.ascent():
        pass


def test_passes_that_go_round_the_network_are_refused() -> None:
    network = quantized(Checkpointed()).train()
    saq = Saq(rho=0.03).attach(network)
    backward(network.inner, *batch())
    with pytest.raises(BitscapeError, match="did not call the network itself; attach to the module that you call"), saq.ascent():
        pass


def test_a_block_within_a_block_is_refused() -> None:
    network = net()
    saq = Saq(rho=0.03).attach(network)
    backward(network, *batch())
    with pytest.raises(BitscapeError, match="ascent: it is open already"), saq.ascent():
        backward(network, *batch())
        with saq.ascent():
            pass


@pytest.mark.parametrize("settings", [Saq(rho=0.03), Sam(rho=0.03)], ids=["saq", "sam"])
def test_gradients_of_an_earlier_step_are_not_lost(settings: SharpSettings) -> None:
    network = net()
    saq = settings.attach(network)
    backward(network, *batch())
    with saq.ascent():
        backward(network, *batch())
    backward(network, *batch())
    with pytest.raises(BitscapeError, match=r"\.grad held gradients .*optimizer\.zero_grad\(\)"), saq.ascent():
        pass
    assert network[0].weight.grad is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Saq().attach(float_net()), "network: it has no quantized layer; .*Sam for a float network"),
        (lambda: Saq(case=1).attach(float_net()), "network: it has no quantized layer"),
        (lambda: Saq(interval=10).attach(net()), "interval = 10, reuse = 'none': your loop decides"),
        (lambda: Sam(interval=2, reuse="orthogonal").attach(net()), "interval = 2, reuse = 'orthogonal': your loop decides"),
        (lambda: [Sam().attach(each) for each in [net()] * 2], r"network: something is attached to it already; call its detach\(\)"),
    ],
)
def test_what_cannot_be_attached_to_is_explained(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        wrong()


def test_sam_of_a_float_network() -> None:
    network, twin = float_net(), float_net()
    sam = Sam(rho=0.03).attach(network)
    backward(network, *batch())
    with sam.ascent():
        backward(network, *batch())
    assert same(gradients(network), engine_step(Sam(rho=0.03), twin))
