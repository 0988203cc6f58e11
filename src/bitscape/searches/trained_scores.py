"""Trained scores: the loss when one layer of a jointly trained network changes its width.

Paper     Tang, Ouyang, Wang, Zhu et al.: "Mixed-precision neural network quantization via learned
          layer-wise importance" (LIMPQ), ECCV 2022, arXiv 2203.08368, for one joint training and
          the allocation by its learned steps; Huang, Liu, Xia, Zhao, Ren: "Nearly lossless adaptive
          bit switching" (Double Rounding), arXiv 2502.01199, for one network that switches widths
Idea      Scores of the float network know nothing of what training repairs. A network that was
          trained at many widths does: its weights, and the scale of each width, are those of a
          network that runs at these bits. One short training serves every layer and width.
Computes  three passes a step -> joint_network.JointStep; the rise of the loss of one layer's move
          -> loss_rises; the law s 4^-b of the rises -> fitted; learned steps -> step_sizes
Departs   From LIMPQ: one training in which weights are shared and each width has a scale of its
          own, an importance for each layer and width, the sum of both tensors' importances, the
          integer programme. Its importance is the learned step (`readout="step-size"`). Ours: the
          loss as the score, on a held-out part of the proxy with norms estimated anew, in one unit
          for weights and activations; one sensitivity for each of the two tensors of a layer; bits
          drawn near the widest uniform policy of the budget, each bit away half as likely, where
          LIMPQ draws evenly; the widest bits and that uniform policy in every step, where LIMPQ
          takes every uniform policy, and the sandwich rule of slimmable networks the widest and the
          narrowest; scales that start at the squared-error optimum and learn at a tenth of the
          rate, where LIMPQ starts those of all layers alike; a scale for each channel of a weight,
          whose mean is the step. Codes of one width are not shifts of another's, as they are in
          Double Rounding. A pair costs the sum of what its two widths cost. A width that no cap
          depends on stays as it is in the uniform policy, and the table forbids others.
Costs     epochs * 3 times training the quantized network on the proxy, then R_w + R_a passes a
          layer over 256 images and the held-out part; fitted to neighbors, at most 4 passes a
          layer.
Measured  docs/results: depthwise-cifar10. Its rows "loss" score every width as measured. At the
          bytes of 2-bit weights 2.6 points ahead of uniform bits after training, three seeds, and
          not ahead of fisher, which takes seconds; at the BitOps of W3A3, one seed, level with
          uniform and below fisher. Rises from one width to the next are a hundredth, and so is the
          noise of 500 held-out images; hence the fit. Repaired and not trained, "fitted" / "loss" /
          fisher: 79.7 78.7 79.4 (fitted to the move to 8 bits, too) and 79.2 79.0 79.2 at these
          bytes, 76.9 75.7 77.0 at W3A3. No network was trained at the policies of "fitted" and
          "step-size".
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, cast

import numpy as np
from torch import nn

from bitscape.data.samples import Minibatch, Samples
from bitscape.engine import Sgd, train
from bitscape.engine.settings import check_rates
from bitscape.errors import BitscapeError, at_least_one, check_choices
from bitscape.policy import LayerBits, fingerprint
from bitscape.progress import track
from bitscape.quant.convert import recalibrate_norms
from bitscape.quant.switched import Switched
from bitscape.searches.joint_network import JointNetwork, JointStep, Pairs, joint_network
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult, name_of
from bitscape.searches.proxy_task import Learned, ProxyTask, proxy_task
from bitscape.searches.readout import leaning, proxy_loss, search_in_folder
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import Trace, candidate_widths

SCALE_RATE = 0.1
"""Learning rate of scales over that of weights.

At the full rate, scales of eight bits cross zero and their channels die.
"""
NORM_IMAGES = 256
"""Images of the training part on which norms are estimated anew, for each score."""

WidthScores = tuple[dict[int, float], dict[int, float]]
"""Weight bits -> score, and activation bits -> score, of one group of layers."""


@dataclass(frozen=True, kw_only=True)
class TrainedScores:
    """One joint training, then scores of the trained network."""

    epochs: int = 4
    """Passes over the training part of the proxy."""
    batch_size: int = 64
    """Images a step, over all workers."""
    lr: float = 0.01
    """Learning rate of weights; that of scales is a tenth."""
    held_out: float = 0.25
    """Share of the proxy that is not trained on, and on which the loss is measured."""
    readout: Literal["fitted", "loss", "step-size"] = "fitted"
    """What becomes the score of a width: the rise of the loss by the law of quantization noise,
    fitted to the neighbors of the uniform width; the rise as measured; or the learned step."""
    task: Learned = "auto"
    """What the proxy teaches: its labels, or the float network's outputs; see `proxy_task`."""
    head_epochs: int = 3
    """Passes that warm a new classifier up before bits move."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick", "folder"})

    def __post_init__(self) -> None:
        """Check every field."""
        check_choices(self)
        at_least_one(epochs=self.epochs, batch_size=self.batch_size, head_epochs=self.head_epochs)
        check_rates(lr=self.lr)
        if not 0 < self.held_out < 1:
            raise BitscapeError(
                f"held_out = {self.held_out}: a share of the proxy above 0 and below 1; "
                "0.25 is usual"
            )

    def search(
        self,
        problem: SearchProblem,
        *,
        pick: Pick = "best",
        folder: str | os.PathLike[str] | None = None,
    ) -> SearchResult:
        """Train, score every free layer and width, then allocate bits exactly within the budget.

        `folder` keeps the checkpoint and the policy: the same search goes on from there.
        """
        scored = partial(self._scored, problem)
        return search_in_folder(problem, self, scored, pick=pick, folder=folder)

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The table of scores alone, around the uniform bits of the problem's budget."""
        return self._scored(problem, None)[0]

    def _scored(self, problem: SearchProblem, folder: Path | None) -> tuple[ScoreTable, Trace]:
        whole = proxy_task(
            problem,
            self.task,
            batch_size=self.batch_size,
            head_epochs=self.head_epochs,
            folder=folder,
        )
        learned, held_out = whole.split(self.held_out)
        assert held_out is not None, "the share is above 0"
        network = joint_network(problem, learned.model)
        result = train(
            network.model,
            learned.batches,
            step=JointStep(network=network, seed=problem.seed),
            optimizer=Sgd(lr=self.lr, quantizer_lr=SCALE_RATE * self.lr),
            task=learned.task,
            loss=learned.loss,
            channels_last=problem.channels_last,
            epochs=self.epochs,
            folder=None if folder is None else folder / "search",
            start=problem.prepared,
            seed=problem.seed,
        )
        by_group = self._read_out(network, learned, held_out)
        return _table(problem, name_of(self), network.allowed, by_group), result.records

    def _read_out(
        self, network: JointNetwork, learned: ProxyTask, held_out: ProxyTask
    ) -> list[WidthScores]:
        if self.readout == "step-size":
            return step_sizes(network)
        if self.readout == "loss":
            return loss_rises(network, learned, held_out, neighbors=False)
        return fitted(network, loss_rises(network, learned, held_out, neighbors=True))


def step_sizes(network: JointNetwork) -> list[WidthScores]:
    """The learned step of every width that a group may have, summed over its layers.

    The step of a weight is the mean over its channels.
    """
    return [
        (
            {
                bits: sum(_step(layer.weight_quantizer, bits) for layer in layers)
                for bits in weights
            },
            {
                bits: sum(_step(layer.input_quantizer, bits) for layer in layers)
                for bits in activations
            },
        )
        for layers, (weights, activations) in zip(network.groups, _widths(network), strict=True)
    ]


def loss_rises(
    network: JointNetwork, learned: ProxyTask, held_out: ProxyTask, *, neighbors: bool
) -> list[WidthScores]:
    """The rise of the held-out loss when one group alone takes another width than the center.

    Widths are all that the group may have, or the two `neighbors` of the one at the center. Norms
    are estimated anew on the first images of the part that was learned.
    """
    norm_images = Samples([Minibatch(learned.data.inputs).rows(slice(0, NORM_IMAGES))])
    parts = held_out.parts(len(held_out.data))

    def loss(at: int, bits: LayerBits) -> float:
        network.use([*network.center[:at], bits, *network.center[at + 1 :]])
        recalibrate_norms(network.model, norm_images)
        return proxy_loss(network.model, parts)

    rises, at_center = list[WidthScores](), loss(0, network.center[0])
    every = track(_widths(network), label="trained scores: layer")
    for at, ((weights, activations), center) in enumerate(zip(every, network.center, strict=True)):
        if neighbors:
            weights = _around(weights, center.weight)
            activations = _around(activations, center.activation)
        pairs = [LayerBits(bits, center.activation) for bits in weights]
        by_weight = [0.0 if pair == center else loss(at, pair) - at_center for pair in pairs]
        pairs = [LayerBits(center.weight, bits) for bits in activations]
        by_input = [0.0 if pair == center else loss(at, pair) - at_center for pair in pairs]
        rises.append(
            (
                dict(zip(weights, by_weight, strict=True)),
                dict(zip(activations, by_input, strict=True)),
            )
        )
    return rises


def _around(widths: Sequence[int], center: int) -> list[int]:
    at = widths.index(center)
    return list(widths[max(0, at - 1) : at + 2])


def fitted(network: JointNetwork, rises: Sequence[WidthScores]) -> list[WidthScores]:
    """Scores s 4^-b of every width b that a group may have, with the s >= 0 that fits best.

    A rise from b0 to b bits is s (4^-b - 4^-b0): the law of the noise of a uniform quantizer, whose
    power falls by four with each bit.
    """
    scores = []
    for rise, every, center in zip(rises, _widths(network), network.center, strict=True):
        uniform = center.weight, center.activation
        of_weight, of_input = map(_sensitivity, rise, uniform)
        weights, activations = every
        scores.append(
            (
                {bits: of_weight * 4.0**-bits for bits in weights},
                {bits: of_input * 4.0**-bits for bits in activations},
            )
        )
    return scores


def _sensitivity(rises: Mapping[int, float], center: int) -> float:
    powers = {bits: 4.0**-bits - 4.0**-center for bits in rises}
    squares = sum(power**2 for power in powers.values())
    along = sum(powers[bits] * rise for bits, rise in rises.items())
    return max(0.0, along / squares) if squares else 0.0


def _widths(network: JointNetwork) -> list[tuple[list[int], list[int]]]:
    """The weight bits and the activation bits that each group may have, ascending."""
    return [candidate_widths(pairs) for pairs in network.allowed]


def _step(quantizer: nn.Module, bits: int) -> float:
    return float(cast(Switched, quantizer).at(bits).get_parameter("scale").detach().mean())


def _table(
    problem: SearchProblem, method: str, allowed: Sequence[Pairs], by_group: Sequence[WidthScores]
) -> ScoreTable:
    """Score each pair by the sum of its widths' scores, which are made to fall with bits.

    Layers of a group share the score. Pairs that were not scored are forbidden.
    """
    candidates, by_layer, repairs = problem.choices.candidates, dict[str, list[float]](), 0
    for group, scored, sides in zip(problem.choices.freedom.groups, allowed, by_group, strict=True):
        of_weight, of_input = falling = [_falling(side) for side in sides]
        repairs += sum(
            not np.isclose(side[bits], new[bits], rtol=1e-6)
            for side, new in zip(sides, falling, strict=True)
            for bits in side
        )
        row = [
            (of_weight[bits.weight] + of_input[bits.activation]) / len(group)
            if bits in scored
            else np.inf
            for bits in candidates
        ]
        by_layer.update(dict.fromkeys(group, row))
    values = np.array([by_layer[name] for name in problem.free_layers])
    return ScoreTable(
        problem.free_layers,
        candidates,
        values,
        method,
        repairs,
        fingerprint(problem.network.shapes),
    )


def _falling(scores: Mapping[int, float]) -> dict[int, float]:
    widths = sorted(scores)
    return dict(
        zip(widths, leaning(np.array([scores[bits] for bits in widths])).tolist(), strict=True)
    )
