from benchmarks.depthwise_cifar10 import BUDGETS, FIRST, wanted
from benchmarks.depthwise_summaries import depthwise_cifar10

ABOUT = {
    "settings": {"budget": "bytes of W2, A8", "images": 10_000},
    "epochs": 1,
    "float_top1": 80.0,
    "test_images": 5000,
}
ABOUT |= {"cost": {"weight_bytes": 28_000, "bitops": 150_000_000}, "search_s": 1.0}


def run(method, variant, seed, repaired, trained):
    names = {"method": method, "variant": variant, "seed": seed}
    return {**ABOUT, **names, "top1": trained, "extra": {"before_training_top1": repaired}}


def test_rows_stand_beside_uniform_bits_and_fisher_seed_by_seed():
    runs = [run("uniform", "one width", seed, 60.0, 70.0 + seed) for seed in range(3)]
    runs += [run("trained-scores", "loss", seed, 62.0, 71.0 + 2 * seed) for seed in range(3)]
    runs += [run("fisher", "not for training", 0, 61.0, 70.5)]
    heading, table = depthwise_cifar10(runs).split("\n\n")
    assert (
        heading == "**Budget: bytes of W2, A8**; 10,000 images an epoch, epochs: 1, float 80.00 %, "
        "5,000 test images"
    )
    uniform, fisher, trained = (
        [cell.strip() for cell in line.split("|")[3:-1]] for line in table.splitlines()[2:]
    )
    assert uniform[-4:] == ["-", "-", "-", "-0.50, one pair: no interval (1 pairs)"]
    assert fisher[-4:] == ["+1.00, one pair: no interval", "+0.50, one pair: no interval", "-", "-"]
    # Differences of 1, 2 and 3, standard deviation 1: (4.3027 + 1.0607) / sqrt(3) could be seen.
    assert trained[-4:-1] == [
        "+2.00 [+2.00, +2.00]",
        "+2.00 [-0.48, +4.48], no difference seen",
        "3.10",
    ]


def test_the_rows_that_the_comparison_is_about_come_first_and_no_run_stands_twice():
    runs = list(wanted(3, 10_000, 1))
    assert [(run["method"], run["variant"]) for run in runs[:4]] == list(FIRST)
    assert {run["settings"]["budget"] for run in runs[:14]} == {next(iter(BUDGETS))}
    keys = [(run["settings"]["budget"], run["method"], run["variant"], run["seed"]) for run in runs]
    assert len(set(keys)) == len(keys) == 2 * 3 * 10
