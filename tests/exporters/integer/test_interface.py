from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.graph import export_program
from bitscape.exporters.integer.interface import GraphInput, Interface, as_samples, checked_samples, example_of
from tests.networks import CALLED, drawn


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Anything(nn.Module):
    """Arguments of every kind; the output is called like an input."""

    def forward(self, first: Tensor, *rest: Tensor, flag: bool = False, **named: Pair) -> dict[str, Tensor]:
        total = first + sum(rest) + named["pair"].left
        return {"first": -total if flag else total, "shape": named["pair"].right}


def inputs_of(samples: int) -> dict[str, object]:
    pair = Pair(drawn(samples, 2), torch.ones(7))
    return {"first": drawn(samples, 2, seed=1), "flag": True, "pair": pair}


def test_arguments_of_every_kind_have_names():
    interface = Interface.of(Anything(), Samples.of(inputs_of(4)))
    assert interface.inputs == (
        GraphInput(name="first.input", key="first", batched=True),
        GraphInput(name="pair.left", key="pair.left", batched=True),
        GraphInput(name="pair.right", key="pair.right", batched=False),
    )
    assert interface.outputs == ("first", "shape")
    positional = Interface.of(nn.Bilinear(2, 2, 3), Samples.of((drawn(3, 2), drawn(3, 2))))
    assert positional.names == ("input1", "input2")
    with pytest.raises(BitscapeError, match=r"inputs: first, rest.0; the network was traced with first, pair.left, pair.right"):
        interface.tensors((drawn(4, 2), drawn(4, 2)))
    with pytest.raises(BitscapeError, match=r"they do not fit the network's forward\(first"):
        interface.tensors({"second": drawn(4, 2)})


def test_what_is_no_tensor_must_be_as_it_was_traced():
    interface = Interface.of(Anything(), Samples.of({"first": drawn(4, 2), "pair": Pair(drawn(4, 2), torch.ones(7))}))
    same = {"pair": Pair(drawn(3, 2), torch.ones(7)), "first": drawn(3, 2), "flag": False}  # which is the default
    assert [tensor.shape[0] for tensor in interface.tensors(same)] == [3, 3, 7]
    with pytest.raises(BitscapeError, match=r"'flag': True.* and .*'flag': False.* pass as tensors what changes"):
        interface.tensors({**same, "flag": True})


def test_feeds_are_arrays_by_name_in_batches_and_fixed_inputs_stay_whole():
    interface = Interface.of(Anything(), Samples.of(inputs_of(4)))
    feeds = list(interface.feeds(inputs_of(5), 3))
    assert [feed["first.input"].shape for feed in feeds] == [(3, 2), (2, 2)]
    assert all(feed["pair.right"].shape == (7,) for feed in feeds)
    assert (feeds[1]["pair.left"] == drawn(5, 2)[3:].numpy()).all()


@pytest.mark.slow
@pytest.mark.parametrize("network", ["anything", *CALLED])
def test_a_traced_graph_takes_the_tensors_in_order_and_gives_what_the_network_does(network):
    model = Anything() if network == "anything" else CALLED[network].network()
    inputs = inputs_of if network == "anything" else CALLED[network].inputs
    samples = as_samples(inputs(9))
    interface = Interface.of(model, samples)
    with torch.no_grad():
        module = export_program(model, interface, example_of(samples, model)).module()
    with torch.no_grad():
        outputs = module(*interface.tensors(inputs(5)))
        expected = Interface.of(model, as_samples(inputs(5)))
        assert expected.outputs == interface.outputs
        with interface.called_flat(model, inputs(5)):
            direct = model(*interface.tensors(inputs(5)))
    pairs = [(outputs, direct)] if isinstance(outputs, Tensor) else [(outputs[name], direct[name]) for name in interface.outputs]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Samples.of(drawn(1, 3, 8, 8)), "example: 1 images; give two at least"),
        (Samples.of((drawn(2, 3).double(), drawn(2, 3))), r"example\[0\]: torch.float64"),
        (torch.tensor(1.0), r"example: shape \(\)"),
    ],
)
def test_samples_that_cannot_be_traced_are_named(data, message):
    with pytest.raises(BitscapeError, match=message):
        checked_samples(data, nn.Linear(3, 3))
