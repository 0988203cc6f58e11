import copy

import pytest
import torch

import bitscape.tuning.reconstruct as reconstruction
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine.checkpoint import CheckpointError
from bitscape.engine.task import Classes
from bitscape.errors import BitscapeError
from bitscape.tuning.reconstruct import Dropping, dropping, reconstruct
from tests.tuning.small import float_net, images, quantized

SEEN, HELD_OUT = Samples.of(images(16)), Samples.of(images(24)[16:])


def reconstructed(network, **settings):
    given = {"steps": 4, "batch_size": 8, **settings}
    return reconstruct(network, float_net(), SEEN, HELD_OUT, Classes(), **given)


def test_each_block_learns_the_float_block_from_what_the_quantized_network_gives_it(monkeypatch):
    network, float_network, told = quantized(float_net()), float_net(), []

    def see(module, data, *rest):
        told.append((module, data.samples.parts))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.01)

    monkeypatch.setattr(reconstruction, "_train", see)
    monkeypatch.setattr(reconstruction.Guard, "decide", lambda *_: None)
    reconstructed(network)
    assert [module for module, _ in told] == [network[0], *network[1], network[4]]
    with torch.no_grad():
        for number, (_, (part,)) in enumerate(told[:3]):
            before = [torch.nn.Sequential(*(net[0], *net[1])[:number]) for net in (network, float_network)]
            partner = (float_network[0], *float_network[1])[number]
            torch.testing.assert_close(part.inputs, before[0](images(16)))
            torch.testing.assert_close(part.targets, partner(before[1](images(16))))
        last = told[3][1][0]
        torch.testing.assert_close(last.inputs, network[:4](images(16)))
        torch.testing.assert_close(last.targets, float_network(images(16)))


def test_a_killed_reconstruction_goes_on_after_the_blocks_that_are_done(tmp_path, monkeypatch):
    made = quantized(float_net())
    whole, train, blocks = reconstructed(copy.deepcopy(made)), reconstruction._train, []

    def killed(module, *rest):
        blocks.append(module)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        train(module, *rest)

    monkeypatch.setattr(reconstruction, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        reconstructed(copy.deepcopy(made), folder=tmp_path)
    resumed = reconstructed(copy.deepcopy(made), folder=tmp_path)
    assert len(blocks) == 5  # of four, the third one twice
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match="steps was 4 and is 5"):
        reconstructed(copy.deepcopy(made), folder=tmp_path, steps=5)


def test_a_share_of_the_activations_stays_float():
    layer = quantized(float_net())[0]
    x = torch.full((2, 10_000), 0.3)
    rounded = layer.input_quantizer(x[0, :1]).detach()
    own = layer.input_quantizer
    with dropping(layer, 0.25), torch.random.fork_rng():
        torch.manual_seed(0)
        assert isinstance(layer.input_quantizer, Dropping)
        values = layer.input_quantizer(x).detach()
    assert layer.input_quantizer is own
    assert set(values.flatten().tolist()) == {float(x[0, 0]), float(rounded)}
    assert torch.equal(values[0], values[1])
    assert float((values == x).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_memory_bounds_the_samples(monkeypatch):
    monkeypatch.setattr(reconstruction, "HELD_BYTES", 5 * 2 * 4 * (3 * 6 * 6 + 4 * 4 * 4))  # of the first layer
    seen = []
    monkeypatch.setattr(reconstruction, "_train", lambda _, data, *rest: seen.append(len(data.samples)))
    reconstructed(quantized(float_net()))
    assert seen == [5] * 4


def test_a_step_has_fewer_samples_of_large_maps(monkeypatch):
    monkeypatch.setattr(reconstruction, "STEP_BYTES", 6 * 2 * 4 * 4 * 4 * 4)  # of 6 samples of a residual block
    sizes = []
    monkeypatch.setattr(reconstruction, "_train", lambda _, data, *rest: sizes.append(data.batch_size))
    reconstructed(quantized(float_net()))
    assert sizes == [4, 6, 6, 8]


def test_samples_of_several_shapes_are_taken(monkeypatch):
    seen = Samples([Minibatch(images(4)), Minibatch(torch.randn(4, 3, 8, 8))])
    reconstruct(quantized(float_net()), float_net(), seen, HELD_OUT, Classes(), steps=1)


@pytest.mark.parametrize("wrong", [{"drop": -0.1}, {"drop": 1.0}, {"steps": 0}, {"batch_size": 0}])
def test_an_argument_out_of_range_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(BitscapeError, match=f"{name} = {value}"):
        reconstructed(quantized(float_net()), **wrong)
