"""`bitscape train --dynamic`: what differs from training at static bits."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitscape.cli.network import calibration_images
from bitscape.cli.options import all_of
from bitscape.cli.output import amount
from bitscape.cli.parsing import make_step, parse_widths
from bitscape.errors import BitscapeError
from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import nn

    from bitscape.data.batches import Batches
    from bitscape.dynamic import Dqmq, DqmqSgd, DynamicNetwork
    from bitscape.dynamic.network import DynamicBits
    from bitscape.engine import TrainResult

KEPT_IMAGES = 1024
"""Training images on which the budget is met after training."""

dynamic_options = all_of(
    click.option("--dynamic", metavar="LOW-HIGH", help="Each image decides the bits of activations, e.g. 2-8; needs --policy, --budget."),
    click.option("--budget", metavar="CAP", help="What an image may cost: bitops=w4a4, bitops=0.25x (of 8 bit), bitops=3.9e8."),
    click.option("--dynamic-weights", is_flag=True, help="Images decide the bits of weights too."),
    click.option("--head-lr", type=click.FloatRange(min=0), help="Learning rate of what decides.  [default: 0.1]"),
)


@dataclass(frozen=True, kw_only=True)
class DynamicTraining:
    """What `--dynamic` asks for; a `Training` of train.py."""

    policy: Policy
    """Bits of weights, and of the inputs of static layers."""
    bits: "DynamicBits"
    """What images decide about."""
    budget: str
    """Text of --budget."""
    settings: "Dqmq"
    """Of the step; its budget waits for the network."""
    optimizer: "DqmqSgd"
    """For weights and heads."""

    def network(self, float_model: "nn.Module", batches: "Batches", seed: int) -> "DynamicNetwork":
        """The dynamic network, its scales from training images."""
        from bitscape.dynamic import begin_at, dynamic_network

        made = dynamic_network(float_model, self.policy, calibration_images(batches, seed), self.bits)
        begin_at(made, self.step(made).bitops)
        return made

    def step(self, network: "nn.Module") -> "Dqmq":
        """The step at the budget, which must leave something to decide."""
        return replace(self.settings, bitops=_absolute(self.budget, _dynamic(network), self.policy))

    def save(self, network: "nn.Module", result: "TrainResult", batches: "Batches", out: Path, seed: int) -> str:
        """Meet the budget on training images, write the network, and say what images cost."""
        from bitscape.dynamic import keep_bitops
        from bitscape.dynamic.storage import save_dynamic

        trained = _dynamic(network)
        bitops = self.step(trained).bitops
        images = calibration_images(batches, seed, KEPT_IMAGES)
        spent = keep_bitops(trained, images, bitops, budget_of=self.settings.budget_of)
        save_dynamic(trained, out)
        cost = f"{len(images):,} training images cost {amount(spent)} BitOps on average, the budget is {amount(bitops)}"
        return f"{cost}\n{out}; as a few static networks: bitscape tiers --checkpoint {out} ..."


def dynamic_training(policy_file: Path | None, recipe: dict[str, Any]) -> DynamicTraining | None:
    """Return what --dynamic asks for, None without it; BitscapeError for options that do not fit or are missing."""
    _check_options(policy_file, recipe)
    if recipe["dynamic"] is None:
        return None
    from bitscape.dynamic import DqmqSgd
    from bitscape.dynamic.network import DynamicBits
    from bitscape.engine import Sgd

    assert policy_file is not None
    low, high = parse_widths(recipe["dynamic"])
    _check_budget(recipe["budget"])
    sgd = Sgd() if recipe["lr"] is None else Sgd(lr=recipe["lr"])
    return DynamicTraining(
        policy=Policy.load(policy_file),
        bits=DynamicBits(low=low, high=high, weights=recipe["dynamic_weights"]),
        budget=recipe["budget"],
        settings=_settings(recipe["settings"]),
        optimizer=DqmqSgd(sgd=sgd) if recipe["head_lr"] is None else DqmqSgd(sgd=sgd, head_lr=recipe["head_lr"]),
    )


def _check_options(policy_file: Path | None, recipe: dict[str, Any]) -> None:
    if recipe["dynamic"] is None:
        _check_none_given(recipe)
        return
    missing = [option for option, value in (("--policy FILE", policy_file), ("--budget bitops=w4a4", recipe["budget"])) if value is None]
    if missing:
        raise BitscapeError(
            f"--dynamic {recipe['dynamic']}: add {' and '.join(missing)}; the policy gives the bits of weights and of static layers"
        )
    refused = {
        f"--step {recipe['step_name']}": (recipe["step_name"] not in (None, "dqmq"), "its step is dqmq; leave --step out"),
        "--optimizer adamw": (recipe["optimizer"] == "adamw", "it trains by SGD, with --lr and --head-lr; leave --optimizer out"),
        "--compile": (recipe["compiled"], "bits that differ between images do not compile; leave --compile out"),
        f"--repair {recipe['repair']}": (
            recipe["repair"] is not None or recipe["repair_folder"] is not None,
            "its training starts from nearest rounding; leave --repair and --repair-folder out",
        ),
        f"--ema {recipe['ema']}": (recipe["ema"] is not None, "decisions of averaged weights were never trained; leave --ema out"),
    }
    for option, (given, reason) in refused.items():
        if given:
            raise BitscapeError(f"{option} does not fit --dynamic: {reason}")


def _check_none_given(recipe: dict[str, Any]) -> None:
    own = {
        "--budget": recipe["budget"] is not None,
        "--dynamic-weights": recipe["dynamic_weights"],
        "--head-lr": recipe["head_lr"] is not None,
        "--step dqmq": recipe["step_name"] == "dqmq",
    }
    if any(own.values()):
        given = ", ".join(option for option, is_given in own.items() if is_given)
        raise BitscapeError(f"{given}: only for bits that images decide; add --dynamic LOW-HIGH, e.g. --dynamic 2-8")


def _settings(texts: tuple[str, ...]) -> "Dqmq":
    from bitscape.dynamic import Dqmq

    own = [text for text in texts if text.partition("=")[0] == "bitops"]
    if own:
        raise BitscapeError(f"--set {own[0]}: what an image may cost is given by --budget; leave this out")
    step = make_step("dqmq", ["bitops=1", *texts])  # any number: the budget needs the network, the other settings do not
    assert isinstance(step, Dqmq)
    return step


def _check_budget(text: str) -> None:
    from bitscape.cost.budget import budget_kinds

    if budget_kinds(text, has_latency=False) != ["bitops"]:
        raise BitscapeError(f"--budget {text!r}: bits that images decide are held to BitOps alone; write e.g. bitops=w4a4")


def _absolute(text: str, network: "DynamicNetwork", policy: Policy) -> float:
    """BitOps of the budget; BitscapeError unless they are between those of the least and the largest widths."""
    from bitscape.cost.budget import parse_budget

    pinned = {name: policy.layers[name] for name in network.cost.by_name if name not in network.names}
    bitops = parse_budget(text, network.cost, pinned).caps["bitops"]
    ends = [network.level(bits, 1).bitops(network.cost) for bits in (network.bits.low, network.bits.high)]
    least, most = (float(end) + network.decision_bitops for end in ends)
    if not least <= bitops < most:
        raise BitscapeError(
            f"--budget {text!r} is {amount(bitops)} BitOps; with these weights an image costs {amount(least)} at the least widths "
            f"and {amount(most)} at the largest: give a budget in between"
        )
    return bitops


def _dynamic(network: "nn.Module") -> "DynamicNetwork":
    from bitscape.dynamic import DynamicNetwork

    assert isinstance(network, DynamicNetwork)
    return network
