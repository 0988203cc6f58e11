from typing import Any

from benchmarks.saq import BUDGETS, LONGER, PLAIN, QUANTIZERS, STEPS, SWEEP, SWEEP_SEED, step_of, swept, wanted
from benchmarks.saq_summaries import saq
from bitscape.steps import Plain, SharpSettings
from tests.benchmarks.test_transfer_summaries import line_of


def run(method: str, variant: str, seed: int, top1: float, **extra: Any) -> dict[str, Any]:
    return {
        "network": "n",
        "target": "t",
        "method": method,
        "variant": variant,
        "settings": {"budget": "w2a2", "rho": None if method == "plain" else 0.01, "images": 10},
        "epochs": 4 if (method, variant) == LONGER else 2,
        "seed": seed,
        "top1": top1,
        "float_top1": 91.0,
        "extra": {"gap": 0.5, "adaptive_gap": 0.2, "eigenvalue": 30.0, "step_process_s": 0.25, "training_loss": 0.1, **extra},
    }


def test_every_step_is_compared_at_equal_epochs_and_at_equal_time() -> None:
    runs = [run(*PLAIN, seed, 80.0 + seed) for seed in range(2)] + [run(*LONGER, seed, 82.0 + seed) for seed in range(2)]
    runs += [run("saq", "case 3", seed, 81.0 + seed) for seed in range(2)]
    table = saq(runs)
    assert "**n on t, w2a2**; 10 images an epoch, epochs: 2, radius: 0.01, float 91.0 %" in table
    equal_epochs, equal_time = line_of(table, "| saq | case 3")[-2:]
    assert equal_epochs.startswith("+1.00 [+1.00, +1.00]") and equal_time.startswith("-1.00 [-1.00, -1.00]")
    assert line_of(table, "| plain |  |")[-2] == "-" and line_of(table, "| plain | twice the epochs")[-1] == "-"


def test_runs_of_the_sweep_stand_apart_and_corrupted_images_have_a_table() -> None:
    runs = [run(*PLAIN, 0, 80.0, corrupted={"contrast": 60.0, "mean": 70.0}), run("saq", "case 3", 0, 81.0)]
    runs += [run("saq", "case 3", SWEEP_SEED, 44.0)]
    comparison, _, rest = saq(runs).partition("**n on t, w2a2**, epochs: 2; top-1 in percent")
    corrupted, _, sweep = rest.partition("**Sweep of the radius, lsq**")
    assert "44.00" not in comparison + corrupted and line_of(sweep, "| saq | case 3 | 0.01")[3] == "44.00"
    assert line_of(corrupted, "| plain")[2:] == ["60.0", "70.0", "1"] and "saq" not in corrupted


def test_the_plan_has_every_step_for_every_policy_and_plain_training_twice_as_long() -> None:
    plan = list(wanted(3, 10_000, 2))
    assert len(plan) == 2 * len(BUDGETS) * 3 * (2 + len(STEPS))
    assert {each["epochs"] for each in plan if (each["method"], each["variant"]) == LONGER} == {4}
    for each in plan:
        assert type(step_of(each)) is (Plain if each["method"] == "plain" else type(STEPS[each["method"], each["variant"]]))


def test_the_sweep_varies_the_radius_alone() -> None:
    radii: dict[str, list[float]] = {}
    for each in swept(10_000, 2):
        step = step_of(each)
        if each["variant"] == "case 3" and isinstance(step, SharpSettings):
            radii.setdefault(each["settings"].get("quantizer", "lsq"), []).append(step.rho)
    assert radii == {key: list(SWEEP) for key in ("lsq", *QUANTIZERS)}
