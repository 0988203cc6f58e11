import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitscape.errors import BitscapeError
from bitscape.quant.chains import called_once, layer_chains, only_user, outputs_of, record_calls, require_same, same


class Branches(nn.Module):
    """A convolution whose output is also added elsewhere, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.stem(x)
        z = F.relu(self.twice(self.act(y + 1)))
        return self.last(self.twice(z)) + y


def _users(calls):
    return {call.name: [user.name for user in call.users] for call in calls}


def test_functions_and_the_output_are_users():
    users = _users(record_calls(Branches(), torch.randn(2, 3, 4, 4)))
    assert users["stem"] == ["add", "add"]
    assert users["last"] == ["add"]
    assert users["act"] == ["twice"]


def test_modules_called_twice_are_told():
    model = Branches()
    once = called_once(record_calls(model, torch.randn(1, 3, 4, 4)))
    assert once == {model.stem, model.last, model.act}


def test_shapes_are_no_use_of_a_tensor():
    class Reshaped(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y.reshape(y.shape[0], -1))

    calls = record_calls(Reshaped(nn.Conv2d(3, 2, 1), nn.Linear(32, 5)), torch.randn(1, 3, 4, 4))
    assert _users(calls) == {"0": ["reshape"], "reshape": ["1"], "1": ["output"], "output": []}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), nn.Dropout()])
def test_a_chain_passes_modules_that_return_what_they_took(act):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 2, 1))
    (chain,) = layer_chains(record_calls(model, torch.randn(1, 3, 4, 4)), lambda call: call.module is act)
    assert (chain.first.name, [c.name for c in chain.between], chain.last.name) == ("0", ["1"], "2")


def test_a_second_user_breaks_a_chain():
    calls = record_calls(Branches(), torch.randn(1, 3, 4, 4))
    assert layer_chains(calls, lambda call: True) == []
    assert only_user(next(c for c in calls if c.name == "stem")) is None


def test_hooks_are_gone_and_the_mode_is_restored_even_after_an_error():
    class Failing(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("later")

    model = Failing(nn.Conv2d(3, 3, 1), nn.ReLU()).train()
    with pytest.raises(RuntimeError, match="later"):
        record_calls(model, torch.randn(1, 3, 4, 4))
    assert all(not m._forward_hooks and not m._forward_pre_hooks and m.training for m in model.modules())


def test_require_same_lets_rounding_pass_and_nothing_else():
    x = torch.randn(3, 5)
    require_same([x], [x * (1 + 1e-5)], what="it", reason="why")
    with pytest.raises(BitscapeError, match=r"it changed the network's output by .* why"):
        require_same([x], [x + x.abs().max() * 0.01], what="it", reason="why")
    assert not same([x], [x * float("nan")])


def test_outputs_may_be_nested():
    class Nested(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return {"a": (y, [y + 1])}

    assert len(outputs_of(Nested(2, 3), torch.randn(1, 2))) == 2
