import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.integer.graph import grid_of, is_quantizer
from bitscape.models.named_outputs import named_outputs
from tests.exporters.networks import CASES, EXACT, Applied, exported, images, integers, other_images, quantized

pytestmark = pytest.mark.slow


def first_output(network: IntegerNetwork, x: torch.Tensor) -> torch.Tensor:
    return next(iter(run_integers(network, x).values()))


def test_a_convolution_is_computed_as_its_definition_says():
    """By hand, in numpy's whole numbers: sums, bias, one multiplication in float32, half to even, limits."""
    torch.manual_seed(0)
    network = quantized(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU6(), nn.Conv2d(4, 2, 1), nn.Flatten()), bits=[(5, 8), (4, 4)]
    )
    integer = integer_network(network, images())
    first, second = (grid_of(node) for node in integer.module.graph.nodes if is_quantizer(node))
    x = other_images()
    codes = np.clip(np.rint(x.numpy() / np.float32(first.scale)) + first.zero_point, 0, 255).astype(np.int64)
    weight, bias = integer.weights["0.weight"], integer.biases["0.weight"].numpy()
    padded = np.pad(codes - int(first.zero_point), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    sums = np.einsum("nchwij,ocij->nohw", windows, weight.q.numpy().astype(np.int64)) + bias[:, None, None]
    multiplier = np.float32(first.scale) * weight.scale.numpy() / np.float32(second.scale)
    middle = np.rint(sums.astype(np.float32) * multiplier[:, None, None]).clip(0, min(15, round(6 / second.scale))).astype(np.int64)
    weight, bias = integer.weights["2.weight"], integer.biases["2.weight"].numpy()
    sums = np.einsum("nchw,oc->nohw", middle, weight.q.numpy().astype(np.int64)[:, :, 0, 0]) + bias[:, None, None]
    final = sums.astype(np.float32) * (np.float32(second.scale) * weight.scale.numpy())[:, None, None]
    assert len(np.unique(middle)) > 8 and len(np.unique(final)) > 50
    assert np.array_equal(first_output(integer, x).numpy(), final.reshape(len(x), -1))


def test_sums_that_float32_cannot_hold_are_exact():
    torch.manual_seed(0)
    layer = nn.Linear(192, 2, bias=False)
    network = quantized(nn.Sequential(nn.Flatten(), layer), bits=[(8, 8)])
    integer = integer_network(network, images())
    key = "1.weight"
    integer.weights[key].q[0], integer.weights[key].q[1] = 127, -128
    integer.weights[key].q[0, ::2] = -127
    grid = next(grid_of(node) for node in integer.module.graph.nodes if is_quantizer(node))
    codes = torch.randint(0, 256, (3, 192), generator=torch.Generator().manual_seed(0))
    x = ((codes - grid.zero_point) * torch.tensor(grid.scale)).reshape(3, 3, 8, 8)
    sums = (codes.numpy().astype(np.int64) - int(grid.zero_point)) @ integer.weights[key].q.numpy().astype(np.int64).T
    spacing = integer.weights[key].scale.numpy() * np.float32(grid.scale)
    assert np.array_equal(first_output(integer, x).numpy(), sums.astype(np.float32) * spacing)


class Alive(TorchDispatchMode):
    """Counts the float64 values that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.tensors.append(weakref.ref(made))
            self.most = max(self.most, sum(tensor.numel() for found in self.tensors if (tensor := found()) is not None))
        return made


def test_memory_does_not_grow_with_the_number_of_layers():
    def most(layers: int) -> int:
        torch.manual_seed(0)
        convs = (module for _ in range(layers) for module in (nn.Conv2d(8, 8, 1), nn.ReLU()))
        integer = integer_network(quantized(nn.Sequential(nn.Conv2d(3, 8, 1), *convs), bits=[(8, 8)]), images())
        with Alive() as alive:
            run_integers(integer, images(4))
        return alive.most

    assert 4 * 8 * 64 <= most(2) == most(6)


@pytest.mark.parametrize("n", [1, 5, 33])
def test_the_size_of_batches_does_not_matter(n):
    _, integer = integers("mobile")
    x = images(n, seed=7)
    together = first_output(integer, x)
    for size in (1, 3):
        assert torch.equal(together, torch.cat([first_output(integer, batch) for batch in x.split(size)]))


def test_all_outputs_are_returned_by_name():
    _, integer = integers("repeated")
    outputs = run_integers(integer, images(3))
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {"output0": (3, 5), "output1": (3, 8, 6, 6)}
    with torch.no_grad():
        simulated = integer.module(images(3))
    assert list(simulated) == list(outputs)
    for name, values in outputs.items():
        torch.testing.assert_close(values, simulated[name], rtol=0, atol=0.02 * float(simulated[name].abs().max()))


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_integers_and_their_simulation_differ_by_rounding_alone(name, bits):
    _, integer = integers(name, bits)
    with torch.no_grad():
        simulated = integer.module(images(40, seed=8))
    simulated = next(iter(named_outputs(simulated).values()))
    found = first_output(integer, images(40, seed=8))
    differing = (found - simulated).abs().amax(1) > 1e-5 * simulated.abs().max()
    assert differing.float().mean() < 0.2  # of the images: one code in a million, and what follows from it


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_onnx_runtime_computes_the_same(name, bits):
    from bitscape.runtimes.sessions import OnnxRuntime

    case, x = exported(name, bits), other_images()
    session = OnnxRuntime().open(case.content)
    found = np.concatenate([session.run(part.numpy())[0] for part in x.split(5)])  # the last batch is a single image
    expected = first_output(case.integer, x).numpy()
    if name in EXACT:
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())  # float operators behind the last layer
    differing = np.abs(found - expected) > 2e-6 * np.abs(expected).max()
    assert differing.mean() < 0.1 and np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def every_pair_of_bits():
    """Eight branches, one for each weight width, of seven layers, one for each activation width that signs and zero fit in."""
    pairs = [(weight, activation) for weight in range(1, 9) for activation in range(8, 1, -1)]

    def layer(inputs: int, rectifier: nn.Module) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, 12, 1)
        nn.init.kaiming_normal_(convolution.weight)
        return [convolution, rectifier]

    def branch() -> nn.Sequential:
        layers = (layer(3 if bits == 8 else 12, nn.ReLU6() if bits % 2 else nn.Hardtanh()) for bits in range(8, 1, -1))
        return nn.Sequential(*(part for parts in layers for part in parts))

    def forward(net, x):
        return torch.cat([net.get_submodule(f"w{bits}")(x) for bits in range(1, 9)], 1).flatten(1)

    torch.manual_seed(0)
    network = Applied(forward, **{f"w{bits}": branch() for bits in range(1, 9)})
    return integer_network(quantized(network, bits=pairs), images())


@pytest.mark.usefixtures("exact_kernels")
def test_onnx_runtime_computes_every_pair_of_bits_exactly(every_pair_of_bits, tmp_path):
    from bitscape.exporters.onnx.qdq import write_onnx
    from bitscape.exporters.parity import check_parity
    from bitscape.runtimes.sessions import OnnxRuntime

    info = write_onnx(every_pair_of_bits, tmp_path / "bits.onnx", images())
    x = other_images()
    (found,) = OnnxRuntime().open(info.path).run(x.numpy())
    expected = first_output(every_pair_of_bits, x).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # the last layers are float convolutions
    assert all(len(np.unique(part)) > 5 for part in np.split(expected, 8, axis=1))  # every branch is alive
    report = check_parity(info.path, x.numpy())
    assert len(report.layers) == 56 and report.differing == 0 and report.float_layers == ()
    assert len(report.float_outputs) == 8


@pytest.mark.usefixtures("exact_kernels")
def test_onnx_runtime_adds_the_bias_of_tokens_in_float(tmp_path):
    """Enough values that an integer bias would give another code somewhere."""
    from bitscape.exporters.onnx.qdq import write_onnx
    from bitscape.exporters.parity import check_parity
    from bitscape.runtimes.sessions import OnnxRuntime

    def forward(net, x):
        return net.b(F.relu(net.a(x.flatten(2).transpose(1, 2))))

    torch.manual_seed(0)
    network = Applied(forward, a=nn.Linear(3, 256), b=nn.Linear(256, 64))
    integer = integer_network(quantized(network, bits=[(8, 8)], x=images(size=32)), images(size=32))
    info, x = write_onnx(integer, tmp_path / "tokens.onnx", images(size=32)), images(8, size=32, seed=9)
    assert np.array_equal(OnnxRuntime().open(info.path).run(x.numpy())[0], first_output(integer, x).numpy())
    assert check_parity(info.path, x.numpy()).differing == 0
