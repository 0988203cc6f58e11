"""Differentiable: a soft choice among bit-widths in every layer, trained together with the weights.

Paper     Cai, Vasconcelos: "Rethinking differentiable search for mixed-precision neural networks" (EdMIPS), CVPR 2020; Wang et al.:
          "Generalizable mixed-precision quantization via attribution rank preservation" (GMPQ), ICCV 2021, for a clip per candidate
Idea      Every layer mixes its weight, and its input, quantized to each candidate width. Gradient descent moves weights and shares
          together, so that the choice is made where training has already mended what it can. The proxy is what is trained on.
Computes  the mix, section 4 -> quant.mixture; expected cost -> soft_cost.SoftCost; one step -> mixed_network.MixtureStep
Departs   Starts from the trained float network with equal logits. The papers add eta * expected cost to the loss and tune eta until the
          result lands on the budget. Here the cost enters as a price on bits, set anew at every step so that the expected cost is the
          budget's: the mixture is trained where it will be used, and the logits hold what the task says alone. The policy is the exact
          allocation of S = -logit, made monotone in bits. Scales are LSQ's, one a candidate. Learning rates are ours.
Costs     epochs * (3 + R_w + R_a elementwise passes over training the float network); no copy of the network for each candidate.
Measured  docs/results-searches: transfer-policies, asga-ladder. docs/results: speed.
"""

from dataclasses import dataclass

from bitscape.engine import Step
from bitscape.searches.mixed_network import Mixed, MixtureStep
from bitscape.searches.mixture_search import MixtureSettings
from bitscape.searches.proxy_task import ProxyTask


@dataclass(frozen=True, kw_only=True)
class Differentiable(MixtureSettings):
    """Settings of the mixture search."""

    def make_step(self, mixed: Mixed, learned: ProxyTask) -> Step:
        """One pass over each batch."""
        return MixtureStep(mixed=mixed)
