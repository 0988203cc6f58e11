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
Measured  docs/how-to-choose: transfer-policies, asga-ladder. docs/results: speed.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bitscape.engine import Sgd, Step, train
from bitscape.engine.settings import MOST_RATE
from bitscape.errors import BitscapeError, check_choices
from bitscape.searches.mixed_network import Alternating, Mixed, MixtureSgd, MixtureStep, mixed_network
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult
from bitscape.searches.proxy_task import ProxyTask, Task, proxy_task
from bitscape.searches.readout import Progress, Readout, claim, keep_policy, read_out
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import Trace, at_least_one, finish

_log = logging.getLogger("bitscape.searches")

FEWEST_STEPS = 50
"""Below, logits have hardly moved and the policy is a guess."""


@dataclass(frozen=True, kw_only=True)
class TrainedMixture:
    """What a mixture search has at its end."""

    mixed: Mixed
    """The network with its mixtures, at the last price of bits."""
    task: ProxyTask
    """What it learned."""
    records: Trace
    """One record an epoch."""


@dataclass(frozen=True, kw_only=True)
class Differentiable:
    """The mixture search."""

    epochs: int = 5
    """Passes over the proxy."""
    batch_size: int = 64
    """Images a step, over all workers."""
    lr: float = 0.01
    """Learning rate of weights and scales."""
    logit_lr: float = 0.5
    """Learning rate of the logits."""
    held_out: float = 0.0
    """Share of the proxy that trains the logits, alternating with the weights; 0: one level, all images train both."""
    readout: Readout = "probability"
    """What becomes the score of a width: its share, the loss without it, or the loss with it alone."""
    task: Task = "auto"
    """What the proxy teaches: its labels, by the network's own or a new classifier, or the float network's outputs."""
    head_epochs: int = 3
    """Passes that warm a new classifier up before bits move."""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least_one(epochs=self.epochs, batch_size=self.batch_size, head_epochs=self.head_epochs)
        for name, value in (("lr", self.lr), ("logit_lr", self.logit_lr)):
            if not 0 < value <= MOST_RATE:
                raise BitscapeError(f"{name} = {value}: it must be above 0 and at most {MOST_RATE:g}")
        if not 0 <= self.held_out < 1:
            raise BitscapeError(f"held_out = {self.held_out}: a share of the proxy from 0 (none) to below 1; 0.5 is usual")

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick", "folder"})

    def search(
        self, problem: SearchProblem, *, pick: Pick = "best", folder: str | os.PathLike[str] | None = None
    ) -> SearchResult:
        """Train the mixture on the proxy, read it out as scores, allocate bits exactly within the budget.

        The checkpoint and the policy so far are kept in `folder`: the same search goes on from there. None: nowhere.
        """
        where = None if folder is None else Path(folder)
        claim(where, problem, self)  # here, too: where nothing is to be decided, nothing is trained
        result = finish(problem, self, lambda: self._scored(problem, where), pick)
        keep_policy(result.policy, where)
        return result

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The scores alone, at the problem's budget; other budgets move the mixture elsewhere."""
        return self._scored(problem, None)[0]

    def step(self, mixed: Mixed, learned: ProxyTask) -> Step:
        """The training step, for all that is `learned`, held-out images included; searches that extend this one bring their own."""
        return MixtureStep(mixed=mixed)

    def train_mixture(self, problem: SearchProblem, folder: Path | None = None) -> TrainedMixture:
        """Mix the network and train it on the proxy. Raises BitscapeError if the folder is of another search."""
        claim(folder, problem, self)
        stated = proxy_task(problem, self.task, batch_size=self.batch_size, head_epochs=self.head_epochs, folder=folder)
        learned, held_out = stated.split(self.held_out)
        self._warn_if_short(learned)
        mixed = mixed_network(problem, learned.model)
        step = self.step(mixed, stated)
        result = train(
            mixed.model,
            learned.batches,
            step=step if held_out is None else Alternating(step=step, held_out=held_out, mixed=mixed),
            optimizer=MixtureSgd(sgd=Sgd(lr=self.lr), logit_lr=self.logit_lr),
            loss=learned.loss,
            channels_last=problem.channels_last,
            epochs=self.epochs,
            folder=None if folder is None else folder / "search",
            after_epoch=Progress(problem, self, mixed, folder).after_epoch,
            seed=problem.seed,
        )
        return TrainedMixture(mixed=mixed, task=stated, records=result.records)

    def _warn_if_short(self, learned: ProxyTask) -> None:
        steps = self.epochs * len(learned.batches)
        if steps < FEWEST_STEPS:
            _log.warning(
                "the mixture search makes %d steps in all, too few to learn bits from: %d images / batch_size %d, epochs %d; "
                "raise images (2,000 are usual) or epochs, or lower batch_size, to at least %d steps",
                *(steps, len(learned.batches.dataset.labels), self.batch_size, self.epochs, FEWEST_STEPS),
            )

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()

    def _scored(self, problem: SearchProblem, folder: Path | None) -> tuple[ScoreTable, Trace]:
        trained = self.train_mixture(problem, folder)
        return read_out(self.readout, problem, self._name, trained.mixed, trained.task), trained.records
