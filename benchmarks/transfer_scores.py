"""transfer-scores: which sensitivity score, on which images, ranks policies of one cost as measured accuracy does?

    python -m benchmarks.transfer_scores [--threads 1] [--part 0/2]

Two cases: ResNet-20 on CIFAR-10 (widths 3 to 6, the BitOps of W4A4) and MobileNetV2 on the ImageNet sample (widths 5 to 8, the BitOps of
W6A6). In each, 100 random policies within 2 % below the cap are measured without training or repair, 30 of those of ResNet-20 also after
one short epoch of training. Every score is computed on the target's own images, on five foreign data sets and on noise; its sum over the
layers of a policy is the loss that it predicts. Its own policy at the budget is measured like the random ones.

Rows with `epochs` 0 are measured before training, with 1 after it. `extra.loss` is the mean cross entropy, less noisy than top-1;
`extra.scores` holds the score of every layer (row) at every pair of `extra.candidates`. A policy that an earlier row has is not measured
again. `--part i/n` does every n-th run, so that several processes can share the work.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bitscape as bs
from benchmarks import ptq_imagenet, qat_cifar10
from benchmarks.common import DATA, RESULTS, bits_of, dataset, do_missing, proxy_images, test_batches
from bitscape.data.proxy import draw_proxy
from bitscape.data.sources import Dataset
from bitscape.engine import evaluate
from bitscape.models.layers import quantizable_layers
from bitscape.quant.convert import record_inputs, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.observers import Mse
from bitscape.report.records import identity, read_runs
from bitscape.searches.hawq import Hawq
from bitscape.searches.kl import Kl
from bitscape.searches.local import Local
from bitscape.searches.problem import SearchProblem
from bitscape.searches.random_policy import Random
from bitscape.searches.scores import ScoreTable
from bitscape.searches.topological import Topological
from recipes.networks import WEIGHTS, load

NAME = "transfer-scores"
FILE = RESULTS / f"{NAME}.jsonl"
KEYS = ("network", "method", "variant", "proxy", "seed", "epochs")
IMAGES = 256
POLICIES, TRAINED = 100, 30
TRAINING_IMAGES = 10_000
SEARCHED = ("settings", "policy", "budget", "cost", "search_s")
MEASURED = ("step", "train_s", "top1", "test_images", "extra")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network, its budget and its test."""

    target: str
    budget: str
    widths: tuple[int, ...]
    """Of weights and of activations; a wider choice leaves random policies at chance level."""
    test_images: int
    fewer_images: Mapping[str, int]
    """Images of the methods that run the network once for each layer and width, or keep a second-order graph."""
    batch_size: int


CASES = {
    "resnet20": Case(
        target="cifar10", budget="bitops=w4a4", widths=(3, 4, 5, 6), test_images=10_000, fewer_images={"kl": 128}, batch_size=100
    ),
    "mobilenetv2_tfslim": Case(
        target="imagenet_sample1k",
        budget="bitops=w6a6",
        widths=(5, 6, 7, 8),
        test_images=400,
        fewer_images={"kl": 32, "hawq": 64},
        batch_size=32,
    ),
}
FOREIGN = {"cifar100": "cifar100_train15k", "tiny_imagenet": "tiny_imagenet_train8k", "flowers12": "flowers12_train"}
FOREIGN |= {"pets37": "pets37_sample_train"}
PROXIES = (None, *(f"{name}:{IMAGES}" for name in (*FOREIGN, "digits", "noise")))
"""null means the target's own: of CIFAR-10 the training images, of the ImageNet sample those that are not tested."""
MAP_SIDE = "map side"
"""Variant: a control that looks at no image, computed once for a network."""
Run = Mapping[str, Any]
Floats = NDArray[np.float64]
Statistic = Callable[[Floats, Floats, Floats], Floats]
Score = bs.Fisher | Local | Kl | Hawq | Topological
SCORES: dict[tuple[str, str | None], Score] = {
    ("fisher", None): bs.Fisher(images=IMAGES),
    ("fisher", "directional"): bs.Fisher(images=IMAGES, variant="directional"),
    ("fisher", "for training"): bs.Fisher(images=IMAGES),
    ("local", None): Local(images=IMAGES),
    ("hawq", None): Hawq(images=IMAGES),
    ("topological", None): Topological(),
    ("topological", MAP_SIDE): Topological(map_side_only=True),
    ("kl", None): Kl(),
}


def wanted() -> Iterator[dict[str, Any]]:
    """Every run, in an order in which a stopped benchmark already compares; what takes longest for what it tells comes last."""
    small, large = CASES
    first = [("fisher", None), ("local", None), ("topological", None), ("topological", MAP_SIDE)]
    rest = [score for score in SCORES if score not in first]
    yield from _random(small, POLICIES)
    yield from _scored(small, list(SCORES))
    yield from _random(large, POLICIES)
    yield from _scored(large, first)
    yield from _random(small, TRAINED, epochs=1)
    yield from _scored(large, rest)
    yield from _scored(small, list(SCORES), epochs=1)


def _random(network: str, policies: int, epochs: int = 0) -> Iterator[dict[str, Any]]:
    for seed in range(policies):
        yield {"network": network, "method": "random", "variant": None, "proxy": None, "seed": seed, "epochs": epochs}


def _scored(network: str, scores: list[tuple[str, str | None]], epochs: int = 0) -> Iterator[dict[str, Any]]:
    for proxy, (method, variant) in product(PROXIES, scores):
        if variant != MAP_SIDE or proxy is None:
            yield {"network": network, "method": method, "variant": variant, "proxy": proxy, "seed": 0, "epochs": epochs}


@cache
def float_network(network: str) -> nn.Module:
    """The trained network."""
    return load(network, DATA).to(memory_format=torch.channels_last)


@cache
def tests(network: str) -> bs.Batches:
    """The test images of the case."""
    case = CASES[network]
    data = ptq_imagenet.split(network)[1] if case.target == "imagenet_sample1k" else dataset("cifar10_test")
    return test_batches(data.subset(slice(case.test_images)), WEIGHTS[network].normalization, case.batch_size)


@cache
def source(network: str, proxy: str | None) -> Dataset:
    """The data set of a proxy, in its own size; of CIFAR-10 as target all training images."""
    name = (proxy or "").partition(":")[0]
    if name == "digits":
        digits = bs.load_dataset("digits")
        return dataclasses.replace(digits, images=digits.images.expand(-1, 3, -1, -1).contiguous())
    if name:
        return dataset(FOREIGN[name], size=224 if name == "pets37" else None)  # its images differ in size
    return ptq_imagenet.split(network)[0] if CASES[network].target == "imagenet_sample1k" else dataset("cifar10_train")


@cache
def images(network: str, proxy: str | None) -> Tensor:
    """Images (256, 3, h, w) that scores see, normalized for the network."""
    if proxy == f"noise:{IMAGES}":
        side = WEIGHTS[network].input_size
        return torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    return proxy_images(source(network, proxy), network, IMAGES, seed=0)


@cache
def class_images(network: str, proxy: str | None) -> Tensor:
    """What the topological entropy sees: 128 images of one class where the data set has so many, else the first of `images`."""
    count = Topological().images
    data = None if proxy == f"noise:{IMAGES}" else source(network, proxy)
    if data is None or int(torch.bincount(data.labels).min()) < count:
        return images(network, proxy)[:count]
    return proxy_images(draw_proxy(data, images=count, classes=1, seed=0), network, count, seed=0)


@cache
def layer_inputs(network: str) -> dict[str, Tensor]:
    """What every layer takes on the target's own images, from which the ranges of all policies are set, as `calibrate` would."""
    model = float_network(network)
    return record_inputs(model, quantizable_layers(model), images(network, None))


def quantized(network: str, policy: bs.Policy) -> nn.Module:
    """The network at the policy's bits, calibrated."""
    model = with_quantizers(float_network(network), policy)
    for name, layer in quantized_layers(model).items():
        layer.input_quantizer.initialize(layer_inputs(network)[name], Mse())
    return model


def problem(run: dict[str, Any]) -> SearchProblem:
    """The search of a run."""
    network = run["network"]
    case = CASES[network]
    return SearchProblem.of(
        model=float_network(network),
        samples=(class_images if run["method"] == "topological" else images)(network, run["proxy"]),
        budget=case.budget,
        candidates=tuple(bs.LayerBits(*pair) for pair in product(case.widths, case.widths)),
        seed=run["seed"],
    )


def method_of(run: dict[str, Any]) -> Score | Random:
    """The search method of a run, with its settings."""
    if run["method"] == "random":
        return Random()
    count = CASES[run["network"]].fewer_images.get(run["method"])
    method = SCORES[run["method"], run["variant"]]
    return method if count is None else dataclasses.replace(method, images=count)


def searched(run: dict[str, Any]) -> dict[str, Any]:
    """Fields of a run that its search gives."""
    stated, method = problem(run), method_of(run)
    training = run["variant"] == "for training"
    result = method.search(stated, for_training=training) if isinstance(method, bs.Fisher) else method.search(stated)
    return {
        "settings": dataclasses.asdict(method),
        "policy": bits_of(result.policy),
        "budget": dict(stated.choices.budget.caps),
        "cost": dict(result.policy.cost),
        "search_s": result.seconds,
        "extra": _scores(result.scores) if result.scores else {},
    }


def _scores(table: ScoreTable) -> dict[str, Any]:
    rows = {name: [float(f"{value:.4g}") for value in row] for name, row in zip(table.layers, table.values, strict=True)}
    return {"candidates": [str(pair) for pair in table.candidates], "scores": rows, "repairs": table.repairs}


def evaluated(run: dict[str, Any]) -> dict[str, Any]:
    """Measured fields of a run that has its policy."""
    policy = bs.Policy({name: bs.LayerBits(*pair) for name, pair in run["policy"].items()})
    model, found = quantized(run["network"], policy), {}
    if run["epochs"]:
        # One data order for all policies, whatever seed drew them.
        train_s = qat_cifar10.trained({"seed": 0, "epochs": run["epochs"]}, model, TRAINING_IMAGES)
        found = {"step": "plain", "train_s": train_s}
    accuracy = evaluate(model, tests(run["network"]))
    return {**found, "top1": accuracy.top1, "test_images": accuracy.images, "extra": {"loss": accuracy.loss}}


def measure(run: dict[str, Any], done: list[dict[str, Any]]) -> dict[str, Any]:
    """Search and evaluate; what the runs `done` tell is taken from them: the search before training, and accuracies of the same policy."""
    before = next((row for row in done if run["epochs"] and identity(row, KEYS) == identity({**run, "epochs": 0}, KEYS)), None)
    given = {**run, "weights": WEIGHTS[run["network"]].file, "target": CASES[run["network"]].target, "clock": "wall"}
    found = searched(run) if before is None else {**{name: before[name] for name in SEARCHED}, "extra": {}}
    planned = {**given, **found}
    same = next((row for row in done if all(row[name] == planned[name] for name in ("network", "epochs", "policy"))), None)
    taken = evaluated(planned) if same is None else {name: same[name] for name in MEASURED if name in same}
    return {**planned, **taken, "extra": {"loss": taken["extra"]["loss"], **found["extra"]}}


def rank_correlations(runs: Iterable[Run], draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each table of scores and each set of random policies of its network: how well predicted losses rank measured ones.

    `spearman_loss` and `kendall_loss` are against the mean loss, `..._top1` against top-1, all positive where the score ranks as it should;
    `..._low` and `..._high` bound the 95 % interval over `draws` samples of the policies, drawn with repetition. `regret` is the top-1 of
    the best policy less that of the best among the ten that the score ranks first. A correlation that does not exist is None.
    """
    runs = list(runs)
    rows = []
    for (network, epochs), measured in _random_policies(runs).items():
        counts = np.random.default_rng(seed).multinomial(len(measured), [1 / len(measured)] * len(measured), size=draws).astype(float)
        loss, top1 = (np.array(values) for values in zip(*((run["extra"]["loss"], run["top1"]) for run in measured), strict=True))
        for table in _tables(runs, network):
            predicted = np.array([predicted_loss(table, run["policy"]) for run in measured])
            row = {"network": network, "epochs": epochs, **{name: table[name] for name in ("method", "variant", "proxy")}}
            row |= {"policies": len(measured), "regret": regret(predicted, top1)}
            for statistic, (name, truth) in product((spearman, kendall), (("loss", loss), ("top1", -top1))):
                row |= _with_interval(f"{statistic.__name__}_{name}", statistic, predicted, truth, counts)
            rows.append(row)
    return rows


def agreements(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """One row for each foreign proxy's own policy: how it differs from the one that the same score finds on the target's images.

    `weight_spearman` and `activation_spearman` correlate the bits of the free layers (None where all are alike), `same_pairs` is the share
    of free layers with the same pair, `top1` and `target_top1` are the accuracies without training.
    """
    runs = list(runs)
    rows = []
    for network in dict.fromkeys(run["network"] for run in runs):
        tables = _tables(runs, network)
        own = {(table["method"], table["variant"]): table for table in tables if table["proxy"] is None}
        pairs = [(table, own.get((table["method"], table["variant"]))) for table in tables if table["proxy"] is not None]
        rows += [_agreement(table, target) for table, target in pairs if target is not None]
    return rows


def predicted_loss(table: Run, policy: Mapping[str, Sequence[int]]) -> float:
    """Sum of a run's scores over the free layers, each at its pair in the policy."""
    column = {pair: at for at, pair in enumerate(table["extra"]["candidates"])}
    return math.fsum(row[column["{}/{}".format(*policy[name])]] for name, row in table["extra"]["scores"].items())


def regret(predicted: Floats, top1: Floats, first: int = 10) -> float:
    """The highest accuracy less the highest among the `first` policies of lowest predicted loss."""
    chosen = np.argsort(predicted, kind="stable")[:first]
    return float(top1.max() - top1[chosen].max())


def spearman(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Rank correlation of x and y (n,) in each sample (draws,) that holds point i `counts[draw, i]` times."""
    # The mean rank of a value among those of a sample, less 1/2: how many are below, and half of its equals.
    ranks = [counts @ ((v > v[:, None]) + 0.5 * (v == v[:, None])) for v in (x, y)]
    shares = counts / counts.sum(1, keepdims=True)
    a, b = (rank - (shares * rank).sum(1, keepdims=True) for rank in ranks)
    return _ratio((shares * a * b).sum(1), (shares * a * a).sum(1), (shares * b * b).sum(1))


def kendall(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Kendall's tau-b of x and y (n,) in each sample (draws,) that holds point i `counts[draw, i]` times."""
    a, b = (np.sign(v[:, None] - v) for v in (x, y))
    both, first, second = (((counts @ signs) * counts).sum(1) for signs in (a * b, abs(a), abs(b)))
    return _ratio(both, first, second)


def _ratio(both: Floats, first: Floats, second: Floats) -> Floats:
    scale: Floats = np.sqrt(first * second)
    # What rounding leaves of no spread at all is far below 1e-9.
    return np.divide(both, scale, out=np.full(len(scale), np.nan), where=scale > 1e-9)


def _with_interval(name: str, statistic: Statistic, x: Floats, y: Floats, counts: Floats) -> dict[str, float | None]:
    value = float(statistic(x, y, np.ones((1, len(x))))[0])
    if np.isnan(value):
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = np.nanpercentile(statistic(x, y, counts), (2.5, 97.5)).tolist()
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _random_policies(runs: list[Run]) -> dict[tuple[str, int], list[Run]]:
    """(network, epochs) -> random policies, where there are enough to correlate."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run["method"] == "random":
            groups.setdefault((run["network"], run["epochs"]), []).append(run)
    return {key: group for key, group in groups.items() if len(group) > 2}


def _tables(runs: list[Run], network: str) -> list[Run]:
    return [run for run in runs if run["network"] == network and "scores" in run["extra"]]


def _agreement(table: Run, target: Run) -> dict[str, Any]:
    pairs, others = (np.array([run["policy"][name] for name in table["extra"]["scores"]]) for run in (table, target))
    once = np.ones((1, len(pairs)))
    weight, activation = (float(spearman(pairs[:, at], others[:, at], once)[0]) for at in (0, 1))
    return {
        **{name: table[name] for name in ("network", "method", "variant", "proxy")},
        "weight_spearman": None if np.isnan(weight) else weight,
        "activation_spearman": None if np.isnan(activation) else activation,
        "same_pairs": float((pairs == others).all(1).mean()),
        "top1": table["top1"],
        "target_top1": target["top1"],
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="i/n: do every n-th run, from the i-th")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    do_missing(NAME, KEYS, wanted(), lambda run: measure(run, read_runs(FILE)), options.part)


if __name__ == "__main__":
    main()
