from pathlib import Path
from typing import Any

import pytest

from bitscape.cost.policy_cost import policy_cost
from bitscape.policy import Policy
from bitscape.report.blocks import Headline
from bitscape.report.documents import save_evaluation
from bitscape.report.headline import NOT_MEASURED, headline
from bitscape.report.inputs import read_inputs
from bitscape.report.material import Material
from bitscape.report.measured import Measurements, measured
from bitscape.words import NO_BREAK
from tests.report.made import bench, evaluation, network, run, scores, searched


def bits_of(policy: Policy) -> dict[str, str]:
    return {name: str(bits) for name, bits in policy.layers.items()}


def material(paths: list[Path], **about: Any) -> Material:
    return Material(inputs=read_inputs(paths), **about)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A policy, and what was measured in float, of it, of uniform and of random ones."""
    searched().save(tmp_path / "policy.json")
    own = evaluation("packed.safetensors", 88.5, interval=(84.0, 92.0), bits=bits_of(searched()))
    found = [own, evaluation("float", 90.0, data="data/digits.parquet")]
    for name, kilobytes, value in (("3/3", 1.0, 80.0), ("4/4", 0.1, 87.0)):
        cost = {"weight_bytes": 1000 * kilobytes}
        found.append(evaluation(f"{name[0]}.json", value, method=f"uniform {name}", cost=cost))
    found += [evaluation(f"r{at}", value, method="random") for at, value in enumerate((60, 70.0))]
    for at, document in enumerate(found):
        written = evaluation(**{**document.__dict__, "data": "data/digits.parquet"})
        save_evaluation(written, tmp_path / f"e{at}.json")
    return [tmp_path / "policy.json", *(tmp_path / f"e{at}.json" for at in range(len(found)))]


def changes(found: Headline) -> list[tuple[str, str, str]]:
    return [
        (each.name, each.before.replace(NO_BREAK, " "), each.after.replace(NO_BREAK, " "))
        for each in found.changes
    ]


def test_the_metric_stands_beside_float_and_the_controls(files: list[Path]) -> None:
    found = headline(material(files))
    name, before, after = changes(found)[0]
    assert (name, before, after) == ("top-1 %, digits.parquet, 100 samples", "90.00", "88.50")
    note = "95 % interval 84.00 to 92.00; uniform 4/4: 87.00; random: 65.00 (mean of 2)"
    assert found.changes[0].note == note
    assert found.figure is not None and "over the size" in found.figure.caption
    assert [words for _, words in found.figure.legend] == ["chosen", "uniform bits", "random bits"]


def test_sizes_are_those_of_the_same_layers(files: list[Path]) -> None:
    own = policy_cost(network(), searched())
    _, size, cost = changes(headline(material(files, network=network())))
    weights = 4 + 24 + 24 + 12
    assert size == ("size of the weights", f"{4 * weights} B", f"{own['weight_bytes']:g} B")
    assert cost[0] == "BitOps, beside 8 bit"
    without_network = changes(headline(material(files)))[1]
    assert without_network == ("size of the weights", "300 B", "70 B")  # as evaluations tell


def test_measured_times_stand_before_counted_costs(files: list[Path], tmp_path: Path) -> None:
    found = headline(material([*files, bench(tmp_path / "bench.json")], network=network()))
    assert changes(found)[2] == ("ms for a batch of 1", "3.25", "1.625")
    assert found.changes[2].note == "2.00 times faster than float; net.onnx, a CPU"


def test_where_nothing_was_measured_the_front_of_the_scores_is_drawn(tmp_path: Path) -> None:
    searched().save(tmp_path / "policy.json")
    scores().save(tmp_path / "scores.json")
    paths = [tmp_path / "policy.json", tmp_path / "scores.json"]
    found = headline(material(paths, network=network()))
    assert found.figure is not None and "Total score over BitOps" in found.figure.caption
    assert found.words.startswith("policy.json (fisher) gives 4 layers weights of 2 to 8 bits.")
    assert found.words.endswith(NOT_MEASURED)
    bare = headline(material(paths[1:]))
    assert (bare.words, list(bare.changes), bare.figure) == ("", [], None)


def told(found: Measurements | None) -> list[tuple[str, str, float]]:
    assert found is not None
    return [(each.role, each.name, each.value) for each in found.all]


def test_runs_are_measurements_over_their_seeds(tmp_path: Path) -> None:
    uniform = searched("3/3", "3/3", "uniform")
    paths = [run(tmp_path / f"u{seed}", policy=uniform, seed=seed, top1=90.0) for seed in (0, 1)]
    for seed in (0, 1):
        paths.append(run(tmp_path / f"m{seed}", policy=searched(), seed=seed, top1=91.0 + seed))
    paths.append(run(tmp_path / "float", top1=95.0, epochs=3))
    found = measured(material(paths, network=network()))
    assert told(found) == [
        *(("uniform", "uniform 3/3", 90.0), ("chosen", "fisher", 91.5)),
        ("float", "float", 95.0),
    ]
    assert found is not None and found.all[1].interval is not None
    low, high = found.all[1].interval  # 91.5 ± 6.353
    assert (low, high) == (pytest.approx(85.147, abs=1e-3), pytest.approx(97.853, abs=1e-3))


def test_evaluations_of_older_files_are_told_apart_by_their_policies(tmp_path: Path) -> None:
    searched().save(tmp_path / "policy.json")
    searched("4/4", "4/4", "uniform").save(tmp_path / "uniform.json")
    for name in ("policy.json", "uniform.json"):
        save_evaluation(evaluation(name, 80.0), tmp_path / f"e-{name}")
    paths = [tmp_path / name for name in ("policy.json", "uniform.json")]
    found = measured(material([*paths, *(tmp_path / f"e-{path.name}" for path in paths)]))
    expected = [("chosen", "fisher", 80.0), ("uniform", "uniform 4/4", 80.0)]
    assert told(found) == expected
    assert found is not None and found.all[0].interval is None


def test_float_networks_alone_are_no_result(tmp_path: Path) -> None:
    save_evaluation(evaluation(), tmp_path / "float.json")
    assert measured(material([tmp_path / "float.json"])) is None


def test_no_interval_reaches_beyond_all_images(tmp_path: Path) -> None:
    own = [run(tmp_path / f"m{at}", policy=searched(), seed=at, top1=98.0 + at) for at in (0, 1)]
    found = measured(material(own))
    assert found is not None and found.all[0].interval is not None
    assert found.all[0].interval[1] == 100.0
