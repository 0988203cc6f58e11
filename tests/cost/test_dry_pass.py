import copy

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from bitscape.cost.dry_pass import dry_pass
from bitscape.errors import BitscapeError
from tests.networks import resnet20


class ReadsValues(nn.Module):
    """Changes its own buffers and modes while it runs."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("expanded", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.replaced = self.replaced + 1
        self.register_buffer("late", torch.ones(1))
        self.norm.train()
        x = self.norm(self.conv(x))
        if self.fails:
            raise KeyError("no luck")
        return x.relu() if x.sum().item() > 0 else x


def state(model: nn.Module) -> dict[str, object]:
    """Everything a dry pass could change."""
    tensors = {
        name: (id(t), t.clone(), t.requires_grad) for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    hooks = [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._forward_hooks_with_kwargs))
        for m in model.modules()
    ]
    return {"tensors": tensors, "modes": [m.training for m in model.modules()], "hooks": hooks}


def prepared(model: nn.Module) -> nn.Module:
    """With one frozen norm and one hook of the user's, so that modes and hooks differ between modules."""
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    model.register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (resnet20(), (3, 32, 32)),
        (resnet20(), (5, 32, 32)),
        (ReadsValues(), (3, 8, 8)),
        (ReadsValues(), (4, 8, 8)),
        (ReadsValues(fails=True), (3, 8, 8)),
    ],
    ids=["plain", "plain wrong shape", "changes", "changes wrong shape", "fails late"],
)
def test_model_is_unchanged(model, shape):
    before = state(prepared(model))
    try:
        dry_pass(model, shape)
        failed = False
    except BitscapeError:
        failed = True
    assert failed == (shape[0] != 3 or getattr(model, "fails", False))
    after = state(model)
    assert after["modes"] == before["modes"]
    assert after["hooks"] == before["hooks"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value, requires_grad) in before["tensors"].items():
        assert (identity, requires_grad) == (after["tensors"][name][0], after["tensors"][name][2])
        assert torch.equal(value, after["tensors"][name][1])


class Encoder(nn.Module):
    """A convolution, then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x).flatten(2).transpose(1, 2))


def test_a_network_on_the_meta_device_counts_like_one_with_values():
    itself, meta = dry_pass(Encoder(), (3, 16, 16)), dry_pass(Encoder().to("meta"), (3, 16, 16))
    assert itself == meta
    assert itself["block.self_attn"].macs > 0


def test_a_recurrent_layer_counts_its_products():
    assert dry_pass(nn.LSTM(32, 8), (5, 32))[""].macs == 5 * (4 * 8 * 32 + 4 * 8 * 8)


def test_a_function_compiled_within_the_forward_counts_as_it_does_uncompiled():
    class Squares(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return square(super().forward(x))

    square = torch.compile(lambda x: x @ x, backend="eager")
    assert dry_pass(Squares(4, 4), (4, 4))[""].macs == 2 * 4**3


def test_activations_are_freed_within_the_pass():
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            freed.extend(storage.expired() for storage in made)
            return x

    made: list[StorageWeakRef] = []
    freed: list[bool] = []
    layers = [nn.Linear(4, 4) for _ in range(3)]
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: made.append(StorageWeakRef(out.untyped_storage())))
    dry_pass(nn.Sequential(*layers, Last()), (4,))
    assert freed == [True, True, False]


def test_own_macs_exclude_those_of_children_and_sum_to_the_whole():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(4, 4, device=x.device) + self.inner(x) @ torch.ones(6, 4, device=x.device)

    runs = dry_pass(nn.Sequential(Outer(), Outer()), (4,))
    assert {name: run.macs for name, run in runs.items()} == {
        "": 0,
        "0": 16 + 24,
        "0.inner": 24,
        "1": 16 + 24,
        "1.inner": 24,
    }


def test_runs_are_in_order_of_first_call_and_count_calls():
    layer = nn.Linear(4, 4)
    assert [(name, run.calls) for name, run in dry_pass(nn.Sequential(layer, nn.ReLU(), layer), (4,)).items()] == [
        ("", 1),
        ("0", 2),
        ("1", 1),
    ]


def test_input_given_by_keyword_is_measured():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    run = dry_pass(Keyword(), (3, 4))["layer"]
    assert (run.input_elements, run.output_elements) == (12, 6)


def test_wrong_shape_is_an_error_on_the_meta_device_too():
    with torch.device("meta"):
        model = resnet20()
    with pytest.raises(BitscapeError, match=r"input_shape=\(7, 32, 32\)"):
        dry_pass(model, (7, 32, 32))


def test_half_precision_network_gets_an_input_of_its_type():
    assert dry_pass(nn.Linear(4, 2).to(torch.bfloat16), (4,))[""].macs == 8
    assert dry_pass(nn.ReLU(), (4,))[""].calls == 1


def test_network_that_cannot_be_copied_is_measured():
    class NoCopy(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
            raise TypeError("no copies")

    assert dry_pass(NoCopy(4, 2), (4,))[""].macs == 8


def test_attention_settings_of_the_process_are_restored():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(BitscapeError):
        dry_pass(ReadsValues(fails=True), (3, 8, 8))
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert torch.backends.cuda.flash_sdp_enabled()


def test_parameters_shared_in_the_model_stay_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    assert dry_pass(model, (4,))["1"].macs == 16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
