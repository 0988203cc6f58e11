import pytest
import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.graph import trace
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.models.layers import layer_shapes
from bitscape.models.prepare import prepare
from bitscape.models.products import MatMul
from bitscape.policy import LayerBits, Policy, PolicyError, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.layers import static_bits
from bitscape.quant.repair import equalize, repair
from bitscape.searches.fisher import Fisher
from bitscape.searches.problem import SearchProblem
from bitscape.searches.sensitivity import layer_noise
from tests.models.test_products import OneLinear, built, tokens


class Squared(nn.Module):
    """x x' of tokens, by bitscape's module."""

    def __init__(self) -> None:
        super().__init__()
        self.product = MatMul()

    def forward(self, x):
        return self.product(x, x.transpose(1, 2))


def network() -> nn.Module:
    return built(lambda: nn.Sequential(OneLinear(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(40, 3)))


def test_both_operands_are_quantized_each_at_its_width():
    model = calibrate(with_quantizers(Squared(), Policy({"product": LayerBits(2, 8)})), tokens())
    assert static_bits(model.product) == LayerBits(2, 8)
    first, second = model.product.input_quantizer, model.product.weight_quantizer
    x = tokens()
    assert len(second(x).unique()) == 4
    assert torch.equal(model(x), first(x) @ second(x.transpose(1, 2)))


def test_a_policy_that_names_products_quantizes_them_and_others_do_not():
    model = network()
    names = layer_shapes(prepare(model, attention_products=True))
    with_products = with_quantizers(model, uniform_policy(names, LayerBits(8, 8)))
    assert static_bits(with_products[0].scores) == LayerBits(8, 8)
    without = with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(8, 8)))
    assert not hasattr(without[0], "scores")
    with pytest.raises(PolicyError, match=r"0\.scoers"):
        with_quantizers(model, uniform_policy([*layer_shapes(model), "0.scoers"], LayerBits(8, 8)))


def test_packed_files_hold_the_scales_of_both_operands(tmp_path):
    model = network()
    names = layer_shapes(prepare(model, attention_products=True))
    quantized = calibrate(with_quantizers(model, uniform_policy(names, LayerBits(3, 5))), tokens(16))
    save_packed(quantized, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", model)
    assert torch.equal(loaded(tokens()), quantized(tokens()))
    assert static_bits(loaded[0].values) == LayerBits(3, 5)


def test_graphs_are_refused_by_name():
    quantized = calibrate(with_quantizers(Squared(), Policy({"product": LayerBits(8, 8)})), tokens())
    with pytest.raises(BitscapeError, match=r"product are products of two activations .*use a packed file"):
        trace(quantized, tokens())


def test_noise_is_that_of_either_operand():
    noise = layer_noise(Squared(), ["product"], Samples.of(tokens()), (LayerBits(2, 4), LayerBits(4, 4)))["product"]
    a, b = tokens(), tokens().transpose(1, 2)
    by_second, by_first = noise.output_changes(a, b)
    quantized = calibrate(with_quantizers(Squared(), Policy({"product": LayerBits(2, 4)})), tokens())
    with torch.no_grad():
        torch.testing.assert_close(by_second[0], a @ (quantized.product.weight_quantizer(b) - b))
        torch.testing.assert_close(by_first[0], (quantized.product.input_quantizer(a) - a) @ b)
    assert float(by_second[1].norm()) < float(by_second[0].norm())


def test_fisher_scores_products():
    model = prepare(network(), attention_products=True)
    pairs = tuple(LayerBits(w, a) for w in (2, 8) for a in (2, 8))
    problem = SearchProblem.of(model, tokens(12), budget="bitops=0.4x", candidates=pairs, pinned={})
    table = Fisher(batch_size=4).score(problem)
    row = table.values[table.layers.index("0.scores")]
    assert row[0] > row[-1] > 0


def test_norms_and_equal_channels_pass_products_by():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Squared(), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    folded = fold_norms(model, tokens())
    assert isinstance(folded[3], nn.BatchNorm1d)
    assert equalize(model, tokens()).pairs == ()
    network = calibrate(with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(4, 8))), tokens())
    assert repair(network, model, tokens())(tokens()).shape == (3, 5, 3)


def test_packed_files_keep_float_products_float(tmp_path):
    model = network()
    names = layer_shapes(prepare(model, attention_products=True))
    policy = Policy({**uniform_policy(names, LayerBits(3, 5)).layers, "0.scores": LayerBits.FLOAT})
    quantized = calibrate(with_quantizers(model, policy), tokens(16))
    save_packed(quantized, tmp_path / "net.safetensors", policy=policy)
    loaded = load_packed(tmp_path / "net.safetensors", model)
    assert type(loaded[0].scores) is MatMul and static_bits(loaded[0].values) == LayerBits(3, 5)
    assert torch.equal(loaded(tokens()), quantized(tokens()))


def test_a_users_own_product_may_stay_float_in_a_packed_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Squared()).eval()
    quantized = calibrate(with_quantizers(model, Policy({"0": LayerBits(4, 8), "1.product": LayerBits.FLOAT})), tokens())
    save_packed(quantized, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", model)
    assert type(loaded[1].product) is MatMul and torch.equal(loaded(tokens()), quantized(tokens()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_quantizers_of_loaded_products_are_on_the_networks_device(tmp_path):
    model = network()
    names = layer_shapes(prepare(model, attention_products=True))
    save_packed(calibrate(with_quantizers(model, uniform_policy(names, LayerBits(3, 5))), tokens(16)), tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", model.cuda())
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize("make", [network, lambda: built(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))])
def test_a_refused_policy_leaves_the_network_as_it_is(make):
    model = make()
    names = layer_shapes(prepare(model, attention_products=True))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(PolicyError, match="gives no bits for"):
        with_quantizers(model, uniform_policy(list(names)[1:], LayerBits(8, 8)), inplace=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with_quantizers(model, uniform_policy(names, LayerBits(8, 8)), inplace=True)
    assert set(names) <= {name for name, _ in model.named_modules()}
