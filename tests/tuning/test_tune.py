import copy

import pytest
import torch
from torch import nn

import bitscape.tuning.tune as tuning
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine.checkpoint import CheckpointError
from bitscape.engine.task import Classes, Follow
from bitscape.errors import BitscapeError
from bitscape.tuning.learning import Shuffled, relative_error
from bitscape.tuning.tune import tune
from tests.tuning.small import float_net, images, quantized

SEEN, HELD_OUT = Samples.of(images(16)), Samples.of(images(24)[16:])


def tuned(network, float_network=None, **settings):
    return tune(network, float_network or float_net(), SEEN, HELD_OUT, Classes(), epochs=2, batch_size=8, **settings)


def test_the_network_learns_the_float_network_s_outputs_and_its_layers_outputs():
    network, float_network = quantized(float_net()), float_net()
    loss = tuning.FollowLayers(tuning.FollowFloat(float_network, Follow()), network)
    with loss.watching(), torch.no_grad():
        of_batch = loss.for_batch(images(8))
        value = of_batch(network(images(8)), None)
    float_outputs, outputs = {}, {}
    for kept, net in ((float_outputs, float_network), (outputs, network)):
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(lambda _m, _i, out, kept=kept, name=name: kept.update({name: out}))
        with torch.no_grad():
            net(images(8))
    errors = [relative_error(outputs[name], float_outputs[name]) for name in outputs]
    assert len(errors) == 6
    end = (outputs["4"] - float_outputs["4"]).square().mean() / 2
    torch.testing.assert_close(value, end + tuning.LAYERS * sum(errors) / 6)


def test_the_error_is_relative_to_the_variance():
    expected = torch.tensor([1.0, 3.0])  # variance 2
    torch.testing.assert_close(relative_error(expected + 4, expected), torch.tensor(8.0))
    assert float(relative_error(torch.ones(3), torch.ones(3))) == 0


def test_the_same_call_gives_the_same_network_and_goes_on_from_its_folder(tmp_path, monkeypatch):
    made = quantized(float_net())
    first = tuned(copy.deepcopy(made), folder=tmp_path)
    again = tuned(copy.deepcopy(made))
    monkeypatch.setattr(tuning.Batch, "backward", None)  # nothing is left to learn
    resumed = tuned(copy.deepcopy(made), folder=tmp_path)
    for network in (again, resumed):
        for name, value in first.state_dict().items():
            assert torch.equal(network.state_dict()[name], value), name
    assert not first.training and (tmp_path / "tune" / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    made, other = quantized(float_net()), float_net()
    tuned(copy.deepcopy(made), folder=tmp_path)
    with torch.no_grad():
        next(other.parameters()).mul_(0.5)
    with pytest.raises(CheckpointError, match=r"start was '.*' and is '.*'; pass those settings"):
        tuned(made, other, folder=tmp_path)


def test_codes_that_were_rounded_another_way_do_not_keep_a_run_from_going_on(tmp_path):
    """Another count of threads adds up in another order."""
    made = quantized(float_net())
    first = tuned(copy.deepcopy(made), folder=tmp_path).state_dict()
    with torch.no_grad():
        next(made.parameters()).add_(1e-7)
    assert all(torch.equal(value, first[name]) for name, value in tuned(made, folder=tmp_path).state_dict().items())


def test_batches_of_several_shapes_are_shuffled_each_and_skipped_where_they_are_done():
    parts = [Minibatch(torch.randn(n, size)) for n, size in ((5, 2), (4, 3))]
    data = Shuffled(Samples(parts), batch_size=2, seed=0)
    whole = [inputs for inputs, _ in data.epoch(1)]
    assert len(data) == len(whole) == 4  # a single sample joins the batch before it
    assert sorted(torch.cat(whole[:2])[:, 0].tolist()) == sorted(parts[0].inputs[:, 0].tolist())
    for start in range(5):
        left = [inputs for inputs, _ in data.epoch(1, start=start)]
        assert len(left) == 4 - start
        assert all(torch.equal(a, b) for a, b in zip(left, whole[start:], strict=True))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}])
def test_an_argument_out_of_range_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(BitscapeError, match=f"{name} = {value}"):
        tune(quantized(float_net()), float_net(), SEEN, HELD_OUT, Classes(), **wrong)
