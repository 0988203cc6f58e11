"""A quantized network is an ordinary nn.Module: what users do to one in loops of their own."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bitscape as bs
from bitscape.policy import uniform_policy
from bitscape.quant.layers import quantized_layers


class Padded(nn.Conv2d):
    """A layer with a forward of its own, which gets a class of its own when it is quantized."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (12,), generator=generator)
    return torch.randn(12, 2, 6, 6, generator=generator) + labels[:, None, None, None], labels


def made(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        parts = [Padded(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
        model = nn.Sequential(*parts).eval()
    policy = uniform_policy(["0", "3", "6"], bs.LayerBits(3, 4))
    return bs.quantize(model, policy, data()[0], for_training=True).train()


def trained(network: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for seed in range(steps):
        inputs, labels = data(seed)
        optimizer.zero_grad()
        cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    return network


def outputs(network: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = network.eval()(data(9)[0])
    return result


def test_every_parameter_trains_and_the_optimizer_sees_the_scales() -> None:
    network, start = made(), made()
    trained(network)
    names = {name for name, _ in network.named_parameters()}
    assert {"0.weight_quantizer.scale", "0.input_quantizer.scale", "6.weight"} <= names
    before = dict(start.named_parameters())
    assert {name for name, value in network.named_parameters() if torch.equal(value, before[name])} <= {"0.bias"}  # a norm follows


def test_a_copy_trains_by_itself() -> None:
    network = made()
    copied = copy.deepcopy(network)
    expected = outputs(copy.deepcopy(network))
    trained(copied)
    assert torch.equal(outputs(network), expected) and not torch.equal(outputs(copied), expected)
    assert torch.equal(outputs(copied), outputs(trained(made())))


def test_its_state_goes_into_another_one() -> None:
    network, other = trained(made()), made(seed=1)
    assert other.load_state_dict(network.state_dict()) == ([], [])
    assert torch.equal(outputs(network), outputs(other))


def test_its_state_goes_through_torch_save(tmp_path: Path) -> None:
    network, other = trained(made()), made(seed=1)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(outputs(network), outputs(other))


def test_the_whole_module_goes_through_torch_save() -> None:
    network, file = trained(made()), io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(outputs(network), outputs(other))
    assert [type(layer) for layer in quantized_layers(other).values()] == [type(layer) for layer in quantized_layers(network).values()]
    assert torch.equal(outputs(trained(network.train())), outputs(trained(other.train())))


def test_averages_of_swa_utils() -> None:
    network = made()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    average.update_parameters(network)  # the first one copies
    start = copy.deepcopy(network.state_dict())
    trained(network, steps=1)
    average.update_parameters(network)
    scale = "0.weight_quantizer.scale"
    torch.testing.assert_close(average.module.state_dict()[scale], 0.75 * start[scale] + 0.25 * network.state_dict()[scale])
    mean = "1.running_mean"
    torch.testing.assert_close(average.module.state_dict()[mean], 0.75 * start[mean] + 0.25 * network.state_dict()[mean])
    assert outputs(average).isfinite().all()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel(alone: None) -> None:
    network, twin = made(), made()
    trained(DistributedDataParallel(network))
    assert torch.equal(outputs(network), outputs(trained(twin)))


def test_saq_of_a_data_parallel_network(alone: None) -> None:
    for wraps_first in (True, False):
        network, twin = made(), made()
        parallel = DistributedDataParallel(network)
        saq, (inputs, labels) = bs.Saq().attach(parallel if wraps_first else network), data()
        for _ in range(2):
            with parallel.no_sync():
                cross_entropy(parallel(inputs), labels).backward()
            with saq.ascent():
                cross_entropy(parallel(inputs), labels).backward()
            attached = bs.Saq().attach(twin)
            cross_entropy(twin(inputs), labels).backward()
            with attached.ascent():
                cross_entropy(twin(inputs), labels).backward()
            attached.detach()
            for one, other in zip(network.parameters(), twin.parameters(), strict=True):
                assert torch.equal(one.grad, other.grad)
            parallel.zero_grad()
            twin.zero_grad()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, while it compiles
def test_torch_compile() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).eval()
    network = bs.quantize(model, uniform_policy(["1"], bs.LayerBits(3, 4)), data()[0], for_training=True).train()
    twin = copy.deepcopy(network)
    trained(torch.compile(network, backend="aot_eager"))
    torch.testing.assert_close(outputs(network), outputs(trained(twin)), rtol=1e-3, atol=1e-3)


def test_safetensors(tmp_path: Path) -> None:
    network, other = trained(made()), made(seed=1)
    save_model(network, tmp_path / "state.safetensors")
    assert load_model(other, tmp_path / "state.safetensors") == (set(), [])
    assert torch.equal(outputs(network), outputs(other))


def test_what_was_trained_in_an_own_loop_is_packed_and_read_back(tmp_path: Path) -> None:
    network = trained(made()).eval()
    bs.export(network, tmp_path / "network.safetensors")
    assert (tmp_path / "network.safetensors").stat().st_size > 0
