import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitscape.dynamic.storage import DynamicDocument, TiersDocument, TierSummary
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.report.documents import save_evaluation, save_quality
from bitscape.report.inputs import read_inputs
from tests.report.made import analysis, bench, evaluation, latency, policy, run, scores, searched
from tests.report.test_documents import grid


def test_every_kind_is_told_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    files = [tmp_path / f"{at}.json" for at in range(7)]
    searched().save(files[0])
    scores().save(files[1])
    save_quality(grid(), files[2])
    bench(files[3])
    latency().save(files[4])
    save_evaluation(evaluation(), files[5])
    analysis().save(files[6])
    folder = run(tmp_path / "run", policy=policy())
    read = read_inputs([*files, folder])
    assert read.names == (*(f"{at}.json" for at in range(7)), "run")
    assert read.evaluations == {"5.json": evaluation()}
    assert read.analyses == {"6.json": analysis()}
    assert list(read.policies) == ["0.json", "run"]
    assert [list(kind) for kind in (read.scores, read.quality_tables, read.benches, read.latencies)] == [
        ["1.json"],
        ["2.json"],
        ["3.json"],
        ["4.json"],
    ]
    first = {"epoch": 1, "loss": 1.0, "top1": 51.0, "validation_top1": 90.0}
    assert read.runs["run"].records == (first, {**first, "epoch": 2, "loss": 0.5, "top1": 52.0})


def test_a_run_tells_its_accuracy_and_whether_it_ended(tmp_path: Path) -> None:
    paths = [run(tmp_path / "a", top1=80.5), run(tmp_path / "b", ended=False, policy=policy()), run(tmp_path / "c", top1=None)]
    averaged = run(tmp_path / "d")
    records = [{"epoch": 2, "validation_top1": 70.0, "ema_validation_top1": 75.0}]
    (averaged / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read = read_inputs([*paths, averaged]).runs
    assert [each.top1 for each in read.values()] == [80.5, 90.0, None, 75.0]
    assert [each.ended for each in read.values()] == [True, False, True, True]
    assert [each.is_float for each in read.values()] == [True, False, True, True]


def test_dynamic_and_tiers_folders(tmp_path: Path) -> None:
    folder = run(tmp_path / "dynamic", policy=policy(), step={"kind": "Dqmq", "bitops": 5000})
    about = DynamicDocument(format=1, low=2, high=8, weights=False, static=None, input_shape=(1, 4, 4))
    (folder / "dynamic.json").write_text(json.dumps(about.__dict__))
    tier = TierSummary(bitops=9, mean_weight_bits=4.0, mean_activation_bits=4.0, share=0.5)
    tiers = TiersDocument(format=1, input_shape=(1, 4, 4), gate_bitops=1.0, tiers=(tier, tier))
    for name, second in (("tier1", "2/2"), ("tier2", "4/4")):
        (tmp_path / "tiers" / name).mkdir(parents=True)
        policy(second).save(tmp_path / "tiers" / name / "policy.json")
    (tmp_path / "tiers" / "tiers.json").write_text(json.dumps({**tiers.__dict__, "tiers": [tier.__dict__] * 2}))
    read = read_inputs([folder, tmp_path / "tiers"])
    assert read.runs["dynamic"].dynamic == about
    assert read.runs["dynamic"].bitops_cap == 5000
    bits = {name: str(found.layers["second"]) for name, found in read.policies.items()}
    assert bits == {"dynamic": "2/4", "tiers/tier1": "2/2", "tiers/tier2": "4/4"}


def test_files_that_end_alike_are_called_by_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / name / "policy.json" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        policy().save(path)
    assert read_inputs([*paths, paths[0]]).names == tuple(map(str, paths))


def _text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "none of the files that a report reads; allowed are folders of"),
        ('{"format": 1}', "none of the files that a report reads"),
        ('{"format": 1, "layers": {"a": {"weight": 9, "activation": 1}}}', "weight bits are 9"),
        ('{"format": 1, "scores": {}}', "x.json"),
        ('{"format": 1, "cells": 3}', "cells"),
        ('{"format": 1, "rows": []}', "Field required"),
        ('{"format": 7, "network_ms": 1, "layers": {}}', "format 7 is unknown"),
    ],
)
def test_a_damaged_or_unknown_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BitscapeError, match=r"x\.json") as raised:
        read_inputs([path])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", "run.json: not readable as JSON"),
        ("run.json", '{"format": 2, "settings": {}}', "run.json: it has no settings, or another format"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epoch": 2, "lo', "metrics.jsonl, line 2: not readable"),
        ("metrics.jsonl", '{"epoch": 1, "loss": NaN}\n', "metrics.jsonl, line 1: NaN is no allowed number"),
        ("metrics.jsonl", '{"epoch": 1, "loss": "low"}\n', "line 1: a record holds numbers"),
        ("metrics.jsonl", '{"loss": 1}\n', "line 1: a record holds numbers, its epoch among them"),
        ("metrics.jsonl", "3\n", "line 1: it is no JSON object"),
        ("policy.json", "{}", "policy.json: not a policy file"),
    ],
)
def test_a_damaged_folder_names_its_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = run(tmp_path / "run", policy=policy())
    (folder / name).write_text(content)
    with pytest.raises(BitscapeError) as raised:
        read_inputs([folder])
    assert message in str(raised.value)


def test_a_folder_of_nothing_and_no_path_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BitscapeError, match=r"no run.json and no tiers.json in this folder"):
        read_inputs([tmp_path])
    with pytest.raises(BitscapeError, match="RUN is missing"):
        read_inputs([])


def test_files_of_two_networks_are_refused(tmp_path: Path) -> None:
    own, other, marked, table = (tmp_path / name for name in ("own.json", "other.json", "marked.json", "scores.json"))
    policy().save(own)
    Policy({"conv": LayerBits(4, 4)}).save(other)
    Policy(policy().layers, "0" * 16).save(marked)
    scores().save(table)
    pairs = {
        "other.json and own.json": [own, other],
        "marked.json and own.json": [own, marked],
        "scores.json and other.json": [other, table],
    }
    for names, paths in pairs.items():
        with pytest.raises(BitscapeError, match=f"{names} are of two networks"):
            read_inputs(paths)
    assert len(read_inputs([own, table]).names) == 2
