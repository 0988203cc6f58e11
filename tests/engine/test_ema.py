import pytest
import torch

from bitscape.engine.ema import Ema
from tests.engine.tiny import same_state, tiny_net


def test_the_average_follows_its_recurrence_and_copies_counters() -> None:
    model = tiny_net()
    ema = Ema.of(model, 0.5)
    expected = model[0].weight.detach().clone()
    for step, decay in enumerate([0.1, 2 / 11, 0.25]):  # (1 + step) / (10 + step), below 0.5
        with torch.no_grad():
            model[0].weight += 1.0
            model[1].num_batches_tracked += 1
        ema.update(model, step)
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    assert torch.allclose(ema.values["0.weight"], expected)
    assert int(ema.values["1.num_batches_tracked"]) == 3


def test_the_model_gets_its_own_state_back_also_after_an_error() -> None:
    model, twin = tiny_net(), tiny_net()
    ema = Ema.of(tiny_net(seed=1), 0.9)
    with pytest.raises(KeyError), ema.applied(model):
        assert same_state(model, tiny_net(seed=1))
        raise KeyError
    assert same_state(model, twin)
