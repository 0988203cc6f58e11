import re
import shlex

import pytest

from tests.cli.run import MODEL
from tests.report.reading import Page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(cli, trained, tmp_path_factory):
    """Two seeds at the searched policy and at a uniform one, one epoch each."""
    folder, paths = tmp_path_factory.mktemp("report"), []
    weights = ("--weights", trained / "model.safetensors", "--data", "digits")
    cli("search", *MODEL, *weights, "--images", 8, "--method", "uniform", "--budget", "bitops=w4a4", "--out", folder / "uniform.json")
    cli(
        "search", *MODEL, *weights, "--images", 8, "--budget", "bitops=w4a4", "--out", folder / "fisher.json", "--scores", folder / "s.json"
    )
    for seed in range(2):
        for name in ("uniform", "fisher"):
            out = folder / f"{name}-{seed}"
            given = ("--policy", folder / f"{name}.json", "--epochs", 1, "--validation", "digits", "--seed", seed)
            cli("train", *MODEL, *weights, *given, "--out", out)
            paths.append(out)
    return [folder / "fisher.json", folder / "s.json", *paths]


def test_a_search_and_its_runs_become_one_page(cli, runs, tmp_path):
    out = tmp_path / "report.html"
    shown = cli("report", *runs, *MODEL, "--out", out)
    assert shown.out == f"report: {out}, {out.stat().st_size / 1000:.0f} kB\n"
    page = Page(out.read_text(encoding="utf-8"))
    assert "Does mixed beat uniform here?" in page.sections and "Cost by layer" in page.sections
    evaluated = cli("evaluate", *MODEL, "--data", "digits", "--checkpoint", runs[2]).out
    top1 = page.table("Top-1 after the last epoch")["uniform-0"]["validation, %"]
    assert evaluated.startswith(f"top-1 {top1} %")
    assert shlex.join(["bitscape", "report", *map(str, runs), *MODEL, "--out", str(out)]) in page.said("How to reproduce")


def test_the_costs_are_those_that_policy_show_prints(cli, runs, tmp_path):
    cli("report", runs[0], *MODEL, "--out", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    (line,) = (line for line in cli("policy", "show", runs[0], *MODEL).out.splitlines() if line.startswith("bitops"))
    found = page.table("Cost, counted on the network")["BitOps"]
    assert re.split("  +", line)[1:] == [found[name] for name in ("chosen policy", "8 bit", "of 8 bit")]


def test_without_a_network_what_only_it_tells_is_named(cli, runs, tmp_path):
    cli("report", *runs[:2], "--out", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Cost by layer" not in page.sections
    assert page.said("Not in this report").count("--model NAME") == 2


def test_mistakes_end_in_one_clear_line(refused, runs, trained, tmp_path):
    out = ("--out", tmp_path / "report.html")
    assert "none of the files that a report reads" in refused("report", _file(tmp_path, "{}"), *out)
    assert "not readable as JSON" in refused("report", _file(tmp_path, "{"), *out)
    assert "no run.json" in refused("report", tmp_path, *out)
    assert "add --model NAME" in refused("report", runs[0], "--input-shape", "1x8x8", *out)
    assert "--input-shape is missing" in refused("report", runs[1], *MODEL, *out)
    assert "no folder" in refused("report", runs[0], "--out", tmp_path / "none" / "report.html")
    other = ("--model", "recipes.networks:resnet20", "--input-shape", "3x32x32")
    assert "fisher.json: the network has no layer" in refused("report", runs[0], *other, *out)
    assert "model.safetensors" in refused("report", runs[0], *other, "--weights", trained / "model.safetensors", *out)
    assert not (tmp_path / "report.html").exists()


def _file(folder, text):
    path = folder / "damaged.json"
    path.write_text(text)
    return path
