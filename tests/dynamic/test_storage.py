import json

import pytest
import torch

from bitscape.cost.policy_cost import policy_cost
from bitscape.dynamic.build import dynamic_network
from bitscape.dynamic.network import DynamicBits, decide
from bitscape.dynamic.storage import load_dynamic, load_tiers, save_dynamic, save_tiers
from bitscape.dynamic.tiers import distill_tiers
from bitscape.errors import BitscapeError
from bitscape.models.find import load_weights
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import with_quantizers
from bitscape.quant.quantizers import Pact
from tests.dynamic.small import NAMES, dynamic, float_net, mixed_images, policy_of

pytestmark = pytest.mark.slow

IMAGES = mixed_images(64, seed=1)
BITS = [DynamicBits(), DynamicBits(low=3, high=5), DynamicBits(weights=True), DynamicBits(static=("0", "6"))]


def _varied(bits: DynamicBits | None = None):
    """A dynamic network whose decisions depend on the image."""
    network, generator = dynamic(bits), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in network.heads:
            head.linear.weight.copy_(2 * torch.randn(head.linear.weight.shape, generator=generator))
            head.linear.bias.fill_(4.0)
        network.shift.fill_(0.25)
    return network


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_a_dynamic_network_comes_back_to_the_bit_in_another_float_network(bits, tmp_path):
    network = _varied(bits)
    save_dynamic(network, tmp_path / "run")
    read = load_dynamic(float_net(seed=9), tmp_path / "run")
    before, after = decide(network, IMAGES), decide(read, IMAGES)
    assert len(before.activation.unique(dim=0)) > 2
    assert torch.equal(before.activation, after.activation) and torch.equal(before.weight, after.weight)
    with torch.no_grad():
        assert torch.equal(network(IMAGES), read(IMAGES))
    assert torch.equal(network.spent.bitops, read.spent.bitops)
    assert (read.bits, read.names, read.training) == (bits, network.names, False)
    assert float(read.shift) == 0.25


def test_the_folder_of_a_dynamic_network_is_json_and_safetensors(tmp_path):
    save_dynamic(_varied(DynamicBits(low=2, high=6)), tmp_path / "new" / "run")
    folder = tmp_path / "new" / "run"
    assert {path.name for path in folder.iterdir()} == {"dynamic.json", "policy.json", "model.safetensors"}
    about = {"format": 1, "low": 2, "high": 6, "weights": False, "static": None, "input_shape": [3, 8, 8]}
    assert json.loads((folder / "dynamic.json").read_text()) == about
    expected = dict(zip(NAMES, [LayerBits(8, 8), LayerBits(4, 6), LayerBits(4, 6), LayerBits(8, 8)], strict=True))
    assert Policy.load(folder / "policy.json").layers == expected


def _edited(folder, name, **entries):
    document = json.loads((folder / name).read_text()) | entries
    (folder / name).write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 2}, r"dynamic\.json: format: Input should be 1; this version reads format 1"),
        ({"format": "gone"}, r"dynamic\.json: format: Field required"),
        ({"low": "two"}, r"dynamic\.json: low: .*integer"),
        ({"low": 8}, r"dynamic\.json: low = 8, high = 8: .*low below high"),
        ({"static": ["none"]}, r"run: static: none is no layer"),
        ({"input_shape": [0, 8, 8]}, r"run: input_shape"),
        ({"input_shape": [3, 8, 8, 8]}, r"run: input_shape"),
        ({"extra": 1}, r"dynamic\.json: extra: Unexpected"),
        ({"low": 3}, "does not fit the network; not in the network: .*of_width"),
    ],
)
def test_a_folder_that_says_what_cannot_be_is_refused(tmp_path, entries, message):
    save_dynamic(_varied(), tmp_path / "run")
    _edited(tmp_path / "run", "dynamic.json", **entries)
    with pytest.raises(BitscapeError, match=message):
        load_dynamic(float_net(), tmp_path / "run")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(BitscapeError, match=r"no dynamic\.json; give a folder that holds one"):
        load_dynamic(float_net(), tmp_path)
    save_dynamic(_varied(), tmp_path)
    with pytest.raises(BitscapeError, match="does not fit the network; "):
        load_dynamic(float_net(channels=4), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BitscapeError, match=r"no model\.safetensors; the folder is not complete"):
        load_dynamic(float_net(), tmp_path)
    (tmp_path / "dynamic.json").write_text("{")
    with pytest.raises(BitscapeError, match=r"dynamic\.json: not readable as JSON"):
        load_dynamic(float_net(), tmp_path)


@pytest.fixture(params=[False, True], ids=["activations", "weights too"])
def tiered(request, tmp_path):
    """A dynamic network, its tiers, and the folder of these."""
    network = _varied(DynamicBits(weights=request.param))
    tiers = distill_tiers(network, IMAGES, count=3)
    save_tiers(tiers, tmp_path / "tiers", shares=[0.5, 0.25, 0.25])
    return network, tiers, tmp_path / "tiers"


def test_tiers_come_back_to_the_bit_in_another_float_network(tiered):
    _, tiers, folder = tiered
    read = load_tiers(float_net(seed=9), folder)
    with torch.no_grad():
        assert torch.equal(tiers(IMAGES), read(IMAGES))
    assert len(tiers.tiers.unique()) == 3 and torch.equal(tiers.tiers, read.tiers)
    assert torch.equal(tiers.spent.bits, read.spent.bits) and torch.equal(tiers.spent.bitops, read.spent.bitops)
    assert [policy.layers for policy in read.policies] == [policy.layers for policy in tiers.policies]
    assert not read.training


def test_each_tier_is_the_folder_of_a_static_network(tiered):
    _, tiers, folder = tiered
    for at, network in enumerate(tiers.networks):
        own = folder / f"tier{at + 1}"
        assert {path.name for path in own.iterdir()} == {"policy.json", "model.safetensors"}
        read = with_quantizers(float_net(seed=9), Policy.load(own / "policy.json"))
        load_weights(read, own / "model.safetensors")
        with torch.no_grad():
            assert torch.equal(read.eval()(IMAGES), network(IMAGES))


def test_the_summary_tells_what_each_tier_costs(tiered):
    network, tiers, folder = tiered
    about = json.loads((folder / "tiers.json").read_text())
    kinds = ("bitops", "mean_weight_bits", "mean_activation_bits")
    costs = [policy_cost(network.cost, policy) for policy in tiers.policies]
    shares = [0.5, 0.25, 0.25]
    assert about["tiers"] == [{kind: cost[kind] for kind in kinds} | {"share": share} for cost, share in zip(costs, shares, strict=True)]
    assert (about["format"], about["input_shape"], about["gate_bitops"]) == (1, [3, 8, 8], tiers.gate_bitops)
    assert Policy.load(folder / "tier2" / "policy.json").cost == costs[1]
    assert {path.name for path in folder.iterdir()} == {"tiers.json", "gate.safetensors", "tier1", "tier2", "tier3"}


def test_tiers_that_are_not_complete_are_refused(tiered):
    _, _, folder = tiered
    _edited(folder, "tiers.json", format=0)
    with pytest.raises(BitscapeError, match=r"tiers\.json: format: Input should be 1"):
        load_tiers(float_net(), folder)
    _edited(folder, "tiers.json", format=1, input_shape=[3, 0, 8])
    with pytest.raises(BitscapeError, match=r"tiers\.json: input_shape"):
        load_tiers(float_net(), folder)
    _edited(folder, "tiers.json", input_shape=[3, 8, 8])
    policy = (folder / "tier2" / "policy.json").read_text()
    (folder / "tier2" / "policy.json").write_text(policy.replace('"6"', '"7"'))
    with pytest.raises(BitscapeError, match=r"tier2.policy\.json: the network has no layer '7'"):
        load_tiers(float_net(), folder)
    (folder / "tier2" / "policy.json").write_text(policy)
    (folder / "tier3" / "policy.json").unlink()
    with pytest.raises(BitscapeError, match=r"tier3: no policy\.json; the folder is not complete"):
        load_tiers(float_net(), folder)
    (folder / "tiers.json").unlink()
    with pytest.raises(BitscapeError, match=r"no tiers\.json"):
        load_tiers(float_net(), folder)


def test_a_folder_holds_lsq_networks_only(tmp_path) -> None:
    images = mixed_images(16)
    network = dynamic_network(float_net(), policy_of(float_net()), images, quantizer=Pact())
    with pytest.raises(BitscapeError, match=r"quantized by \w+; folders hold LSQ only"):
        save_dynamic(network, tmp_path / "run")
    assert not (tmp_path / "run").exists()
