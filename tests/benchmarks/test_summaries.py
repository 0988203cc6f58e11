import json
from pathlib import Path

from benchmarks.summaries import MAKERS, NO_RUNS, packed_sizes, peer, ptq_imagenet, qat_cifar10, tables
from benchmarks.summaries_common import with_column

CONDITIONS = {
    "device": "a CPU, 2 cores",
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.13", "numpy": "2", "bitscape": "0.1"},
    "commit": "abcdef0123456789-dirty",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m benchmarks.ptq_imagenet",
}


def _qat(method: str, variant: str, seed: int, top1: float, budget: str = "w3a3") -> dict:
    settings = {"budget": budget, "images": 100}
    shared = {"epochs": 2, "float_top1": 91.0, "budget": {"bitops": 3.9e8}, "cost": {"bitops": 3.8e8}, "search_s": 1.0}
    return {"method": method, "variant": variant, "seed": seed, "settings": settings, "top1": top1, **shared}


def _ptq(method: str, proxy: str | None, seed: int, top1: float) -> dict:
    found = {} if method == "float" else {"search_s": 2.0, "cost": {"mean_weight_bits": 4.5}, "extra": {"plain_top1": 50.0}}
    return {
        "network": "net",
        "method": method,
        "proxy": proxy,
        "seed": seed,
        "top1": top1,
        "test_images": 400,
        "settings": {"activation_bits": 8},
    } | found


def _cells(table: str, *starts: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith("| " + " | ".join(starts) + " |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_are_paired_by_seed_with_the_best_uniform_row():
    runs = [_qat("random", "", seed, 80.0 + seed) for seed in (2, 0, 1, 3)]
    runs += [_qat("uniform", "w4a2", seed, 70.0) for seed in range(3)]
    runs += [_qat("uniform", "one width", seed, 90.0 + seed) for seed in range(3)]
    runs += [_qat("fisher", "for training", seed, 91.0 + seed) for seed in range(3)]
    table = qat_cifar10(runs)
    assert "BitOps of w3a3, 390.0 M" in table
    assert _cells(table, "uniform", "one width")[-2:] == ["3", "the best uniform row"]
    assert _cells(table, "uniform", "w4a2")[-1] == "-21.00 [-23.48, -18.52]"
    assert _cells(table, "fisher", "for training")[-1] == "+1.00 [+1.00, +1.00]"
    assert _cells(table, "random", "")[2:3] + _cells(table, "random", "")[-1:] == ["81.50 ± 1.29", "-10.00 [-10.00, -10.00] (3 pairs)"]
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == ["| uniform", "| uniform", "| fisher", "| random"]


def test_budgets_and_recipes_are_not_mixed():
    runs = [_qat("uniform", "one width", 0, 90.0), _qat("uniform", "one width", 0, 80.0, budget="w2a3")]
    longer = {**_qat("fisher", "", 0, 95.0), "epochs": 20}
    table = qat_cifar10([*runs, longer])
    assert table.count("**Budget") == 3
    assert _cells(table, "fisher", "")[-1] == "-"


def test_ptq_rows_say_which_images_and_how_many_random_policies_are_lower():
    runs = [_ptq("random", None, seed, 60.0 + seed) for seed in range(4)]
    runs += [_ptq("fisher", None, 0, 62.0), _ptq("fisher", "cifar10:256", 0, 70.0), _ptq("float", None, 0, 80.0)]
    table = ptq_imagenet(runs)
    assert "400 test images, so one standard error at 80.0 % is 2.0 points" in table
    assert _cells(table, "fisher", "target's own")[-1] == "2 of 4"
    assert _cells(table, "fisher", "cifar10:256")[-1] == "4 of 4"
    assert _cells(table, "float", "-")[2:] == ["-", "80.00", "-", "-", "1", "-"]
    assert _cells(table, "random", "target's own")[3] == "61.50 ± 1.29"


def test_packed_rows_show_ratios():
    extra = {"file_bytes": 2020, "other_bytes": 10, "header_bytes": 10, "file_to_policy": 1.01, "float32_to_file": 7.5, "load_s": 0.25}
    run = {"network": "net", "weights": "random, seed 0", "method": "uniform", "variant": "w4", "seed": 0, "extra": extra}
    table = packed_sizes([{**run, "cost": {"weight_bytes": 2000}}])
    assert _cells(table, "net", "random", "uniform", "w4")[4:] == ["2.0", "2.0", "0.0", "0.0", "1.010", "7.50", "0.250", "1"]


def test_peers_are_paired_with_the_same_widths():
    cost = {"cost": {"weight_bytes": 2000, "mean_weight_bits": 4.0}, "search_s": 5.0, "extra": {"wall_s": 6.0}}
    runs = [{"method": "fisher", "variant": "wide", "seed": seed, "top1": 90.0, **cost} for seed in range(2)]
    runs += [{**run, "method": "mct", "top1": 89.0, "extra": {"wall_s": 7.0, "peer_versions": {"toolkit": "2.0"}}} for run in runs]
    runs += [{**runs[2], "variant": "narrow"}, {"method": "float", "variant": "", "seed": 0, "top1": 91.0}]
    table = peer(runs)
    assert table.startswith("Peer: toolkit 2.0.\n")
    assert _cells(table, "mct", "wide")[2:] == [
        *("89.00 ± 0.00", "2.0 ± 0.0", "4.00 ± 0.00", "5.0 ± 0.0", "7.0 ± 0.0", "2"),
        "-1.00 [-1.00, -1.00]",
    ]
    assert _cells(table, "mct", "narrow")[-1] == "no seed in common"
    assert [_cells(table, *row)[-1] for row in (("fisher", "wide"), ("float", ""))] == ["-", "-"]
    assert peer(runs[:2]).startswith("Peer: no runs yet.")


def test_a_column_of_text_is_added_to_a_table():
    assert with_column("| a |\n| --- |\n| 1 |", "b", ["x"]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_a_file_without_runs_gives_a_line_and_no_error(tmp_path: Path):
    assert tables(tmp_path) == dict.fromkeys(MAKERS, NO_RUNS)


def test_every_table_ends_with_the_conditions_of_its_runs(tmp_path: Path):
    later = {**CONDITIONS, "date": "2026-01-05T00:00:00+00:00"}
    runs = [{**_ptq("float", None, 0, 80.0), **CONDITIONS}, {**_ptq("fisher", None, 0, 70.0), **later}]
    (tmp_path / "ptq-imagenet.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert tables(tmp_path)["ptq-imagenet"].endswith(
        "Conditions: 2 runs on a CPU, 2 cores; threads: 1; python 3.11, torch 2.13, numpy 2, bitscape 0.1; commit abcdef0-dirty; "
        "2026-01-02 to 2026-01-05; `python -m benchmarks.ptq_imagenet`."
    )


def test_many_commands_are_counted(tmp_path: Path):
    runs = [{**_ptq("random", None, seed, 80.0), **CONDITIONS, "command": f"run {seed}"} for seed in range(4)]
    (tmp_path / "ptq-imagenet.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert tables(tmp_path)["ptq-imagenet"].endswith("`run 0` and `run 1` and 2 more (in the results file).")
