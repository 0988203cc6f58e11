"""Trained runs in groups, and each group against the best uniform one."""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitscape.policy import Policy
from bitscape.report.differences import Difference, mean_difference
from bitscape.report.inputs import TrainedRun
from bitscape.report.policies import caps_of, group_of
from bitscape.words import counted, listed

UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but their seeds."""

    method: str
    caps: Mapping[str, float]
    """Of the budget; {} where the policy does not tell."""
    recipe: str
    """All other settings of training, as text."""
    top1: Mapping[int, float]
    """Seed -> top-1 in percent; of runs that share a seed the mean."""
    policy: Policy | None = None
    """Of its first run; None in float."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.top1.values())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A group against the best uniform one, over the seeds that both have."""

    own: Group
    reference: Group
    seeds: tuple[int, ...]
    difference: Difference | None
    """In points of top-1; None without a seed in common."""


def groups(runs: Iterable[TrainedRun]) -> list[Group]:
    """Group the runs that have ended, have a seed, and were validated.

    Those of a group share method, budget and recipe.
    """
    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    caps: dict[str, Mapping[str, float]] = {}
    policies: dict[tuple[str, str, str], Policy | None] = {}
    for run in runs:
        if run.ended and run.top1 is not None and run.seed is not None:
            own = caps_of(run.policy) if run.policy else {}
            text = json.dumps(own, sort_keys=True)
            caps[text] = own
            key = (group_of(run), text, recipe_of(run))
            policies.setdefault(key, run.policy)
            by_seed = found.setdefault(key, {})
            by_seed.setdefault(run.seed, []).append(run.top1)
    return [
        Group(
            method=method,
            caps=caps[text],
            recipe=recipe,
            top1={seed: statistics.fmean(same) for seed, same in by_seed.items()},
            policy=policies[method, text, recipe],
        )
        for (method, text, recipe), by_seed in found.items()
    ]


def recipe_of(run: TrainedRun) -> str:
    """The settings of training as text, without bits and seeds."""
    return json.dumps(_without_seeds(run.settings), sort_keys=True)


def comparisons(found: Iterable[Group]) -> list[Comparison]:
    """Compare each group with the best uniform one of its recipe and budget.

    A budget that is not recorded fits any.
    Groups without such a uniform one are left out, and so are float networks.
    """
    found = list(found)
    compared = []
    for own in found:
        uniform = (
            []
            if own.method.startswith((UNIFORM, "float"))
            else [other for other in found if _comparable(own, other)]
        )
        if uniform:
            best = max(
                uniform, key=lambda other: (len(own.top1.keys() & other.top1.keys()), other.mean)
            )
            seeds = tuple(sorted(own.top1.keys() & best.top1.keys()))
            pairs = [own.top1[seed] - best.top1[seed] for seed in seeds]
            difference = mean_difference(pairs) if pairs else None
            compared.append(Comparison(own=own, reference=best, seeds=seeds, difference=difference))
    return compared


def verdict(compared: Comparison) -> str:
    """Say in one sentence what a comparison tells."""
    own, reference, found = compared.own.method, compared.reference.method, compared.difference
    if found is None or found.interval is None:
        shared = (
            "no seed"
            if found is None
            else f"one seed, where {own} has {found.mean:+.2f} points of top-1"
        )
        return (
            f"No interval can be given: {own} and {reference} share {shared}; "
            "train both with two or more same seeds."
        )
    low, high = found.interval
    interval = f"95 % interval {low:+.2f} to {high:+.2f}"
    over = f"in the mean of {counted(found.n, 'pair')} of runs with the same seed"
    if not found.is_seen:
        return (
            f"No difference seen between {own} and {reference}: {found.mean:+.2f} points of "
            f"top-1 {over}, and the {interval} holds zero."
        )
    answer, where = ("Yes", "ahead of") if found.mean > 0 else ("No", "behind")
    size = abs(found.mean)
    return (
        f"{answer}: {own} is {where} {reference} by {size:.2f} points of top-1 {over} ({interval})."
    )


def why_none(found: Iterable[Group]) -> str:
    """Say why nothing could be compared.

    There is no uniform run, or runs differ in more than their bits.
    """
    found = list(found)
    uniform = [group for group in found if group.method.startswith(UNIFORM)]
    mixed = [group for group in found if not group.method.startswith((UNIFORM, "float"))]
    if not uniform or not mixed:
        lacking = "with mixed bits" if uniform else "with uniform bits"
        return (
            f"No ended run {lacking} that was validated; give folders of both: "
            "bitscape train --policy ... --validation ... --out FOLDER"
        )
    other = next((group for group in uniform if group.recipe != mixed[0].recipe), None)
    if other is None:
        return "Uniform and mixed runs have other budgets; train both within the same"
    names = _differing(json.loads(mixed[0].recipe), json.loads(other.recipe))
    differing = listed(names[:4])
    return f"Uniform and mixed runs were trained otherwise ({differing} differ); train both alike"


def _comparable(own: Group, other: Group) -> bool:
    same_budget = own.caps == other.caps or not own.caps or not other.caps
    return other.method.startswith(UNIFORM) and own.recipe == other.recipe and same_budget


def _without_seeds(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in ("seed", "bits")}
    return {
        name: _without_seeds(value) if isinstance(value, Mapping) else value
        for name, value in kept.items()
    }


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ."""
    found = []
    for name in dict.fromkeys([*one, *other]):
        here, there = one.get(name), other.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += _differing(here, there, f"{prefix}{name}.")
        elif here != there:
            found.append(f"{prefix}{name}")
    return found
