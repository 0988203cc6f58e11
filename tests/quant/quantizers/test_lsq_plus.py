import torch

from bitscape.quant.grid import grid
from bitscape.quant.observers import Mse
from bitscape.quant.quantizers import Lsq, LsqPlus
from bitscape.quant.quantizers.lsq_plus import least_squares_range


def silu_values() -> torch.Tensor:
    return torch.nn.functional.silu(torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 2)


def test_weights_start_as_in_lsq():
    w = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    starts = []
    for quantizer in (Lsq(), LsqPlus()):
        fake = quantizer.for_weight(w, 4)
        fake.initialize(w, Mse())
        starts.append(fake.scale)
    assert torch.equal(*starts)


def test_an_offset_beats_a_signed_grid_on_a_short_negative_tail():
    x = silu_values()
    errors = {}
    for quantizer in (Lsq(zero_points=False), LsqPlus()):
        fake = quantizer.for_activation(3)
        fake.initialize(x, Mse())
        errors[type(quantizer)] = (fake(x) - x).square().mean().item()
    assert errors[LsqPlus] < 0.6 * errors[Lsq]


def test_more_steps_never_give_a_worse_start():
    values = silu_values().flatten()
    limits = grid(3, signed=False)

    def error(steps: int) -> float:
        scale, offset = least_squares_range(values, limits, Mse(), steps=steps)
        codes = ((values - offset) / scale).round().clamp(0, 7)
        return float((scale * codes + offset - values).square().mean())

    errors = [error(steps) for steps in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_the_result_is_scale_times_code_plus_offset():
    x = silu_values()
    fake = LsqPlus().for_activation(3)
    fake.initialize(x, Mse())
    scale, offset = fake.scale.detach(), fake.offset.detach()
    codes = ((x - offset) / scale).round().clamp(0, 7)
    torch.testing.assert_close(fake(x).detach(), scale * codes + offset, rtol=1e-5, atol=1e-5)


def test_the_offset_learns_from_values_outside_the_range_alone():
    x = silu_values()
    fake = LsqPlus().for_activation(3)
    fake.initialize(x, Mse())
    inside = x.clamp(fake.offset.item() + 0.1 * fake.scale.item(), fake.offset.item() + 6.9 * fake.scale.item())
    fake(inside).sum().backward()
    assert fake.offset.grad.abs() < 1e-5
    fake.offset.grad = None
    fake(x).sum().backward()
    assert fake.offset.grad > 0
