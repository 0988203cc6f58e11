"""The search with a soft choice of bits: mix the network, train it on the proxy, read bits out of it.

A method is its settings and the step that they make; `mixture_search` takes the step as an argument.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from bitscape.engine import Sgd, Step, train
from bitscape.engine.settings import check_rates
from bitscape.errors import BitscapeError, at_least_one, check_choices
from bitscape.searches.mixed_network import Alternating, Mixed, MixtureSgd, mixed_network
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult, name_of
from bitscape.searches.proxy_task import Learned, ProxyTask, proxy_task
from bitscape.searches.readout import Progress, Readout, claim, read_out, search_in_folder
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import Trace

_log = logging.getLogger("bitscape.searches")

DIVERGED = 10.0
"""How many times the first epoch's loss the last one's is where training has gone astray."""
FEWEST_STEPS = 50
"""Below, logits have hardly moved and the policy is a guess."""

MakeStep = Callable[[Mixed, ProxyTask], Step]
"""From the network with mixtures, and all that it learns, held-out samples included, to its step."""


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(ABC):
    """What every mixture search is set by; `make_step` says how it learns from a batch."""

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
    task: Learned = "auto"
    """What the proxy teaches: its labels, by the network's own or a new classifier, or the float network's outputs."""
    head_epochs: int = 3
    """Passes that warm a new classifier up before bits move."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick", "folder"})

    def __post_init__(self) -> None:
        """Check every field."""
        check_choices(self)
        at_least_one(epochs=self.epochs, batch_size=self.batch_size, head_epochs=self.head_epochs)
        check_rates(lr=self.lr, logit_lr=self.logit_lr)
        if not 0 <= self.held_out < 1:
            raise BitscapeError(
                f"held_out = {self.held_out}: a share of the proxy from 0 (none) to below 1; "
                "0.5 is usual"
            )

    @abstractmethod
    def make_step(self, mixed: Mixed, learned: ProxyTask) -> Step:
        """Return the step of one search, see `MakeStep`."""

    def search(
        self,
        problem: SearchProblem,
        *,
        pick: Pick = "best",
        folder: str | os.PathLike[str] | None = None,
    ) -> SearchResult:
        """Search with the step of these settings, see `mixture_search`."""
        return mixture_search(problem, self, self.make_step, pick=pick, folder=folder)

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The scores alone, at the problem's budget; other budgets move the mixture elsewhere."""
        return _scored(problem, self, self.make_step, None)[0]


@dataclass(frozen=True, kw_only=True)
class TrainedMixture:
    """What a mixture search has at its end."""

    mixed: Mixed
    """The network with its mixtures, at the last price of bits."""
    task: ProxyTask
    """What it learned."""
    records: Trace
    """One record an epoch."""


def mixture_search(
    problem: SearchProblem,
    settings: MixtureSettings,
    make_step: MakeStep,
    *,
    pick: Pick = "best",
    folder: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Train the mixture on the proxy, read scores out, allocate bits exactly within the budget.

    Args:
        problem: the float network, samples of one form and the budget.
        settings: of the method; the policy's provenance names them.
        make_step: makes the step, such as `settings.make_step`.
        pick: see `finish`.
        folder: where the checkpoint and the policy so far are kept: the same search goes on from
            there. None: nowhere.

    Raises:
        BitscapeError: a folder of another search, or samples and targets that cannot be learned.
    """
    scored = partial(_scored, problem, settings, make_step)
    return search_in_folder(problem, settings, scored, pick=pick, folder=folder)


def train_mixture(
    problem: SearchProblem,
    settings: MixtureSettings,
    make_step: MakeStep,
    folder: Path | None = None,
) -> TrainedMixture:
    """Mix the network and train it on the proxy; see `mixture_search`."""
    claim(folder, problem, settings)
    whole = proxy_task(
        problem,
        settings.task,
        batch_size=settings.batch_size,
        head_epochs=settings.head_epochs,
        folder=folder,
    )
    learned, held_out = whole.split(settings.held_out)
    _warn_if_short(learned, settings)
    mixed = mixed_network(problem, learned.model)
    step = make_step(mixed, whole)
    result = train(
        mixed.model,
        learned.batches,
        step=step if held_out is None else Alternating(step=step, held_out=held_out, mixed=mixed),
        optimizer=MixtureSgd(sgd=Sgd(lr=settings.lr), logit_lr=settings.logit_lr),
        task=learned.task,
        loss=learned.loss,
        channels_last=problem.channels_last,
        epochs=settings.epochs,
        folder=None if folder is None else folder / "search",
        start=problem.prepared,
        after_epoch=Progress(problem, settings, mixed, folder).after_epoch,
        seed=problem.seed,
    )
    _warn_if_diverged(result.records, settings)
    return TrainedMixture(mixed=mixed, task=whole, records=result.records)


def _scored(
    problem: SearchProblem, settings: MixtureSettings, make_step: MakeStep, folder: Path | None
) -> tuple[ScoreTable, Trace]:
    trained = train_mixture(problem, settings, make_step, folder)
    scores = read_out(settings.readout, problem, name_of(settings), trained.mixed, trained.task)
    return scores, trained.records


def _warn_if_short(learned: ProxyTask, settings: MixtureSettings) -> None:
    steps = settings.epochs * len(learned.batches)
    if steps < FEWEST_STEPS:
        _log.warning(
            "the mixture search makes %d steps in all, too few to learn bits from: "
            "%d images / batch_size %d, epochs %d; "
            "raise images (2,000 are usual) or epochs, or lower batch_size, to at least %d steps",
            *(steps, len(learned.data), settings.batch_size, settings.epochs, FEWEST_STEPS),
        )


def _warn_if_diverged(records: Trace, settings: MixtureSettings) -> None:
    first, last = (float(records[index]["loss"]) for index in (0, -1)) if records else (0.0, 0.0)
    if last > DIVERGED * first:
        _log.warning(
            "the loss of the mixture search rose from %.3g in its first epoch to %.3g in its last, "
            "so its bits mean little; lower lr = %g, or scale the loss down",
            *(first, last, settings.lr),
        )
