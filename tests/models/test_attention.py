import copy
import importlib.util
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.models.attention import SplitAttention, split_attention
from bitscape.models.find import import_torchvision
from bitscape.models.layers import quantizable_layers
from bitscape.models.prepare import as_prepared
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers

N, L, S, E, HEADS = 2, 5, 7, 8, 2


def _attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, HEADS, **options)
    for parameter in attention.parameters():  # the biases start at zero
        nn.init.normal_(parameter, std=0.5)
    return attention.eval()


def _inputs(layout: str, kdim: int = E, vdim: int = E) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = {"unbatched": lambda n: (n,), "batch_first": lambda n: (N, n), "sequence_first": lambda n: (n, N)}
    shape = shapes[layout]
    return [torch.randn(*shape(L), E), torch.randn(*shape(S), kdim), torch.randn(*shape(S), vdim)]


def _assert_same(attention: nn.MultiheadAttention, inputs: list[Tensor], **options) -> None:
    split = split_attention(copy.deepcopy(attention))
    assert isinstance(split, SplitAttention)
    expected, expected_weights = attention(*inputs, **options)
    output, weights = split(*inputs, **options)
    torch.testing.assert_close(output, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("layout", ["unbatched", "batch_first", "sequence_first"])
@pytest.mark.parametrize("options", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 6}, {"bias": False}], ids=str)
def test_output_and_weights_equal_the_original(layout, options, sizes):
    attention = _attention(batch_first=layout == "batch_first", **sizes)
    inputs = _inputs(layout, sizes.get("kdim", E), sizes.get("vdim", E))
    _assert_same(attention, inputs, **options)


@pytest.mark.parametrize("layout", ["unbatched", "batch_first", "sequence_first"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("masked", ["padding", "pairs", "pairs per head", "both"])
def test_masks_equal_the_original(layout, need_weights, kind, masked):
    attention = _attention(batch_first=layout == "batch_first")
    batch = 1 if layout == "unbatched" else N

    def mask(*shape: int) -> Tensor:
        if kind == "float":
            return torch.randn(*shape)
        ignored = torch.rand(*shape) < 0.5
        ignored[..., 0] = False  # a fully ignored row has no softmax
        return ignored

    padding = mask(S) if layout == "unbatched" else mask(N, S)
    options = {"key_padding_mask": padding} if masked in ("padding", "both") else {}
    if masked != "padding":
        options["attn_mask"] = mask(batch * HEADS, L, S) if masked == "pairs per head" else mask(L, S)
    _assert_same(attention, _inputs(layout), need_weights=need_weights, **options)


@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_equals_the_fused_path(need_weights):
    attention, x = _attention(batch_first=True), torch.randn(N, L, E)
    with torch.no_grad():
        _assert_same(attention, [x, x, x], need_weights=need_weights)


def test_causal_hint_equals_the_original():
    x = torch.randn(N, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    for need_weights in (True, False):
        options = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
        _assert_same(_attention(batch_first=True), [x, x, x], **options)
    with pytest.raises(BitscapeError, match="without attn_mask"):
        split_attention(_attention())(x, x, x, is_causal=True)


def test_gradients_equal_the_original():
    attention, x = _attention(), torch.randn(L, N, E)
    split = split_attention(copy.deepcopy(attention))
    attention(x, x, x)[0].square().sum().backward()
    split(x, x, x)[0].square().sum().backward()
    parts = torch.cat([split.q_proj.weight.grad, split.k_proj.weight.grad, split.v_proj.weight.grad])
    torch.testing.assert_close(parts, attention.in_proj_weight.grad)
    torch.testing.assert_close(split.out_proj.bias.grad, attention.out_proj.bias.grad)


def test_dropout_acts_in_training_only():
    split = split_attention(_attention(dropout=0.5))
    inputs = _inputs("sequence_first")
    for need_weights in (True, False):
        assert torch.equal(split(*inputs, need_weights=need_weights)[0], split(*inputs, need_weights=need_weights)[0])
    split.train()
    for need_weights in (True, False):
        assert not torch.equal(split(*inputs, need_weights=need_weights)[0], split(*inputs, need_weights=need_weights)[0])


def test_keeps_dtype_mode_and_what_is_frozen():
    attention = _attention().to(torch.float64).train()
    attention.in_proj_weight.requires_grad_(False)
    split = split_attention(attention)
    assert split.training
    assert split.q_proj.weight.dtype == torch.float64
    assert not split.k_proj.weight.requires_grad
    assert split.k_proj.bias.requires_grad


def test_drawing_random_numbers_is_not_needed():
    attention = _attention()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    split_attention(attention)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_extra_keys_are_refused_before_anything_changes(option):
    model = nn.Sequential(_attention(), _attention(**{option: True}))
    with pytest.raises(BitscapeError, match=option):
        split_attention(model)
    assert type(model[0]) is nn.MultiheadAttention


def _encoder(batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=batch_first, norm_first=norm_first)
    nested = batch_first and not norm_first
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layer_runs_all_four_layers_and_equals_the_original(batch_first, norm_first):
    original = _encoder(batch_first, norm_first).layers[0]
    split = split_attention(copy.deepcopy(original))
    called = []
    for name, layer in quantizable_layers(split).items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    x = torch.randn(N, L, E)
    with torch.no_grad():
        torch.testing.assert_close(split(x), original(x))
    projections = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")]
    assert called == [*projections, "linear1", "linear2"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch says so once a process, in the original
def test_encoder_with_padding_equals_the_original_where_nothing_is_padded():
    original = _encoder()
    split = split_attention(copy.deepcopy(original))
    x, padding = torch.randn(N, L, E), torch.zeros(N, L, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        expected = original(x, src_key_padding_mask=padding)
        output = split(x, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], expected[~padding])


class _SmallViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, E, 4, stride=4)
        self.encoder = _encoder()
        self.head = nn.Linear(E, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(images).flatten(2).transpose(1, 2)).mean(dim=1))


def test_small_vit_equals_the_original_and_a_second_call_changes_nothing():
    original = _SmallViT().eval()
    model = copy.deepcopy(original)
    assert split_attention(model) is model
    images = torch.randn(N, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images), original(images))
    modules = list(model.modules())
    split_attention(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert len(quantizable_layers(model)) == 2 + 2 * (4 + 2)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 6}, {"bias": False}], ids=str)
@pytest.mark.parametrize("copied", [False, True])
def test_loads_the_state_dict_of_the_float_network_and_its_own(sizes, copied):
    attention = _attention(**sizes)
    target = nn.Sequential(split_attention(nn.MultiheadAttention(E, HEADS, **sizes)))
    target = (copy.deepcopy(target) if copied else target).eval()
    state = nn.Sequential(attention).state_dict()
    keys = list(state)
    target.load_state_dict(state)
    assert list(state) == keys
    inputs = _inputs("sequence_first", sizes.get("kdim", E), sizes.get("vdim", E))
    torch.testing.assert_close(target[0](*inputs)[0], attention(*inputs)[0])
    again = nn.Sequential(split_attention(nn.MultiheadAttention(E, HEADS, **sizes)))
    again.load_state_dict(target.state_dict())
    assert torch.equal(again[0].k_proj.weight, target[0].k_proj.weight)


def test_shared_attention_stays_shared():
    attention = _attention()
    model = nn.ModuleDict({"a": attention, "b": attention})
    split_attention(model)
    assert isinstance(model["a"], SplitAttention)
    assert model["a"] is model["b"]


def test_a_subclass_is_left_alone_and_named_in_the_log(caplog):
    class Own(nn.MultiheadAttention):
        pass

    model = nn.Sequential(Own(E, HEADS))
    with caplog.at_level(logging.WARNING, logger="bitscape.models"):
        split_attention(model)
    assert type(model[0]) is Own
    assert "0: Own is no plain nn.MultiheadAttention" in caplog.text


def test_autocast_with_a_mask():
    split = split_attention(_attention(batch_first=True))
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[:, -1] = True
    for need_weights in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = split(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        exact, _ = split(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(output.float(), exact, atol=0.1, rtol=0.1)


class ShiftedWindowAttention(nn.Module):
    """What torchvision's module of this name does with its layers."""

    __module__ = "torchvision.models.swin_transformer"

    def __init__(self, *, clears: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.clears = nn.Linear(E, 3 * E), nn.Linear(E, E), clears

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if self.clears:
            bias = bias.clone()
            bias[E : 2 * E].zero_()
        q, k, v = nn.functional.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        return nn.functional.linear((q @ k.mT).softmax(-1) @ v, self.proj.weight, self.proj.bias)


class BiasedAttention(nn.Module):
    """What the attention of timm's BEiT does: the bias of `qkv` is put together from parts, `proj` is called."""

    __module__ = "timm.models.beit"

    def __init__(self, *, biased: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E)
        self.parts = nn.ParameterList(torch.randn(E) for _ in range(3)) if biased else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = None if self.parts is None else torch.cat(list(self.parts))
        joined = self.qkv(x) if bias is None else nn.functional.linear(x, weight=self.qkv.weight, bias=bias)
        q, k, v = joined.chunk(3, dim=-1)
        scores = q @ k.mT if mask is None else q @ k.mT + mask
        return self.proj(scores.softmax(-1) @ v)


@pytest.mark.parametrize("biased", [False, True])
def test_every_layer_is_called_once_also_where_some_were_called_before(biased: bool):
    torch.manual_seed(0)
    original = nn.Sequential(BiasedAttention(biased=biased))
    called, x, counts = as_prepared(original), torch.randn(N, L, E), {"qkv": 0, "proj": 0}
    torch.testing.assert_close(called(x), original(x))
    torch.testing.assert_close(called[0](x, mask=torch.ones(L, L).tril()), original[0](x, mask=torch.ones(L, L).tril()))

    def count(name: str) -> None:
        counts[name] += 1

    for name in counts:
        called[0].get_submodule(name).register_forward_hook(lambda *_, name=name: count(name))
    called(x)
    assert counts == {"qkv": 1, "proj": 1}


@pytest.mark.parametrize("clears", [False, True])
def test_a_module_that_reads_weights_calls_its_layers_instead(clears: bool):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(E, E), ShiftedWindowAttention(clears=clears))
    x = torch.randn(N, L, E)
    called = as_prepared(original)
    torch.testing.assert_close(called(x), original(x))
    for name in ("qkv", "proj"):
        layer, inputs = called[1].get_submodule(name), []
        layer.register_forward_hook(lambda layer, args, output, inputs=inputs: inputs.append(args[0]))
        called(x)
        assert len(inputs) == 1
    uncalled: list[Tensor] = []
    original[1].qkv.register_forward_hook(lambda *_: uncalled.append(x))
    original(x)
    assert uncalled == []  # the original is as it was


def test_layers_that_are_called_keep_their_names_and_weights_and_can_be_copied():
    original = nn.Sequential(nn.Linear(E, E), ShiftedWindowAttention())
    called = split_attention(copy.deepcopy(original))
    assert called.state_dict().keys() == original.state_dict().keys()
    assert list(quantizable_layers(called)) == ["0", "1.qkv", "1.proj"]
    assert type(split_attention(copy.deepcopy(called))[1]) is type(called[1])


def test_layers_that_are_called_compute_with_their_quantized_weights():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(E, E), ShiftedWindowAttention())
    x = torch.randn(64, L, E)
    quantized = calibrate(with_quantizers(original, uniform_policy(quantizable_layers(original), LayerBits(2, 8))), x)
    with torch.no_grad():
        at_two_bits = quantized(x)
        quantized[1].qkv.weight_quantizer = nn.Identity()
        assert not torch.equal(quantized(x), at_two_bits)


def _assert_each_layer_is_called_once(original: nn.Module, *inputs: Tensor, already: bool = False) -> None:
    """And the outputs stay; `already` by the original."""
    original.eval()
    before, after = Counter[str](), Counter[str]()
    split = split_attention(copy.deepcopy(original))
    with torch.no_grad():
        expected = original(*inputs)
        torch.testing.assert_close(split(*inputs), expected, rtol=1e-4, atol=1e-5)
        for network, calls in ((copy.deepcopy(original), before), (split, after)):
            for name, layer in network.named_modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(lambda *_, name=name, calls=calls: calls.update([name]))
            network(*inputs)
    linears = [name for name, layer in original.named_modules() if isinstance(layer, nn.Linear)]
    assert after == dict.fromkeys(linears, 1)
    assert (before == after) == already


def _randomized(module: nn.Module) -> nn.Module:
    """With every parameter drawn, for biases start at zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture
def torchvision() -> Any:
    if importlib.util.find_spec("torchvision") is None:  # pytest.importorskip fails where its compiled part does not load
        pytest.skip("torchvision is not installed")
    return import_torchvision()


@pytest.fixture
def timm(torchvision: Any) -> Any:
    return pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_swin_of_torchvision(name: str, torchvision: Any) -> None:
    torch.manual_seed(0)
    _assert_each_layer_is_called_once(torchvision.models.get_model(name), torch.randn(1, 3, 64, 64))


def test_swin_v2_of_timm(timm: Any) -> None:
    torch.manual_seed(0)
    _assert_each_layer_is_called_once(timm.create_model("swinv2_tiny_window8_256"), torch.randn(1, 3, 256, 256))


def test_attention_of_beit(timm: Any) -> None:
    torch.manual_seed(0)
    attention = timm.models.beit.Attention(16, num_heads=2, qkv_bias=True, window_size=(2, 2))
    _assert_each_layer_is_called_once(_randomized(attention), torch.randn(2, 5, 16))


@pytest.mark.parametrize("options", [{}, {"gated": True, "scale_norm": True, "norm_layer": nn.LayerNorm}], ids=str)
def test_attention_of_eva(options: dict[str, Any], timm: Any) -> None:
    torch.manual_seed(0)
    attention = timm.models.eva.EvaAttention(16, num_heads=2, **{"scale_norm": False, **options})
    _assert_each_layer_is_called_once(_randomized(attention), torch.randn(2, 5, 16))


@pytest.mark.parametrize("options", [{"qkv_bias_separate": True}, {"qkv_bias": False}, {"qkv_fused": False}], ids=str)
def test_attention_of_eva_that_calls_its_layers_itself(options: dict[str, Any], timm: Any) -> None:
    torch.manual_seed(0)
    attention = timm.models.eva.EvaAttention(16, num_heads=2, scale_norm=False, **options)
    _assert_each_layer_is_called_once(_randomized(attention), torch.randn(2, 5, 16), already=True)
