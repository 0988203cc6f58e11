import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape import adapters

POLICY = bs.Policy(
    {
        "0": bs.LayerBits(8, 16),
        "1": bs.LayerBits(3, 8),
        "3": bs.LayerBits(4, 8),
        "4": bs.LayerBits.FLOAT,
    }
)


def test_each_module_gets_the_codes_of_its_width():
    assert adapters.to_executorch_arm(POLICY) == {
        "a8": {
            "1": {"weight_qmin": -3, "weight_qmax": 3},
            "3": {"weight_qmin": -7, "weight_qmax": 7},
        },
        "a16": {"0": {"weight_qmin": -127, "weight_qmax": 127}},
        "float": {"4": {}},
    }


def test_activations_of_other_widths_need_rounding():
    policy = bs.Policy({"a": bs.LayerBits(1, 4)})
    with pytest.raises(
        bs.BitscapeError, match=r"layer 'a': ExecuTorch's Arm backend has no 1/4 .* here 2/8"
    ):
        adapters.to_executorch_arm(policy)
    assert adapters.to_executorch_arm(policy, rounding="up")["a8"] == {
        "a": {"weight_qmin": -1, "weight_qmax": 1}
    }


def test_the_arm_quantizer_gives_the_weights_these_codes():
    arm = pytest.importorskip(
        "executorch.backends.arm.quantizer", reason="ExecuTorch's Arm backend is not installed"
    )
    from executorch.backends.arm.tosa.specification import TosaSpecification
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 10)
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    quantizer = arm.TOSAQuantizer(TosaSpecification.create_from_string("TOSA-1.0+INT"))
    policy = bs.Policy({"0": bs.LayerBits(8, 8), "1": bs.LayerBits(3, 8), "3": bs.LayerBits(4, 8)})
    for name, limits in adapters.to_executorch_arm(policy)["a8"].items():
        quantizer.set_module_name(name, arm.get_symmetric_quantization_config(**limits))
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    prepared(images)
    tensors = dict(convert_pt2e(prepared).named_buffers()).values()
    weights = [tensor for tensor in tensors if tensor.dtype == torch.int8]
    assert [int(weight.abs().max()) for weight in weights] == [127, 3, 7]
