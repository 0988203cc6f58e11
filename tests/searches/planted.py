"""Problems whose right policy is known, and searches that are killed."""

import itertools

import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.policy import LayerBits
from bitscape.searches.mixed_network import Mixed
from bitscape.searches.problem import SearchProblem


class Killed(KeyboardInterrupt):
    """The user's, not pytest's."""


def kill_at(monkeypatch, step):
    """Stop the search when a step begins for the n-th time (from 0)."""
    keep_budget, calls = Mixed.keep_budget, itertools.count()

    def counted(self):
        if next(calls) == step:
            raise Killed
        keep_budget(self)

    monkeypatch.setattr(Mixed, "keep_budget", counted)


LEVELS = 12


class Planted(nn.Module):
    """One half of the image tells the class by a value in fine steps, the other half is -1 or 1 and says little."""

    def __init__(self, fine_first):
        super().__init__()
        self.fine_first = fine_first
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            for name in ("fine", "coarse") if fine_first else ("coarse", "fine"):
                self.add_module(name, nn.Linear(8, LEVELS))
        centers = (torch.arange(LEVELS) + 0.5) / LEVELS
        with torch.no_grad():  # logits are 300 (2 v c - c^2): largest for the center c next to the value v
            self.fine.weight.copy_((300 * 2 / 8 * centers)[:, None].expand(LEVELS, 8))
            self.fine.bias.copy_(-300 * centers.square())
            self.coarse.weight.mul_(0.1)

    def forward(self, x):
        return self.of(*x.flatten(1).split(8, dim=1))

    def of(self, value, sign):
        outputs = [layer(value if layer is self.fine else sign) for layer in self.children()]
        return outputs[0] + outputs[1]


class TwoInputs(Planted):
    """The two halves come by themselves."""

    def forward(self, value, sign):
        return self.of(value, sign)


class Regression(nn.Module):
    """The value in fine steps, and next to nothing of the other half."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Linear(8, 1), nn.Linear(8, 1)
        with torch.no_grad():
            self.fine.weight.fill_(1 / 8), self.fine.bias.zero_()
            self.coarse.weight.fill_(1e-4), self.coarse.bias.zero_()

    def forward(self, value, sign):
        return {"level": 10 * (self.fine(value) + self.coarse(sign))[:, 0]}


def halves():
    """Values (128, 8), signs (128, 8) and labels (128,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(LEVELS, (128,), generator=generator)
    value = ((labels + 0.25 + 0.5 * torch.rand(128, generator=generator)) / LEVELS)[:, None].expand(128, 8)
    sign = torch.randint(2, (128, 8), generator=generator) * 2.0 - 1
    return value, sign, labels


def planted(fine_first):
    value, sign, labels = halves()
    images = torch.cat([value, sign], 1).reshape(128, 1, 4, 4)
    return planted_problem(Planted(fine_first), Samples.of(images, labels))


def planted_problem(model, samples, **settings):
    """One of the two layers may take 8 activation bits."""
    pairs = (LayerBits(8, 2), LayerBits(8, 8))
    return SearchProblem.of(model=model, samples=samples, budget="mean_activation_bits=5", candidates=pairs, pinned={}, **settings)


POLICY = {"fine": LayerBits(8, 8), "coarse": LayerBits(8, 2)}
"""The right one."""
