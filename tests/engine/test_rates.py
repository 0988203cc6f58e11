import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from bitscape.engine import Cosine
from bitscape.engine.rates import Position, Rates, check_schedule, describe_schedule
from bitscape.errors import BitscapeError


def optimizer() -> torch.optim.Optimizer:
    layer = nn.Linear(2, 2)
    return torch.optim.SGD([{"params": [layer.weight], "lr": 0.4}, {"params": [layer.bias]}], lr=0.2)


def test_a_position_counts_batches_or_epochs_where_they_are_not_known() -> None:
    assert Position.at(2, 3, epochs=4, batches=5) == Position(13, 20, 5)
    assert Position.at(2, 7, epochs=4, batches=5) == Position(14, 20, 5)  # more batches than the data said
    assert Position.at(2, 7, epochs=4, batches=None) == Position(2, 4, 1)


def test_ours_multiply_every_groups_rate() -> None:
    made = optimizer()
    rates = Rates(optimizer=made, schedule=Cosine())
    for step, factor in ((0, 1.0), (5, 0.5), (0, 1.0)):
        rates.before_step(Position(step, 10, 10))
        assert [group["lr"] for group in made.param_groups] == pytest.approx([0.4 * factor, 0.2 * factor])
        assert rates.used == pytest.approx(0.4 * factor)


def test_a_run_goes_on_from_its_own_base_and_puts_it_back() -> None:
    first, lowered = optimizer(), optimizer()
    state = Rates(optimizer=first, schedule=Cosine()).state()
    for group in lowered.param_groups:
        group["lr"] /= 8
    rates = Rates(optimizer=lowered, schedule=Cosine())
    rates.restore(state)
    rates.before_step(Position(5, 10, 10))
    assert [group["lr"] for group in lowered.param_groups] == pytest.approx([0.2, 0.1])
    rates.put_back()
    assert [group["lr"] for group in lowered.param_groups] == [0.4, 0.2]


def test_only_our_schedule_is_undone() -> None:
    made = optimizer()
    rates = Rates(optimizer=made, schedule=None)
    made.param_groups[0]["lr"] = 0.3  # by the user's hook, for instance
    rates.put_back()
    assert [group["lr"] for group in made.param_groups] == [0.3, 0.2]


def test_those_of_torch_move_after_a_step_and_go_on_from_their_state() -> None:
    first = optimizer()
    rates = Rates(optimizer=first, schedule=StepLR(first, 2, 0.1))
    for _ in range(3):
        rates.before_step(Position(0, 1, 1))
        first.step()
        rates.after_step()
    assert rates.used == pytest.approx(0.04)
    second = optimizer()
    resumed = Rates(optimizer=second, schedule=StepLR(second, 2, 0.1))
    resumed.restore(rates.state())
    assert isinstance(resumed.schedule, StepLR) and resumed.schedule.last_epoch == 3
    assert resumed.used == rates.used


def test_without_a_schedule_rates_stay() -> None:
    made = optimizer()
    rates = Rates(optimizer=made, schedule=None)
    made.param_groups[0]["lr"] = 0.3  # by the user's hook, for instance
    rates.before_step(Position(9, 10, 10))
    rates.after_step()
    assert [group["lr"] for group in made.param_groups] == [0.3, 0.2] and rates.used == 0.3


def test_what_moves_is_no_setting() -> None:
    first, second = optimizer(), optimizer()
    one, other = StepLR(first, 2), StepLR(second, 2)
    first.step()
    one.step()
    assert describe_schedule(one) == describe_schedule(other) != describe_schedule(StepLR(optimizer(), 3))
    assert describe_schedule(Cosine())["kind"] == "Cosine" and describe_schedule(None) is None


def test_a_schedule_of_another_optimizer_is_refused() -> None:
    with pytest.raises(BitscapeError, match="the StepLR was built on another optimizer"):
        check_schedule(StepLR(optimizer(), 2), optimizer())
