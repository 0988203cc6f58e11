"""From a mixture to scores of bit-widths, and to the policy that they give so far; what a search keeps in its folder."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitscape.engine.checkpoint import changes
from bitscape.engine.describe import describe
from bitscape.engine.step import Part
from bitscape.engine.workers import is_first
from bitscape.errors import BitscapeError
from bitscape.files import parse_json, read_limited, write_atomic
from bitscape.folders import CHECKPOINT, POLICY_FILE, SEARCH_FILE, results_in
from bitscape.models.modes import evaluating
from bitscape.policy import LayerBits, Policy
from bitscape.progress import track
from bitscape.quant.mixture import Mixture
from bitscape.searches.allocation import allocate
from bitscape.searches.mixed_network import Mixed
from bitscape.searches.problem import Pick, SearchProblem, SearchResult
from bitscape.searches.proxy_task import ProxyTask
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import Trace, candidate_widths, finish, score_table

_log = logging.getLogger("bitscape.searches")

Readout = Literal["probability", "drop-one", "keep-one"]
LEAN = 1e-9
"""What a further width is worth where the mixture has nothing to say of it."""
READ_IMAGES = 256
"""Proxy images on which a width is dropped or kept."""


def read_out(readout: Readout, problem: SearchProblem, method: str, mixed: Mixed, task: ProxyTask) -> ScoreTable:
    """Return the scores of the trained mixture; the score of a pair is the sum of those of its two widths.

    "probability": -log of what the width's share would be without the price of bits. "drop-one": minus the rise of the loss
    when the layer does without the width.
    "keep-one": the loss when the layer has this width alone, above the mixture's.
    """
    if readout == "probability":
        return probability_scores(problem, method, mixed)
    by_weight, by_input = _rescored(readout, mixed, task)
    return _table(problem, method, by_weight, by_input)


def probability_scores(problem: SearchProblem, method: str, mixed: Mixed) -> ScoreTable:
    """Return -log softmax of the logits: the shares without the price of bits, which the allocation puts in its own way."""
    by_weight, by_input = ([-mixture.logits.detach().double().log_softmax(0) for mixture in of] for of in (mixed.weights, mixed.inputs))
    return _table(problem, method, *(np.stack([row.cpu().numpy() for row in rows]) for rows in (by_weight, by_input)))


def _table(problem: SearchProblem, method: str, by_weight: NDArray[np.float64], by_input: NDArray[np.float64]) -> ScoreTable:
    """Scores (G, R_w) and (G, R_a) of groups as a table of layers and pairs; the layers of a group share its score."""
    by_layer = {}
    for group, of_weight, of_input in zip(problem.choices.freedom.groups, by_weight, by_input, strict=True):
        pairs = (leaning(of_weight)[:, None] + leaning(of_input)[None]) / len(group)
        by_layer.update(dict.fromkeys(group, pairs))
    ordered = {name: by_layer[name] for name in problem.free_layers}
    return score_table(method, problem.choices, ordered)


def leaning(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores that never rise with more bits, and fall by next to nothing where they were level: bits that cost nothing are taken."""
    from_above, from_below = np.maximum.accumulate(scores[::-1])[::-1], np.minimum.accumulate(scores)
    return (from_above + from_below) / 2 - LEAN * np.arange(len(scores))


def _rescored(readout: Readout, mixed: Mixed, task: ProxyTask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    loss = partial(proxy_loss, mixed.model, task.parts(READ_IMAGES))
    whole, every = loss(), [*mixed.weights, *mixed.inputs]
    rows = [_row(readout, mixture, loss, whole) for mixture in track(every, label="readout: mixture")]
    count = len(mixed.weights)
    return np.array(rows[:count]), np.array(rows[count:])


def _row(readout: Readout, mixture: Mixture, loss: Callable[[], float], whole: float) -> list[float]:
    """Scores of a mixture's widths. Widths above those that a policy within the caps can have are as good as the best of them."""
    allowed = mixture.price.isfinite().tolist()
    row: list[float] = []
    for at in range(len(allowed)):
        others = [place for place in range(len(allowed)) if allowed[place] and place != at]
        if not allowed[at]:
            row.append(min(row, default=0.0))
        elif not others:
            row.append(0.0)
        else:
            dropped = [at] if readout == "drop-one" else others
            with _without(mixture, dropped):
                change = loss() - whole
            row.append(-change if readout == "drop-one" else change)
    return row


@contextmanager
def _without(mixture: Mixture, dropped: list[int]) -> Iterator[None]:
    """Within the block the widths `dropped` have no share."""
    saved = mixture.logits.detach().clone()
    try:
        with torch.no_grad():
            mixture.logits[dropped] = -math.inf
        yield
    finally:
        with torch.no_grad():
            mixture.logits.copy_(saved)


def proxy_loss(model: nn.Module, parts: Sequence[Part]) -> float:
    """Mean proxy loss of the network in eval mode, as it stands."""
    with evaluating(model):
        losses = [part.loss(part.task.read(part.outputs(model), len(part)), part.targets) for part in parts]
    return sum(float(loss) * part.share for loss, part in zip(losses, parts, strict=True))


def search_in_folder(
    problem: SearchProblem,
    settings: Any,
    scored: Callable[[Path | None], tuple[ScoreTable, Trace]],
    *,
    pick: Pick,
    folder: str | os.PathLike[str] | None,
) -> SearchResult:
    """Score by a training whose checkpoint the folder keeps, allocate, and leave the policy there.

    `scored` gets the folder. Raises BitscapeError for one that is of another search.
    """
    where = None if folder is None else Path(folder)
    claim(where, problem, settings)  # here, too: where nothing is to be decided, nothing is trained
    result = finish(problem, settings, lambda: scored(where), pick)
    keep_policy(result.policy, where)
    return result


def keep_policy(policy: Policy, folder: Path | None) -> None:
    """Write policy.json into the folder, once for all workers."""
    if folder is not None and is_first():
        folder.mkdir(parents=True, exist_ok=True)
        policy.save(folder / POLICY_FILE)


def claim(folder: Path | None, problem: SearchProblem, method: Any) -> None:
    """Note in the folder what its checkpoints are of.

    Raises BitscapeError if they are of another search, naming the difference, and if it holds results of anything but a search.
    """
    if folder is None:
        return
    asked, note = json.loads(json.dumps(_asked(problem, method))), folder / SEARCH_FILE
    if note.is_file() and any(folder.glob(f"*/{CHECKPOINT}")):
        if changed := changes(_noted(note), asked):
            raise BitscapeError(f"folder {folder} is of another search: {changed}; give another folder, or delete this one")
    elif not note.is_file() and (held := results_in(folder)):
        raise BitscapeError(f"folder {folder} holds {', '.join(held)}, and not of a search; give another folder")
    elif is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps(asked, indent=2) + "\n")


def _noted(note: Path) -> Mapping[str, Any]:
    try:
        document = parse_json(read_limited(note))
        if not isinstance(document, Mapping):
            raise ValueError("it holds no JSON object")
        return document
    except ValueError as error:
        raise BitscapeError(f"{note}: {error}; give another folder, or delete this one") from error


def _asked(problem: SearchProblem, method: Any) -> dict[str, Any]:
    """What decides how the mixture is trained, in the user's words where there are some; readout and pick come after."""
    about = problem.provenance(method)
    return {
        "method": about["method"],
        "settings": {name: value for name, value in about["settings"].items() if name != "readout"},
        "seed": problem.seed,
        "pinned": {name: str(bits) for name, bits in problem.choices.freedom.pinned.items()},
        "tied": [" ".join(group) for group in problem.choices.freedom.groups if len(group) > 1],
        "candidates": _offered(problem.choices.candidates),
        "budget": about["budget"],
        "model": describe(problem.prepared),
        "images": describe([part.inputs for part in problem.samples.parts]),
        "targets": [describe(part.targets) for part in problem.samples.parts],
        "task": describe(problem.task),
    }


def _offered(candidates: Sequence[LayerBits]) -> str:
    """Widths where all their pairs are offered, as the command line takes them, else the pairs."""
    by_weight, by_input = candidate_widths(tuple(candidates))
    if len(candidates) < len(by_weight) * len(by_input):
        return " ".join(sorted(map(str, candidates)))
    return f"w={','.join(map(str, by_weight))};a={','.join(map(str, by_input))}"


@dataclass(kw_only=False)
class Progress:
    """What a running search has come to: after each epoch the policy so far, in the trace and in the folder."""

    problem: SearchProblem
    method: Any
    """Settings of the search."""
    mixed: Mixed
    folder: Path | None
    policy: Policy | None = field(default=None, init=False)

    def after_epoch(self, epochs: int) -> dict[str, float]:
        """Allocate from the shares so far; write policy.json into the folder; leave the mixture at the price of its last logits.

        However the search reads out and picks at its end: its provenance says so.
        """
        problem, before, provenance = self.problem, self.policy, self.problem.provenance(self.method)
        self.mixed.keep_budget()
        scores = probability_scores(problem, provenance["method"], self.mixed)
        policy = allocate(scores, problem.choices)
        so_far = f"after epoch {epochs} of {self.method.epochs}, by readout probability and pick best"
        self.policy = replace(policy, provenance={**policy.provenance, **provenance, "so_far": so_far})
        keep_policy(self.policy, self.folder)
        record = {f"expected_{kind}": used for kind, used in self.mixed.expected_cost().items()}
        record["layers_changed"] = float(len(problem.free_layers if before is None else self.policy.difference(before)))
        return record
