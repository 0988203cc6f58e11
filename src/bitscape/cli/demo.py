"""`bitscape demo`: the whole way on the embedded digits, from a float network to a packed file, in half a minute."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Literal

import click

import bitscape as bs
from bitscape.cli.output import amount, print_table, size_ratio
from bitscape.cli.packed import report_same
from bitscape.cli.paths import OUTPUT_FOLDER
from bitscape.errors import BitscapeError
from bitscape.folders import CHECKPOINT, POLICY_FILE, WEIGHTS_FILE, locked, results_in

if TYPE_CHECKING:
    from torch import Tensor, nn


MODEL = "bitscape.models.digits:digits_net"
BUDGET = ("bitops=w3a3", "weight_bytes=w3")
PROXY_IMAGES = 256
SEEDS = (0, 1, 2)
PACKED_FILE = "packed.safetensors"


@click.command()
@click.option(
    "--out",
    default="bitscape-demo",
    show_default=True,
    type=OUTPUT_FOLDER,
    metavar="FOLDER",
    help="Where weights, policy and packed file go.",
)
def demo(out: Path) -> None:
    """Go the whole way on 8x8 digits: train, search, quantize, pack.

    \b
    Example:
      bitscape demo --out /tmp/digits
    """
    start = time.monotonic()
    if (held := results_in(out)) and (CHECKPOINT in held or not (out / PACKED_FILE).is_file()):
        raise BitscapeError(f"--out {out}: it holds {', '.join(held)}, and not of a demo; give another folder")
    with locked(out), _one_thread(), _quiet():
        _run(out)
    click.echo(f"\n{time.monotonic() - start:.0f} s in all; next:")
    click.echo(f"  bitscape policy show {out / POLICY_FILE} --model {MODEL}")
    click.echo(f"  bitscape evaluate --model {MODEL} --data digits --packed {out / PACKED_FILE}")


def _run(out: Path) -> None:
    from bitscape.models.find import save_weights

    click.echo("training the float network ...", err=True)
    digits = Digits.load()
    float_top1 = digits.top1(digits.network)
    save_weights(digits.network.state_dict(), out / WEIGHTS_FILE)
    click.echo(f"float network trained: top-1 {float_top1:.2f} % of {len(digits.test.dataset)} test images")
    click.echo(f"budget {' and '.join(BUDGET)}, first and last layer at 8/8; {PROXY_IMAGES} training images, labels unused\n")
    click.echo("searching; training at uniform and at mixed bits ...", err=True)
    uniform, fisher = (digits.trained(digits.policy(method)) for method in ("uniform", "fisher"))
    randoms = [digits.policy("random", seed) for seed in SEEDS]
    _print_table(digits, float_top1, uniform, fisher, randoms)
    click.echo(f"\n{_verdict(uniform, fisher, len(digits.test.dataset))}\n")
    fisher.policy.save(out / POLICY_FILE)
    _pack(digits, fisher, out / PACKED_FILE, (out / WEIGHTS_FILE).stat().st_size)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A policy, and the accuracy of the network at its bits."""

    policy: bs.Policy
    calibrated: float
    """Top-1 in percent, calibrated only."""
    repaired: float
    """Top-1 in percent, calibrated and repaired."""
    trained: tuple[float, ...]
    """Top-1 in percent after training the calibrated network, for each seed."""
    network: "nn.Module"
    """As trained with the first seed."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The float network and its images."""

    network: "nn.Module"
    """Trained, in eval mode."""
    train: "bs.Batches"
    test: "bs.Batches"
    images: "Tensor"
    """Normalized proxy images, for search and calibration alike."""

    @classmethod
    def load(cls) -> "Digits":
        """Train the float network."""
        import torch

        from bitscape.data.batches import DIGITS
        from bitscape.data.proxy import draw_proxy
        from bitscape.models.digits import digits_net

        dataset, test = bs.load_dataset("digits"), bs.load_dataset("digits", split="test")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = digits_net()
        batches = bs.Batches(dataset=dataset, normalization=DIGITS, batch_size=64, shuffle=True)
        _train(network, batches, epochs=6, lr=0.1, seed=0)
        return cls(
            network=network.eval(),
            train=batches,
            test=bs.Batches(dataset=test, normalization=DIGITS, batch_size=len(test)),
            images=DIGITS.apply(draw_proxy(dataset, images=PROXY_IMAGES, seed=0).images),
        )

    def policy(self, method: str, seed: int = 0) -> bs.Policy:
        """Search with `method`."""
        return bs.search(self.network, self.images, BUDGET, method=method, seed=seed).policy

    def quantized(self, policy: bs.Policy, *, repair: bool = False) -> "nn.Module":
        """The network at the policy's bits, without training."""
        chosen: Literal["compensate"] | None = "compensate" if repair else None
        return bs.quantize(
            self.network, policy, self.images, repair=chosen, for_training=not repair
        )

    def trained(self, policy: bs.Policy) -> Trained:
        """Train the network at the policy's bits, once with each seed."""
        networks = [self.quantized(policy) for _ in SEEDS]
        before = self.top1(networks[0])
        for seed, network in zip(SEEDS, networks, strict=True):
            _train(network, self.train, epochs=4, lr=0.02, seed=seed)
        return Trained(
            policy=policy,
            calibrated=before,
            repaired=self.top1(self.quantized(policy, repair=True)),
            trained=tuple(self.top1(network) for network in networks),
            network=networks[0],
        )

    def top1(self, network: "nn.Module") -> float:
        """Percent of the test images that `network` gets right."""
        return bs.evaluate(network, self.test).value


def _train(network: "nn.Module", batches: "bs.Batches", *, epochs: int, lr: float, seed: int) -> None:
    bs.train(network, replace(batches, seed=seed), optimizer=bs.Sgd(lr=lr), epochs=epochs, seed=seed)


def _print_table(digits: Digits, float_top1: float, uniform: Trained, fisher: Trained, randoms: list[bs.Policy]) -> None:
    rows = [["float", "", "", f"{float_top1:.2f}", "", ""]]
    for name, one in (("uniform", uniform), ("fisher", fisher)):
        rows.append(_row(name, one.policy, [one.calibrated], [one.repaired], one.trained))
    plain, repaired = ([digits.top1(digits.quantized(p, repair=repair)) for p in randoms] for repair in (False, True))
    rows.append(_row(f"random, {len(randoms)} seeds", randoms[0], plain, repaired, ()))
    columns = ["policy", "BitOps", "weight bytes", "top-1 %: calibrated", "repaired", f"trained, {len(SEEDS)} seeds"]
    print_table(columns, rows)
    bits = [[name, str(uniform.policy.layers[name]), str(pair)] for name, pair in fisher.policy.layers.items()]
    click.echo()
    print_table(["weight/activation bits", "uniform", "fisher"], bits)


def _row(name: str, policy: bs.Policy, *top1: Sequence[float]) -> list[str]:
    costs = [amount(policy.cost["bitops"]), amount(policy.cost["weight_bytes"], "B")]
    return [name, *costs, *(_spread(values) for values in top1)]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def _verdict(uniform: Trained, fisher: Trained, images: int) -> str:
    """Say what the numbers allow to say: a difference counts from two standard errors, by the number of images."""
    pairs = {
        "calibrated": (uniform.calibrated, fisher.calibrated),
        "repaired": (uniform.repaired, fisher.repaired),
        "trained": (mean(uniform.trained), mean(fisher.trained)),
    }
    return "\n".join(_compared(when, *pair, images) for when, pair in pairs.items())


def _compared(when: str, uniform: float, fisher: float, images: int) -> str:
    rate = (uniform + fisher) / 200
    error = 100 * (2 * rate * (1 - rate) / images) ** 0.5
    gain = fisher - uniform
    found = "no difference that this test set can show"
    if abs(gain) > 2 * error:
        found = "mixed bits are better" if gain > 0 else "mixed bits are worse"
    return f"{when}: mixed {gain:+.2f} points against uniform (2 standard errors: {2 * error:.2f}): {found}"


def _pack(digits: Digits, fisher: Trained, path: Path, float_bytes: int) -> None:
    report = bs.export(fisher.network, path, digits.images, policy=fisher.policy, float_model=digits.network)
    report_same(report.compared)
    click.echo(
        f"packed file {amount(report.file_bytes, 'B')}, float file {amount(float_bytes, 'B')}: "
        f"{size_ratio(float_bytes / report.file_bytes, digits=1)}; {amount(report.info.weight_bytes, 'B')} of it are weights and scales"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the lines for every epoch and every repair."""
    log = logging.getLogger("bitscape")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the block: on so small a network, several wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
