"""The quantizers, one a file; `Quantizer` is the list of them."""

from bitscape.quant.quantizers.base import Codes, FakeQuantizer, PerChannel, PerTensor, Sharing
from bitscape.quant.quantizers.dorefa import Dorefa
from bitscape.quant.quantizers.liq import Liq
from bitscape.quant.quantizers.lsq import Lsq
from bitscape.quant.quantizers.lsq_plus import LsqPlus
from bitscape.quant.quantizers.pact import Pact

Quantizer = Lsq | LsqPlus | Pact | Dorefa | Liq

__all__ = [
    "Codes",
    "Dorefa",
    "FakeQuantizer",
    "Liq",
    "Lsq",
    "LsqPlus",
    "Pact",
    "PerChannel",
    "PerTensor",
    "Quantizer",
    "Sharing",
]
