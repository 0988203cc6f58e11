import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscape.cost.layers import measure
from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.models.prepare import prepare
from bitscape.models.products import MatMul, attend, product_names, products, refuse_products


class OneLinear(nn.Module):
    """Attention whose query, key and value come from one layer; with options of F.scaled_dot_product_attention."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(8, 24), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


def tokens(n: int = 3) -> Tensor:
    return torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(0))


def built(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def test_products_of_split_attention_have_names_and_leave_the_outputs():
    model = built(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    prepared = prepare(model, attention_products=True)
    assert list(products(prepared)) == ["self_attn.scores", "self_attn.values"]
    torch.testing.assert_close(prepared(tokens()), model(tokens()))
    assert "self_attn.scores" not in layer_shapes(prepare(model))


def test_attention_weights_that_are_asked_for_go_through_the_products():
    model = built(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    prepared, x = prepare(model, attention_products=True), tokens()
    for output, expected in zip(prepared(x, x, x), model(x, x, x), strict=True):
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.eye(5, dtype=torch.bool)},
                                     {"attn_mask": torch.linspace(-1, 1, 25).reshape(5, 5)}])  # fmt: skip
def test_fused_attention_of_own_modules_is_split(options):
    model = built(lambda: nn.Sequential(OneLinear(**options)))
    prepared = prepare(model, attention_products=True)
    assert layer_shapes(prepared) == {"0.qkv": (24, 8), "0.scores": (0,), "0.values": (0,)}
    torch.testing.assert_close(prepared(tokens()), model(tokens()))
    assert type(model[0]) is OneLinear


def test_grouped_queries_share_keys():
    q, k, v = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 3)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attend(torch.matmul, torch.matmul, q, k, v, enable_gqa=True), expected)


def test_a_second_preparation_changes_nothing():
    prepared = prepare(built(lambda: nn.Sequential(OneLinear())), attention_products=True)
    assert product_names(prepared) == []
    again = prepare(copy.deepcopy(prepared), attention_products=True)
    torch.testing.assert_close(again(tokens()), prepared(tokens()))
    assert layer_shapes(again) == layer_shapes(prepared)


def test_products_are_layers_without_weights_of_which_every_multiplication_counts():
    cost = measure(prepare(built(lambda: nn.Sequential(OneLinear())), attention_products=True), (5, 8))
    scores, values = cost.by_name["0.scores"], cost.by_name["0.values"]
    assert (scores.kind, scores.macs, scores.weights, scores.scales) == ("MatMul", 2 * 5 * 4 * 5, 0, 0)
    assert (scores.input_elements, values.input_elements, values.macs) == (2 * 5 * 4, 2 * 5 * 5, 2 * 5 * 5 * 4)
    assert cost.covered_macs == cost.total_macs


def test_what_does_not_take_products_says_so():
    with pytest.raises(BitscapeError, match=r"method kl does not take products of two activations \(0\)"):
        refuse_products(nn.Sequential(MatMul()), "method kl")


class Helped(nn.Module):
    """Attention in a method, of a module that uses both names of the products; its input is called by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, image: Tensor, shift: Tensor) -> Tensor:
        return self.out(self._attend(image) + shift)

    def _attend(self, x: Tensor) -> Tensor:
        self.scores = x.mean()
        return F.scaled_dot_product_attention(self.queries(x), self.keys(x), self.values(x))


def test_attention_in_a_method_is_found_and_layers_of_these_names_stay():
    model = built(lambda: nn.Sequential(Helped()))[0]
    prepared, x = prepare(model, attention_products=True), {"image": tokens(), "shift": torch.ones(3, 5, 8)}
    assert product_names(model) == list(products(prepared)) == ["scores_product", "values_product"]
    assert isinstance(prepared.values, nn.Linear)
    torch.testing.assert_close(prepared(**x), model(**x))
    assert list(inspect.signature(prepared.forward).parameters) == ["image", "shift"]
    cost = measure(prepared, {name: tensor[:1] for name, tensor in x.items()})
    assert cost.by_name["scores_product"].macs == cost.by_name["values_product"].macs == 5 * 5 * 8


def test_prepared_attention_is_pickled():
    prepared = prepare(built(lambda: nn.Sequential(OneLinear())), attention_products=True)
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(again(tokens()), prepared(tokens()))
    assert list(products(again)) == ["0.scores", "0.values"]


def test_networks_without_attention_are_refused_by_the_way_out():
    with pytest.raises(BitscapeError, match=r"no module of the network calls .*call bitscape\.models\.products\.MatMul"):
        prepare(nn.Sequential(nn.Linear(8, 8)), attention_products=True)
    prepare(nn.Sequential(nn.Linear(8, 8), MatMul()), attention_products=True)  # a product of the user's own is enough


def test_names_of_products_are_known_before_attention_is_split():
    model = built(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert product_names(model) == ["self_attn.scores", "self_attn.values"]
