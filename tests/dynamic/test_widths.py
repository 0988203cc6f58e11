import pytest
import torch
from torch import Tensor, nn

from bitscape.dynamic.widths import Widths, at_widths

WHOLE = torch.tensor([3.0, 2.0, 5.0, 3.0, 2.0])
SHARE = torch.tensor([0.25, 0.5, 0.9, 0.0, 1.0])


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def curve(bits: int, x: Tensor) -> Tensor:
    """Smooth, other than linear in x, and another one for each width."""
    return torch.sin(bits * x) + bits * x


def one_by_one(x: Tensor, widths: Widths) -> Tensor:
    """The definition, image by image."""
    rows = []
    for at in range(len(x)):
        low, f = int(widths.below[at]), torch.tensor(0.0) if widths.share is None else widths.share[at]
        rows.append((1 - f) * curve(low, x[at : at + 1]) + f * curve(low + 1, x[at : at + 1]))
    return torch.cat(rows)


def test_value_is_below_and_share() -> None:
    assert torch.equal(Widths(WHOLE).value, WHOLE)
    assert torch.equal(Widths(WHOLE, SHARE).value, torch.tensor([3.25, 2.5, 5.9, 3.0, 3.0]))


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
@pytest.mark.parametrize("share", [None, SHARE], ids=["whole", "between"])
def test_every_image_gets_its_own_mixture(shape: tuple[int, ...], share: Tensor | None) -> None:
    x = values(*shape)
    widths = Widths(WHOLE, share)
    found = at_widths(x, widths, curve)
    assert found.shape == x.shape
    if share is None:
        assert torch.equal(found, one_by_one(x, widths))
    else:
        torch.testing.assert_close(found, one_by_one(x, widths))


def test_the_result_may_have_another_shape() -> None:
    weights = {bits: values(7, 4, seed=bits) for bits in range(2, 7)}
    x = values(5, 3, 4)
    found = at_widths(x, Widths(WHOLE, SHARE), lambda bits, images: images @ weights[bits].T)
    by_hand = [
        (1 - f) * (image @ weights[int(b)].T) + f * (image @ weights[int(b) + 1].T) for image, b, f in zip(x, WHOLE, SHARE, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(by_hand))


def test_the_slope_in_the_width_is_the_next_width_less_this_one() -> None:
    x, g, share = values(5, 2, 3, 4), values(5, 2, 3, 4, seed=1), SHARE.clone().requires_grad_()
    at_widths(x, Widths(WHOLE, share), curve).backward(g)
    slopes = [(g[at] * (curve(int(b) + 1, x[at]) - curve(int(b), x[at]))).sum() for at, b in enumerate(WHOLE)]
    assert share.grad is not None
    torch.testing.assert_close(share.grad, torch.stack(slopes))  # at a share of exactly 0 and 1 too
    assert bool((share.grad != 0).all())


@pytest.mark.parametrize("share", [None, SHARE], ids=["whole", "between"])
def test_the_slope_in_the_images_is_that_of_the_definition(share: Tensor | None) -> None:
    g = values(5, 2, 3, 4, seed=1)
    slopes = []
    for run in (lambda x: at_widths(x, Widths(WHOLE, share), curve), lambda x: one_by_one(x, Widths(WHOLE, share))):
        x = values(5, 2, 3, 4).requires_grad_()
        run(x).backward(g)
        slopes.append(x.grad)
    torch.testing.assert_close(slopes[0], slopes[1])


def test_what_all_share_gets_the_gradient_of_all() -> None:
    factor = nn.Parameter(torch.tensor(2.0))
    at_widths(torch.ones(5, 1), Widths(WHOLE, SHARE), lambda bits, x: factor * bits * x).sum().backward()
    torch.testing.assert_close(factor.grad, Widths(WHOLE, SHARE).value.sum())


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        (Widths(WHOLE), {2: [1, 4], 3: [0, 3], 5: [2]}),
        (Widths(torch.full((5,), 4.0)), {4: [0, 1, 2, 3, 4]}),
        (Widths(WHOLE, SHARE), {2: [1, 4], 3: [0, 1, 3, 4], 4: [0, 3], 5: [2], 6: [2]}),
        (Widths(torch.full((5,), 7.0), torch.ones(5)), {7: [0, 1, 2, 3, 4], 8: [0, 1, 2, 3, 4]}),
    ],
    ids=["whole", "all alike", "between", "at the end"],
)
def test_each_width_is_applied_once_to_the_images_that_need_it(widths: Widths, expected: dict[int, list[int]]) -> None:
    calls: list[tuple[int, list[int]]] = []

    def noting(bits: int, x: Tensor) -> Tensor:
        assert type(bits) is int
        calls.append((bits, x[:, 0].int().tolist()))
        return x

    at_widths(torch.arange(5.0)[:, None], widths, noting)
    assert len(calls) == len(expected) and dict(calls) == expected


def test_images_do_not_see_each_other() -> None:
    x = values(5, 3)
    found = at_widths(x, Widths(WHOLE, SHARE), curve)
    for at in range(5):
        alone = at_widths(x[at : at + 1], Widths(WHOLE[at : at + 1], SHARE[at : at + 1]), curve)
        torch.testing.assert_close(found[at : at + 1], alone, rtol=0, atol=0)


@pytest.mark.parametrize("share", [None, SHARE], ids=["whole", "between"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_layout_of_the_images_is_kept(layout: torch.memory_format, share: Tensor | None) -> None:
    # A result that lost it would make the convolution after it convert its input.
    x = values(5, 3, 4, 6).contiguous(memory_format=layout)
    assert at_widths(x, Widths(WHOLE, share), curve).is_contiguous(memory_format=layout)


def test_the_result_has_the_type_of_the_operation() -> None:
    found = at_widths(values(5, 3), Widths(WHOLE, SHARE), lambda bits, x: curve(bits, x).bfloat16())
    assert found.dtype == torch.bfloat16
