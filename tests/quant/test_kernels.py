"""Fast kernels against the definition, and the operators that choose between them."""

import importlib.util
import shutil
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bitscape.quant import operators, reference
from bitscape.quant.functional import fake_quantize
from bitscape.quant.grid import Grid, grid
from bitscape.quant.kernels import gpu, native

INTERPRETED = not torch.cuda.is_available()
"""Without a GPU, programs of Triton run on tensors of the CPU, in its interpreter."""

needs_native = pytest.mark.skipif(
    not native.supports(torch.empty(1)), reason="bitscape was installed without a C compiler"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
marks_of_triton = [needs_triton, pytest.mark.slow] if INTERPRETED else [needs_triton]
KERNELS = [
    *(pytest.param(native, one, marks=needs_native, id=f"native {one}") for one in native.DTYPES),
    *(pytest.param(gpu, one, marks=marks_of_triton, id=f"triton {one}") for one in gpu.DTYPES),
]
DEVICES = {native: "cpu", gpu: "cpu" if INTERPRETED else "cuda"}
VALUES = {
    "scalar": lambda: normal(),
    "vector": lambda: normal(33_001),  # several units of work, the last one short
    "matrix": lambda: normal(3, 2100),  # several blocks and tiles
    "transposed": lambda: normal(20, 60).T,
    "images": lambda: normal(4, 3, 13, 17),
    "channels_last": lambda: normal(4, 3, 13, 17).contiguous(memory_format=torch.channels_last),
    "rows transposed": lambda: normal(4, 5, 6, 7).transpose(1, 2),
    "every second": lambda: normal(6, 10, 8)[:, ::2],
    "expanded": lambda: normal(1, 6).expand(5, 6),
    "depthwise": lambda: normal(300, 1, 3, 3),
    "volume": lambda: normal(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
}
GRIDS = {
    "signed": lambda x: grid(4, signed=True),
    "unsigned": lambda x: grid(8, signed=False),
    "mid-rise": lambda x: grid(2, signed=True, mid_rise=True),
    "signs": lambda x: grid(1, signed=True),
    "16 bits": lambda x: grid(16, signed=False),
    "zero point": lambda x: Grid(0, 15, torch.tensor(3.3)),
    "bits by image": lambda x: grid(
        1 + torch.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) % 8, signed=True
    ),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales(x):
    """One scale, then one for each index of every axis."""
    yield torch.tensor(0.3)
    for axis, n in enumerate(x.shape):
        by_index = 0.05 + torch.arange(n) % 7 / 10
        yield by_index.reshape([n if at == axis else 1 for at in range(x.ndim)])


def cases(kernels, kind, values, grids=GRIDS):
    x = VALUES[values]().to(kind)
    gradient = normal(*x.shape, seed=1).to(kind)
    x, gradient = x.to(DEVICES[kernels]), gradient.to(DEVICES[kernels])
    for scale in scales(x):
        for name, levels in grids.items():
            if x.ndim or name != "bits by image":
                yield x, gradient, scale.to(x.device), on(x.device, levels(x))


def on(device, levels):
    limits = levels.qmin, levels.qmax, levels.zero_point
    return Grid(*(one.to(device) if isinstance(one, torch.Tensor) else one for one in limits))


def narrowed(kernels, wide, kind):
    """Rounded to `kind`; Triton's interpreter cuts off what does not fit bfloat16."""
    if kernels is gpu and INTERPRETED and kind == torch.bfloat16:
        wide = (wide.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return wide.to(kind)


def assert_sums(ours, expected, gradient):
    """Equal to within the rounding of float32 sums of gradients times at most 16, the largest slope."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    assert ((ours - expected).abs() <= 16e-6 * gradient.float().abs().sum()).all()


@pytest.mark.parametrize("kernels, kind", KERNELS)
@pytest.mark.parametrize("values", VALUES)
def test_fake_quantization_has_the_bits_of_its_definition(values, kernels, kind):
    for x, gradient, scale, levels in cases(kernels, kind, values):
        y = kernels.quantized(x, scale, levels)
        expected = narrowed(kernels, reference.quantized(x.float(), scale, levels), kind)
        assert torch.equal(y, expected) and y.dtype == kind
        ours = kernels.quantized_backward(gradient, x, scale, levels)
        expected = reference.quantized_backward(gradient, x, scale, levels)
        assert torch.equal(ours[0], expected[0]) and ours[0].dtype == kind
        for sums, of in zip(ours[1:], expected[1:], strict=True):
            assert_sums(sums, of, gradient)


@pytest.mark.parametrize("kernels, kind", KERNELS)
@pytest.mark.parametrize("values", [name for name in VALUES if name != "scalar"])
def test_mixtures_have_the_bits_of_their_definition(values, kernels, kind):
    grids = [grid(bits, signed=True) for bits in (1, 2, 3, 4, 8)]
    for x, gradient, one, _ in cases(kernels, kind, values, {"": lambda x: grids[0]}):
        shares = normal(5, seed=2).softmax(0).to(x.device)
        scale = torch.stack([one * factor for factor in (1, 0.5, 0.25, 0.1, 0.02)])
        y = kernels.mixed(x, scale, shares, grids)
        expected = narrowed(kernels, reference.mixed(x.float(), scale, shares, grids), kind)
        assert torch.equal(y, expected) and y.dtype == kind
        ours = kernels.mixed_backward(gradient, x, scale, shares, grids)
        expected = reference.mixed_backward(gradient.float(), x.float(), scale, shares, grids)
        assert torch.equal(ours[0], narrowed(kernels, expected[0], kind)) and ours[0].dtype == kind
        for sums, of in zip(ours[1:], expected[1:], strict=True):
            assert_sums(sums, of, 8 * gradient)


@needs_native
def test_threads_change_nothing():
    x, gradient = normal(1 << 20), normal(1 << 20, seed=1)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                native.quantized_backward(gradient, x, torch.tensor(0.3), grid(4, signed=True))
            )
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1])) and all(
        map(torch.equal, results[0], results[2])
    )


@pytest.mark.parametrize("kernels, kind", KERNELS)
def test_values_that_are_no_numbers_are_not_hidden(kernels, kind):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.4]).to(DEVICES[kernels], kind)
    y = kernels.quantized(x, torch.tensor(0.25, device=x.device), grid(4, signed=True))
    expected = torch.tensor([float("nan"), 7 * 0.25, -8 * 0.25, 0.5], dtype=kind)
    torch.testing.assert_close(y.cpu(), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kernels, kind", KERNELS)
def test_zeros_keep_the_signs_of_what_was_rounded(kernels, kind):
    x = torch.tensor([-0.1, 0.1, -0.125, 0.125], dtype=kind, device=DEVICES[kernels])
    y = kernels.quantized(x, torch.tensor(0.25, device=x.device), grid(4, signed=True))
    assert y.tolist() == [0.0] * 4 and y.signbit().tolist() == [True, False, True, False]


def test_nothing_gives_nothing():
    x = torch.empty(0, 3)
    assert operators.quantized(x, torch.tensor(0.3), grid(4, signed=True)).shape == (0, 3)
    by_scale = operators.quantized_backward(x, x, torch.tensor(0.3), grid(4, signed=True))[1]
    assert torch.equal(by_scale, torch.tensor(0.0))


@pytest.mark.parametrize("kind", [torch.float16, torch.float64], ids=repr)
def test_other_types_take_the_definition(kind):
    x = normal(5, 6).to(kind)
    assert not native.supports(x)
    y = operators.quantized(x, torch.tensor(0.3), grid(4, signed=True))
    assert y.dtype == kind and torch.equal(
        y, reference.quantized(x, torch.tensor(0.3), grid(4, signed=True))
    )


@needs_native
def test_shares_of_another_type_count():
    x, shares, grids = (
        normal(50),
        normal(3, seed=2).softmax(0),
        [grid(bits, signed=True) for bits in (2, 4, 8)],
    )
    scale = torch.tensor([0.9, 0.3, 0.02])
    y = native.mixed(x, scale, shares.double(), grids)
    assert torch.equal(y, native.mixed(x, scale, shares, grids))


@needs_native
def test_a_scale_that_would_enlarge_the_values_is_refused():
    with pytest.raises(
        ValueError, match=r"shape \(1, 3\), which does not broadcast to that of x, \(3,\)"
    ):
        native.quantized(normal(3), torch.ones(1, 3), grid(4, signed=True))


@needs_native
def test_a_library_of_another_source_is_not_used(tmp_path, monkeypatch, caplog):
    library = tmp_path / "kernels.so"
    library.write_bytes(native.FILE.read_bytes())
    library.with_suffix(".c").write_text("/* other arguments */")
    monkeypatch.setattr(native, "FILE", library)
    native._functions.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert not native.supports(torch.empty(1))
    finally:
        native._functions.cache_clear()
    assert "built from another version of kernels.c" in caplog.text


@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"
)
def test_where_there_is_a_compiler_there_are_kernels():
    assert native.supports(torch.empty(1))


def test_operators_stay_in_traced_graphs_and_know_their_shapes():
    levels = grid(4, signed=True)
    graph = make_fx(lambda x, s: fake_quantize(x, s, levels), tracing_mode="fake")(
        normal(2, 3), torch.tensor(0.3)
    )
    assert torch.ops.bitscape.quantize.default in {node.target for node in graph.graph.nodes}
    x, scale = normal(7, 3), torch.tensor(0.1)
    assert torch.equal(graph(x, scale), fake_quantize(x, scale, levels))


@pytest.mark.parametrize(
    "levels",
    [grid(4, signed=True), GRIDS["bits by image"](torch.empty(4, 3, 1, 1))],
    ids=["numbers", "tensors"],
)
def test_operators_pass_the_checks_of_pytorch(levels):
    part = normal(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)[:, :, 1:, 1:]
    x, scale = part, torch.tensor(0.3)
    limits = (levels.qmin, levels.qmax, levels.zero_point)
    kind = "tensors" if isinstance(levels.qmin, torch.Tensor) else "default"
    numbers = [one.float() if isinstance(one, torch.Tensor) else float(one) for one in limits]
    for name, tensors in {"quantize": (x, scale), "quantize_backward": (x, x, scale)}.items():
        operator = getattr(getattr(torch.ops.bitscape, name), kind)
        torch.library.opcheck(
            operator, (*tensors, *numbers), test_utils=("test_schema", "test_faketensor")
        )


def test_without_the_library_the_definition_is_used_and_the_log_says_so(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(native, "FILE", tmp_path / "kernels.so")
    native._functions.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert [native.supports(torch.empty(1)) for _ in range(2)] == [False, False]
        y = operators.quantized(normal(9), torch.tensor(0.3), grid(4, signed=True))
    finally:
        native._functions.cache_clear()
    assert torch.equal(y, reference.quantized(normal(9), torch.tensor(0.3), grid(4, signed=True)))
    assert caplog.text.count("no native kernels") == 1


@pytest.mark.parametrize("arithmetic", [reference, operators, gpu], ids=lambda one: one.__name__)
def test_nothing_waits_for_a_gpu(arithmetic, monkeypatch):
    """Of meta tensors nobody can ask for values."""
    monkeypatch.setattr(gpu, "_programs", Mock)
    monkeypatch.setattr(gpu._Tiles, "launch", Mock())
    x, one, three = (torch.empty(shape, device="meta") for shape in [(4, 3, 5, 5), (), (3,)])
    grids, results = [grid(bits, signed=True) for bits in (1, 2, 4)], []
    for levels in (grids[0], Grid(0, 15, one), GRIDS["bits by image"](x)):
        for scale in (one, three.reshape(3, 1, 1)):
            results += [arithmetic.quantized(x, scale, on("meta", levels))]
            results += arithmetic.quantized_backward(x, x, scale, on("meta", levels))[:2]
    for scale in (three, three.reshape(3, 1, 1, 1).expand(3, 3, 1, 1)):
        results += [arithmetic.mixed(x, scale, three, grids)]
        results += arithmetic.mixed_backward(x, x, scale, three, grids)
    assert {result.device.type for result in results} == {"meta"}


def on_gpu(count, kind=torch.float32):
    """Within a FakeTensorMode: a tensor on a GPU that is there in name only."""
    return torch.empty(count, device="cuda", dtype=kind)


def test_the_gpu_has_kernels_of_its_own(monkeypatch):
    monkeypatch.setattr(gpu, "_works", lambda: True)
    with FakeTensorMode():
        assert operators._kernels(on_gpu(3)) is gpu
        assert operators._kernels(on_gpu(3, torch.float64)) is reference
        assert operators._kernels(on_gpu(0)) is reference


def test_without_triton_the_definition_is_used_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "_programs", Mock(side_effect=ModuleNotFoundError("no triton")))
    gpu._works.cache_clear()
    try:
        with caplog.at_level("INFO"), FakeTensorMode():
            assert [operators._kernels(on_gpu(3)) for _ in range(2)] == [reference, reference]
    finally:
        gpu._works.cache_clear()
    assert caplog.text.count("no kernels for the GPU") == 1
