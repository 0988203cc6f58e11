"""Mixed-precision quantization for vision networks: search the bits of each layer, calibrate or train, pack.

    problem = SearchProblem(model=model, images=images, budget="bitops=0.25x")
    policy = Fisher().search(problem).policy
    quantized = calibrate(quantize(model, policy), images)

A name is loaded when it is first used: `import bitscape` alone takes milliseconds and leaves torch out.
"""

from bitscape.version import __version__ as __version__

TYPE_CHECKING = False  # of typing, which is left out, too: Ctrl-C may come before `bitscape.cli.main` runs

_NAMES = {
    "cost.latency": ("LatencyTable",),
    "cost.layers": ("NetworkProfile", "measure"),
    "cost.policy_cost": ("policy_cost",),
    "cost.targets": ("TARGETS", "Target"),
    "data.batches": ("Batches", "Normalization"),
    "data.proxy": ("draw_proxy",),
    "data.sources": ("Dataset", "load_dataset"),
    "engine": ("Accuracy", "AdamW", "Cosine", "Sgd", "TrainResult", "evaluate"),
    "errors": ("BitscapeError",),
    "exporters.packed.file": ("load_packed", "save_packed"),
    "models.find": ("find_model", "load_weights"),
    "policy": ("LayerBits", "Policy", "PolicyError", "uniform_policy"),
    "quant.convert": ("calibrate", "quantize", "recalibrate_norms"),
    "quant.fold": ("fold_norms",),
    "quant.quantizers": ("Dorefa", "Liq", "Lsq", "LsqPlus", "Pact"),
    "quant.repair": ("equalize", "input_moments", "repair"),
    "searches.allocation": ("InfeasibleBudget", "allocate", "near_best", "pareto_front"),
    "searches.asga": ("Asga",),
    "searches.differentiable": ("Differentiable",),
    "searches.fisher": ("Fisher",),
    "searches.hawq": ("Hawq",),
    "searches.kl": ("Kl",),
    "searches.local": ("Local",),
    "searches.methods": ("METHODS", "SearchMethod"),
    "searches.problem": ("SearchProblem", "SearchResult"),
    "searches.random_policy": ("Random",),
    "searches.scores": ("ScoreTable",),
    "searches.seam": ("Seam",),
    "searches.topological": ("Topological",),
    "searches.uniform": ("Uniform",),
    "sharpness": ("Ball", "probe_sharpness", "top_eigenvalue"),
    "train": ("Loss", "Plain", "Sam", "Saq"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
"""Public name -> module that holds it. A submodule of the same name would take its place: hence no `train` here."""

if TYPE_CHECKING:
    from bitscape.cost.latency import LatencyTable as LatencyTable
    from bitscape.cost.layers import NetworkProfile as NetworkProfile
    from bitscape.cost.layers import measure as measure
    from bitscape.cost.policy_cost import policy_cost as policy_cost
    from bitscape.cost.targets import TARGETS as TARGETS
    from bitscape.cost.targets import Target as Target
    from bitscape.data.batches import Batches as Batches
    from bitscape.data.batches import Normalization as Normalization
    from bitscape.data.proxy import draw_proxy as draw_proxy
    from bitscape.data.sources import Dataset as Dataset
    from bitscape.data.sources import load_dataset as load_dataset
    from bitscape.engine import Accuracy as Accuracy
    from bitscape.engine import AdamW as AdamW
    from bitscape.engine import Cosine as Cosine
    from bitscape.engine import Sgd as Sgd
    from bitscape.engine import TrainResult as TrainResult
    from bitscape.engine import evaluate as evaluate
    from bitscape.errors import BitscapeError as BitscapeError
    from bitscape.exporters.packed.file import load_packed as load_packed
    from bitscape.exporters.packed.file import save_packed as save_packed
    from bitscape.models.find import find_model as find_model
    from bitscape.models.find import load_weights as load_weights
    from bitscape.policy import LayerBits as LayerBits
    from bitscape.policy import Policy as Policy
    from bitscape.policy import PolicyError as PolicyError
    from bitscape.policy import uniform_policy as uniform_policy
    from bitscape.quant.convert import calibrate as calibrate
    from bitscape.quant.convert import quantize as quantize
    from bitscape.quant.convert import recalibrate_norms as recalibrate_norms
    from bitscape.quant.fold import fold_norms as fold_norms
    from bitscape.quant.quantizers import Dorefa as Dorefa
    from bitscape.quant.quantizers import Liq as Liq
    from bitscape.quant.quantizers import Lsq as Lsq
    from bitscape.quant.quantizers import LsqPlus as LsqPlus
    from bitscape.quant.quantizers import Pact as Pact
    from bitscape.quant.repair import equalize as equalize
    from bitscape.quant.repair import input_moments as input_moments
    from bitscape.quant.repair import repair as repair
    from bitscape.searches.allocation import InfeasibleBudget as InfeasibleBudget
    from bitscape.searches.allocation import allocate as allocate
    from bitscape.searches.allocation import near_best as near_best
    from bitscape.searches.allocation import pareto_front as pareto_front
    from bitscape.searches.asga import Asga as Asga
    from bitscape.searches.differentiable import Differentiable as Differentiable
    from bitscape.searches.fisher import Fisher as Fisher
    from bitscape.searches.hawq import Hawq as Hawq
    from bitscape.searches.kl import Kl as Kl
    from bitscape.searches.local import Local as Local
    from bitscape.searches.methods import METHODS as METHODS
    from bitscape.searches.methods import SearchMethod as SearchMethod
    from bitscape.searches.problem import SearchProblem as SearchProblem
    from bitscape.searches.problem import SearchResult as SearchResult
    from bitscape.searches.random_policy import Random as Random
    from bitscape.searches.scores import ScoreTable as ScoreTable
    from bitscape.searches.seam import Seam as Seam
    from bitscape.searches.topological import Topological as Topological
    from bitscape.searches.uniform import Uniform as Uniform
    from bitscape.sharpness import Ball as Ball
    from bitscape.sharpness import probe_sharpness as probe_sharpness
    from bitscape.sharpness import top_eigenvalue as top_eigenvalue
    from bitscape.steps import Loss as Loss
    from bitscape.steps import Plain as Plain
    from bitscape.steps import Sam as Sam
    from bitscape.steps import Saq as Saq
else:  # a type checker that saw this function would let every name pass

    def __getattr__(name: str) -> object:
        if name in _HOME:
            import importlib

            return getattr(importlib.import_module(f"bitscape.{_HOME[name]}"), name)
        from bitscape.errors import nearest

        raise AttributeError(f"module 'bitscape' has no attribute {name!r}{nearest(name, _HOME)}")


__all__ = list(_HOME)  # one table holds the names


def __dir__() -> list[str]:
    return sorted([*_HOME, *globals()])
