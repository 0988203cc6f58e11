import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from bitscape.cost.layers import measure
from bitscape.cost.policy_cost import policy_cost
from bitscape.errors import BitscapeError
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.files import UNSEALED, sealed
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, PolicyError, uniform_policy
from bitscape.quant.convert import bypassed, calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact, PerChannel, PerTensor
from recipes.networks import resnet18

pytestmark = pytest.mark.slow

QUANTIZERS = [
    Lsq(),
    Lsq(weight_scales=PerTensor()),
    LsqPlus(),
    Pact(decay=3e-4),
    Dorefa(),
    Dorefa(restore_scale=False),
    Liq(),
    Liq(restore_scale=False),
]


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Hardswish(),
        nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4),
    )  # fmt: skip


def policy_for(model: nn.Module, bits=((8, 8), (3, 4), (1, 2), (5, 1))) -> Policy:
    names = layer_shapes(model)
    return Policy({name: LayerBits(*bits[index % len(bits)]) for index, name in enumerate(names)})


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(quantizer=QUANTIZERS[0]) -> nn.Module:
    model = small_net()
    return calibrate(with_quantizers(model, policy_for(model), quantizer), images())


def train_a_little(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A network and its file, which stay as they are."""
    model, path = quantized().eval(), tmp_path_factory.mktemp("packed") / "net.safetensors"
    save_packed(model, path)
    return model, path


@pytest.fixture
def saved(packed, tmp_path):
    """The network, and a copy of its file."""
    return packed[0], Path(shutil.copy(packed[1], tmp_path))


def rewrite(path, change) -> None:
    """Apply `change(tensors, header)` to a packed file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["bitscape"])
    tensors = safetensors.torch.load(content)
    change(tensors, header)
    header["checksum"] = UNSEALED
    path.write_bytes(sealed(safetensors.torch.save(tensors, {"bitscape": json.dumps(header)})))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_a_trained_network_comes_back_bit_for_bit(quantizer, tmp_path):
    model = quantized(quantizer)
    train_a_little(model)
    save_packed(model, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", small_net())
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(images(9)), model.eval()(images(9)))
        assert torch.equal(loaded.train()(images(9)), model.train()(images(9)))
    assert {n: static_bits(layer) for n, layer in quantized_layers(loaded).items()} == policy_for(model).layers


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_a_loaded_network_saves_to_the_same_bytes(quantizer, tmp_path):
    save_packed(quantized(quantizer), tmp_path / "first")
    save_packed(load_packed(tmp_path / "first", small_net()), tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


class NoReturn(nn.Sequential):
    """Its `train`, and so its `eval`, returns nothing."""

    def train(self, mode=True):
        super().train(mode)


def test_a_train_method_that_returns_nothing_is_no_obstacle(tmp_path):
    network = NoReturn(*quantized())
    network.eval()
    save_packed(network, tmp_path / "net")
    loaded = load_packed(tmp_path / "net", NoReturn(*small_net()))
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(images()), network(images()))


def test_channels_last_is_kept(tmp_path):
    model = quantized().to(memory_format=torch.channels_last).eval()
    save_packed(model, tmp_path / "net")
    loaded = load_packed(tmp_path / "net", small_net().to(memory_format=torch.channels_last))
    weight = loaded.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad
    assert torch.equal(loaded(images()), model(images()))


def test_loading_leaves_the_float_network_alone(saved):
    model = small_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_packed(saved[1], model)
    assert not quantized_layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", range(1, 9))
def test_measured_bytes_are_the_cost_models(bits, tmp_path):
    model = small_net()
    policy = policy_for(model, ((bits, 8),))
    info = save_packed(calibrate(with_quantizers(model, policy), images()), tmp_path / "net", policy=policy)
    assert info.weight_bytes == policy_cost(measure(model, (3, 8, 8)), policy)["weight_bytes"]
    assert info.file_bytes == (tmp_path / "net").stat().st_size
    stored = safetensors.torch.load_file(tmp_path / "net")
    assert info.weight_bytes + info.other_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_the_layout_is_that_of_pack_quantized(saved):
    model, path = saved
    tensors = safetensors.torch.load_file(path)
    # 3-bit depthwise: 9 weights a channel fill no whole word, so one row; 8-bit 27 weights a channel neither.
    assert tensors["0.weight_packed"].shape == (1, 8 * 27 * 8 // 32)
    assert tensors["3.weight_packed"].shape == (1, math.ceil(72 * 3 / 32))
    assert tensors["3.weight_scale"].shape == (8, 1)
    assert tensors["3.weight_shape"].tolist() == [8, 1, 3, 3]
    codes = model[3].weight_quantizer.codes(model[3].weight).q.flatten().int() + 4
    assert tensors["3.weight_packed"][0, 0].item() & 0b111_111 == codes[0].item() | codes[1].item() << 3
    with safetensors.safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["bitscape"])["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    groups = {group["weights"]["num_bits"]: group for group in config["config_groups"].values()}
    assert groups[3]["targets"] == ["3"]
    assert groups[1]["weights"]["zero_point"] == -0.5
    assert "zero_point" not in groups[3]["weights"]


def test_rows_hold_channels_where_they_fill_whole_words(tmp_path):
    model = nn.Linear(32, 6)
    policy = Policy({"": LayerBits(3, 8)})
    x = torch.randn(2, 32)
    q = calibrate(with_quantizers(model, policy), x)
    save_packed(q, tmp_path / "net")
    assert safetensors.torch.load_file(tmp_path / "net")["weight_packed"].shape == (6, 3)
    assert torch.equal(load_packed(tmp_path / "net", model)(x), q(x))


def test_the_policy_is_in_the_file_and_must_be_the_networks(tmp_path):
    model = quantized()
    policy = Policy(policy_for(model).layers, cost={"bitops": 7}, provenance={"method": "by hand"})
    save_packed(model, tmp_path / "net", policy=policy)
    with safetensors.safe_open(tmp_path / "net", "pt") as file:
        header = json.loads(file.metadata()["bitscape"])
    assert header["format"] == 1
    assert header["policy"]["cost"] == {"bitops": 7}
    assert header["policy"]["provenance"] == {"method": "by hand"}
    other = Policy({**policy.layers, "3": LayerBits(4, 4)})
    with pytest.raises(BitscapeError, match=r"policy: it gives 3 4/4 bits, the network has 3/4"):
        save_packed(model, tmp_path / "net", policy=other)


class Shared(nn.Module):
    """One layer twice, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.a
        self.norm = nn.BatchNorm1d(8)
        self.same_norm = self.norm
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.c(self.b(self.same_norm(self.again(self.norm(self.a(x))))))


def test_shared_and_tied_tensors_are_stored_once(tmp_path):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(16, 8)
    q = calibrate(with_quantizers(model, policy_for(model, ((4, 8),))), x).eval()
    info = save_packed(q, tmp_path / "net")
    assert info.weight_bytes == 2 * (8 * 8 * 4 // 8 + 8 * 4)
    keys = safetensors.torch.load_file(tmp_path / "net").keys()
    assert "a.weight_packed" in keys and "b.weight_packed" in keys and "norm.running_mean" in keys
    assert not any(key.startswith(("again.", "same_norm.", "c.weight")) for key in keys)
    loaded = load_packed(tmp_path / "net", Shared())
    assert torch.equal(loaded(x), q(x))
    assert loaded.c.weight is loaded.b.weight and loaded.again is loaded.a


def test_tied_layers_are_stored_once_also_after_training(tmp_path):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(16, 8)
    policy = policy_for(model, ((4, 8),))
    q = calibrate(with_quantizers(model, policy), x)
    q(x).square().sum().backward()
    with torch.no_grad():
        for parameter in q.parameters():
            parameter -= 0.01 * parameter.grad
    info = save_packed(q.eval(), tmp_path / "net")
    assert info.weight_bytes == policy_cost(measure(model, (8,)), policy)["weight_bytes"]
    assert torch.equal(load_packed(tmp_path / "net", Shared())(x), q(x))


def test_an_uncalibrated_network_is_an_error(tmp_path):
    with pytest.raises(BitscapeError, match=r"call bitscape\.quantize"):
        save_packed(with_quantizers(small_net(), policy_for(small_net())), tmp_path / "net")


class Unused(nn.Module):
    """A layer that the forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(8, 4), nn.Linear(300, 10)

    def forward(self, x):
        return self.used(x)


def test_bytes_of_a_layer_that_is_never_called_count(tmp_path):
    model, x = Unused(), torch.randn(4, 8)
    network = measure(model, (8,))
    policy = Policy({"used": LayerBits(4, 8), "spare": LayerBits(8, 8)})
    info = save_packed(calibrate(with_quantizers(model, policy), x), tmp_path / "net")
    assert info.weight_bytes == policy_cost(network, policy)["weight_bytes"] == 32 * 4 // 8 + 4 * 4 + 3000 + 4 * 10


class TiedToFloat(nn.Module):
    """An embedding, which stays float, whose weight is also that of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 8), nn.Linear(8, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_a_weight_that_is_also_used_in_float_keeps_both_forms(tmp_path):
    model, x = TiedToFloat(), torch.tensor([[0, 3], [5, 1]])
    q = calibrate(with_quantizers(model, Policy({"head": LayerBits(2, 8)})), [x]).eval()
    save_packed(q, tmp_path / "net")
    assert torch.equal(load_packed(tmp_path / "net", TiedToFloat())(x), q(x))


def test_attention_comes_back(tmp_path):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    names = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["linear1", "linear2"]
    q = calibrate(with_quantizers(model, Policy(dict.fromkeys(names, LayerBits(4, 8)))), x).eval()
    save_packed(q, tmp_path / "net")
    assert torch.equal(load_packed(tmp_path / "net", model)(x), q(x))


def test_a_network_whose_norms_are_folded_after_training_comes_back(tmp_path):
    model = quantized()
    with torch.no_grad():
        for index in (1, 6):
            model[index].weight.uniform_(0.5, 2.0)
    train_a_little(model)
    folded = fold_norms(model.eval(), images())
    save_packed(folded, tmp_path / "net")
    for float_model in (fold_norms(small_net().eval(), images()), small_net()):
        loaded = load_packed(tmp_path / "net", float_model)
        assert torch.equal(loaded(images(9)), folded(images(9)))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())


def test_norms_that_a_file_lacks_without_a_bias_for_each_are_missing(tmp_path):
    class Normed(nn.Module):
        def __init__(self, norms):
            super().__init__()
            self.layer, self.norms = nn.Linear(3, 3), nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(norms)))

        def forward(self, x):
            return self.norms(self.layer(x))

    x = torch.randn(8, 3)
    q = calibrate(with_quantizers(Normed(0).eval(), Policy({"layer": LayerBits(4, 8)})), x).eval()
    save_packed(q, tmp_path / "net")
    assert torch.equal(load_packed(tmp_path / "net", Normed(1))(x), q(x))  # as if its norm had been folded
    with pytest.raises(BitscapeError, match=r"tensor norms.0.weight of float_model is missing.*build the network as"):
        load_packed(tmp_path / "net", Normed(2))


def test_a_resnet18_takes_hardly_more_than_its_payload(tmp_path):
    model = fold_norms(resnet18().eval(), torch.zeros(1, 3, 64, 64))
    names = list(layer_shapes(model))
    policy = Policy({name: LayerBits(2 + index % 5, 4) for index, name in enumerate(names)})
    info = save_packed(calibrate(with_quantizers(model, policy), torch.randn(1, 3, 64, 64)), tmp_path / "net")
    assert info.weight_bytes == policy_cost(measure(model, (3, 224, 224)), policy)["weight_bytes"]
    payload = sum(layer.weights * policy.layers[layer.name].weight for layer in measure(model, (3, 224, 224)).layers) / 8
    assert info.file_bytes <= 1.02 * payload


# What can be wrong with a network to be saved.


def test_a_float_network_is_an_error(tmp_path):
    with pytest.raises(BitscapeError, match="no quantized layer"):
        save_packed(small_net(), tmp_path / "net")


def test_a_weight_of_nan_is_an_error_with_the_layers_name(tmp_path):
    model = quantized()
    model[3].weight.data[0] = math.nan
    with pytest.raises(BitscapeError, match=r"layer 3: .*9 values NaN"):
        save_packed(model, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_half_precision_weights_are_an_error(tmp_path):
    with pytest.raises(BitscapeError, match=r"model.float\(\)"):
        save_packed(quantized().to(torch.bfloat16), tmp_path / "net")


def test_an_input_scale_of_nan_is_an_error(tmp_path):
    model = quantized()
    model[3].input_quantizer.scale.data.fill_(math.nan)
    with pytest.raises(BitscapeError, match=r"3\.input_quantizer\.scale is NaN"):
        save_packed(model, tmp_path / "net")


def test_a_bypassed_network_is_an_error(tmp_path):
    model = quantized()
    with bypassed(model, "input_quantizer"), pytest.raises(BitscapeError, match=r"layer 0: .*Identity"):
        save_packed(model, tmp_path / "net")
    with bypassed(model, "weight_quantizer"), pytest.raises(BitscapeError, match=r"layer 0: .*no codes"):
        save_packed(model, tmp_path / "net")


def test_scales_along_inputs_are_an_error(tmp_path):
    model = calibrate(with_quantizers(small_net(), policy_for(small_net()), Lsq(weight_scales=PerChannel(1))), images())
    with pytest.raises(BitscapeError, match=r"scales of shape \(1, 3, 1, 1\)"):
        save_packed(model, tmp_path / "net")


def test_state_that_is_no_tensor_is_an_error(tmp_path):
    model = quantized()
    model[2].__class__ = type("Stateful", (nn.ReLU,), {"get_extra_state": lambda self: {"any": "object"}})
    with pytest.raises(BitscapeError, match=r"2\._extra_state of its state dict is a dict"):
        save_packed(model, tmp_path / "net")


# What can be wrong with a file.


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(BitscapeError, match="nowhere: no such file"):
        load_packed(tmp_path / "nowhere", small_net())


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_an_error(saved, kept):
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(BitscapeError, match="not a complete safetensors file"):
        load_packed(saved[1], small_net())


def test_a_file_of_float_weights_is_an_error(tmp_path):
    safetensors.torch.save_file(small_net().state_dict(), tmp_path / "net")
    with pytest.raises(BitscapeError, match="no packed file"):
        load_packed(tmp_path / "net", small_net())


def test_a_pickle_is_refused(tmp_path):
    torch.save(small_net().state_dict(), tmp_path / "net")
    with pytest.raises(BitscapeError, match="not a complete safetensors file"):
        load_packed(tmp_path / "net", small_net())


def change_header(change):
    return lambda tensors, header: change(header)


def change_tensors(change):
    return lambda tensors, header: change(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_header(lambda h: h.update(format=2)), "packed format 2 is unknown"),
        (change_header(lambda h: h.pop("policy")), "header is damaged"),
        (change_header(lambda h: h["layers"].pop("3")), "header is damaged"),
        (change_header(lambda h: h["layers"]["3"]["input"].update(kind="other")), "layer '3': input is .*'kind' is lsq, "),
        (change_header(lambda h: h["layers"]["3"]["input"].update(decay="much")), "layer '3': input: decay is 'much'; allowed are numbers"),
        (change_header(lambda h: h["layers"]["3"].update(zero_point=1e308)), "layer '3': zero_point is 1e.308; allowed are 0 and -0.5"),
        (change_header(lambda h: h["layers"]["3"].update(zero_point=None)), "layer '3': zero_point is None"),
        (change_header(lambda h: h["layers"]["3"].update(scales="row")), "layer '3': scales is 'row'; allowed are 'channel' and 'tensor'"),
        (change_header(lambda h: h["policy"].update(cost={"bitops": "many"})), "cost 'bitops' is 'many'"),
        (change_header(lambda h: h["policy"].update(fingerprint=7)), "fingerprint is 7; allowed are a text or null"),
        (change_header(lambda h: h["layers"]["3"].update(same_weight_as="none")), "header is damaged"),
        (change_header(lambda h: h["policy"]["layers"]["3"].update(weight=9)), "weight bits are 9"),
        (change_tensors(lambda t: t.pop("3.weight_packed")), "tensor 3.weight_packed is missing"),
        (change_tensors(lambda t: t.pop("1.running_mean")), "tensor 1.running_mean of float_model is missing"),
        (change_tensors(lambda t: t.update(extra=torch.ones(1))), "float_model has no tensor extra"),
        (change_tensors(lambda t: t.update({"3.bias": torch.ones(3)})), "3.bias is .3, torch.float32., the network"),
        (change_tensors(lambda t: t.update({"3.bias": torch.ones(8).half()})), "3.bias is .8, torch.float16."),
        (change_tensors(lambda t: t.update({"3.weight_shape": torch.tensor([8, 9])})), r"3.weight_shape is \[8, 9\]"),
        (change_tensors(lambda t: t.update({"3.weight_packed": torch.ones(9)})), "3.weight_packed is .9, torch"),
        (change_tensors(lambda t: t.update({"3.weight_scale": torch.ones(4, 1)})), "3.weight_scale is .4, 1, torch"),
        (change_tensors(lambda t: t["3.weight_scale"].fill_(math.nan)), "3.weight_scale holds values that are NaN"),
        (change_tensors(lambda t: t["3.weight_scale"].fill_(0)), "3.weight_scale holds values that are NaN"),
        (change_tensors(lambda t: t["3.input_quantizer.scale"].fill_(math.inf)), "3.input_quantizer.scale is NaN"),
    ],
)
def test_a_damaged_file_is_an_error(saved, change, message):
    rewrite(saved[1], change)
    with pytest.raises(BitscapeError, match=message) as error:
        load_packed(saved[1], small_net())
    assert str(saved[1]) in str(error.value)


def test_a_changed_bit_is_noticed_wherever_it_is(saved):
    content, model = saved[1].read_bytes(), small_net()
    for at in [*range(0, 400, 7), *range(400, len(content), 211), len(content) - 1]:
        saved[1].write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(BitscapeError, match=str(saved[1])):
            load_packed(saved[1], model)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('\\"zero_point\\"', '\\"scales\\":\\"tensor\\",\\"zero_point\\"', "'scales' stands twice"),
        ('\\"fingerprint\\":\\"', '\\"fingerprint\\":NaN,\\"x\\":\\"', "NaN is no allowed number"),
    ],
)
def test_json_in_the_header_is_read_strictly(saved, old, new, message):
    content = saved[1].read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].decode().replace(old, new, 1).encode()
    assert len(header) > length
    saved[1].write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(BitscapeError, match=message):
        load_packed(saved[1], small_net())


def test_a_header_that_is_no_json_is_an_error(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "net", {"bitscape": "{"})
    with pytest.raises(BitscapeError, match="header is damaged"):
        load_packed(tmp_path / "net", small_net())


def test_another_network_is_an_error_with_the_nearest_names(tmp_path):
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return next(self.children())(x)

    named = with_quantizers(Named("classifier"), Policy({"classifier": LayerBits(4, 4)}))
    save_packed(calibrate(named, torch.randn(2, 4)), tmp_path / "net")
    with pytest.raises(PolicyError, match="no layer 'classifier'; nearest: classifier2"):
        load_packed(tmp_path / "net", Named("classifier2"))


def test_another_shape_under_the_same_names_is_an_error(saved):
    other = small_net()
    other[10] = nn.Linear(20, 5)
    with pytest.raises(PolicyError, match="weight shapes do not"):
        load_packed(saved[1], other)


def test_a_quantized_network_to_load_into_is_an_error(saved):
    with pytest.raises(BitscapeError, match="float_model: its layer '0' is quantized already"):
        load_packed(saved[1], saved[0])


def test_saving_over_a_file_leaves_no_other_files(saved):
    save_packed(saved[0], saved[1])
    assert [entry.name for entry in saved[1].parent.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_scales_of_tiny_weights_survive(quantizer, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e-28)
        model[0].bias.zero_()
        model[0].weight[1] = 0.0
    network = calibrate(with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(8, 8)), quantizer), images()).eval()
    save_packed(network, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", model)
    assert torch.equal(loaded[0].weight, network[0].weight_quantizer(network[0].weight))
    assert torch.equal(loaded(images()), network(images()))
    if getattr(quantizer, "restore_scale", True):
        expected = model[0].weight - (model[0].weight.mean() if isinstance(quantizer, Liq) else 0.0)
        torch.testing.assert_close(loaded[0].weight[0] * 1e28, expected[0] * 1e28, rtol=0.02, atol=0.02)


def test_a_float_model_of_another_type_is_refused(saved):
    with pytest.raises(BitscapeError, match=r"float_model: parameter 0\.weight is torch\.bfloat16; .* call float_model\.float\(\)"):
        load_packed(saved[1], small_net().bfloat16())


def test_a_buffer_that_is_an_expanded_view_comes_back(tmp_path):
    def with_table(value: float) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 3))
        model.register_buffer("table", torch.full((1, 1), value).expand(2, 3))
        return model

    model = with_table(7.0)
    save_packed(calibrate(with_quantizers(model, policy_for(model)), torch.randn(8, 4)), tmp_path / "packed.safetensors")
    assert load_packed(tmp_path / "packed.safetensors", with_table(0.0)).table.tolist() == [[7.0] * 3] * 2


def test_bytes_of_scales_are_those_of_output_channels(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 5, 1)).eval()
    policy = Policy({"0": LayerBits(8, 8), "1": LayerBits(4, 8), "2": LayerBits.FLOAT})
    info = save_packed(calibrate(with_quantizers(model, policy), images()), tmp_path / "net.safetensors")
    assert info.scale_bytes == 4 * (4 + 6)
    assert info.weight_bytes == 3 * 4 + 4 * 6 * 4 // 2 + info.scale_bytes
