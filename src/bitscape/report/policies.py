"""The policies of a report: which are the same, which one it is about, and what each is called."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from bitscape.cost.policy_cost import CAPS
from bitscape.policy import Policy
from bitscape.report.inputs import Inputs, TrainedRun

CONTROLS = ("uniform", "random")
"""Methods that others are compared with."""
UNNAMED, TIER, DYNAMIC = "method not recorded", "tier", "dynamic"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A policy, and the files that hold it."""

    names: tuple[str, ...]
    policy: Policy
    method: str
    """Name of the method, or what else it is: a tier, the largest widths of a dynamic network."""

    @property
    def name(self) -> str:
        """Of the first file."""
        return self.names[0]

    @property
    def is_widest(self) -> bool:
        """Whether images decide about these bits: they are the largest that any image gets."""
        return self.method.startswith(DYNAMIC)


def distinct(inputs: Inputs) -> tuple[Shown, ...]:
    """Put policies with equal bits together, in order of first appearance; what a file tells beside the bits is the first one's.

    Those of dynamic networks and of tiers stay apart from others with the same bits.
    """
    dynamic = {name: group_of(run) for name, run in inputs.runs.items() if run.dynamic is not None}
    tiers = {f"{name}/tier{at + 1}": TIER for name, tiers in inputs.tiers.items() for at in range(len(tiers.tiers))}
    special = {**dynamic, **tiers}
    found: list[list[str]] = []
    for name, policy in inputs.policies.items():
        alike = (
            names for names in found if inputs.policies[names[0]].layers == policy.layers and special.get(names[0]) == special.get(name)
        )
        same = next(alike, None)
        if same is None:
            found.append([name])
        else:
            same.append(name)
    return tuple(_shown(names, inputs.policies[names[0]], special.get(names[0])) for names in found)


def chosen(policies: tuple[Shown, ...]) -> Shown | None:
    """The first policy that is no control, else the first."""
    searched = (each for each in policies if not each.method.startswith(CONTROLS))
    return next(searched, policies[0] if policies else None)


def method_of(policy: Policy) -> str:
    """Name of the method, as far as the policy tells; uniform policies with their bits: "uniform 3/3"."""
    method = policy.provenance.get("method")
    inner = sorted(set(list(policy.layers.values())[1:-1]))  # first and last layer are pinned as a rule
    if method == "uniform" or (method is None and len(inner) == 1):
        return " ".join(["uniform", " and ".join(map(str, inner))]).strip()
    return method if isinstance(method, str) else UNNAMED


def group_of(run: TrainedRun) -> str:
    """What runs that belong together are called: "float", the method of their policy, or "dynamic" with the widths."""
    if run.dynamic is not None:
        return f"{DYNAMIC} {run.dynamic.low}-{run.dynamic.high}"
    if run.policy is None:
        return "float" if run.is_float else UNNAMED
    return method_of(run.policy)


def _shown(names: list[str], policy: Policy, special: str | None) -> Shown:
    return Shown(names=tuple(names), policy=policy, method=special or method_of(policy))


def caps_of(policy: Policy) -> dict[str, float]:
    """The absolute caps that a policy was found under; {} if it does not tell."""
    budget: Any = policy.provenance.get("budget")
    entries = budget.items() if isinstance(budget, Mapping) else ()
    return {kind: float(value) for kind, value in entries if kind in CAPS and type(value) in (int, float) and isfinite(value)}
