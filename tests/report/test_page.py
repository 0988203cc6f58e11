import base64
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bitscape.cost.policy_cost import layer_cost, policy_cost
from bitscape.errors import BitscapeError, printable
from bitscape.policy import LayerBits, Policy
from bitscape.report.documents import save_evaluation, save_quality
from bitscape.report.front import front_of
from bitscape.report.inputs import read_inputs
from bitscape.report.page import report_page
from bitscape.report.reproduce_section import _as_given, search_command
from bitscape.searches.scores import ScoreTable
from bitscape.words import NO_BREAK, cost_text
from tests.report.made import (
    CAPS,
    LAYERS,
    analysis,
    bench,
    evaluation,
    latency,
    network,
    policy,
    run,
    scores,
    searched,
)
from tests.report.reading import Page
from tests.report.test_documents import grid

RESULT, BITS, COSTS, FRONT = (
    "What was asked and what came out",
    "Bits per layer",
    "Cost by layer",
    "The policy at every budget",
)
MIXED, SCORES, ERRORS, TRAINING = (
    "Does mixed beat uniform here?",
    "Sensitivity of layers",
    "Error by layer",
    "Training",
)
QUALITY, DEPLOYED, AGAIN, ABSENT = (
    "Images of lesser quality",
    "Deployed: milliseconds and bytes",
    "How to reproduce",
    "Not in this report",
)
CALLED = ("first", "third", "second", "last")
"""Layers in the order of their calls."""
ORDER = [RESULT, BITS, COSTS, FRONT, MIXED, SCORES, ERRORS, TRAINING, QUALITY, DEPLOYED, AGAIN]


def page(*paths: Path, **more: Any) -> Page:
    return Page(report_page(read_inputs(paths), **more))


@pytest.fixture
def everything(tmp_path: Path) -> list[Path]:
    """Files of every kind; fisher is ahead by 1, 2 and 3 points."""
    searched().save(tmp_path / "policy.json")
    scores().save(tmp_path / "scores.json")
    latency().save(tmp_path / "latency.json")
    save_quality(grid(), tmp_path / "grid.json")
    bench(tmp_path / "bench.json")
    uniform = searched("3/3", "3/3", "uniform")
    runs = [
        run(tmp_path / f"uniform{seed}", policy=uniform, seed=seed, top1=90.0) for seed in range(3)
    ]
    runs += [
        run(tmp_path / f"mixed{seed}", policy=searched(), seed=seed, top1=91.0 + seed)
        for seed in range(3)
    ]
    analysis().save(tmp_path / "analysis.json")
    return [
        *(tmp_path / f"{name}.json" for name in ("policy", "scores", "latency", "grid", "bench")),
        *runs,
        tmp_path / "analysis.json",
    ]


def test_every_section_has_its_place(everything: list[Path]) -> None:
    shown = page(*everything, network=network())
    assert list(shown.sections) == ORDER
    assert [attributes["href"] for tag, attributes in shown.tags if tag == "a"] == [
        f"#{attributes['id']}" for tag, attributes in shown.tags if tag == "h2"
    ]


@pytest.mark.parametrize(
    ("names", "there", "absent"),
    [
        (
            ["policy.json"],
            [RESULT, BITS, AGAIN],
            {
                COSTS: "--model NAME",
                FRONT: "`bitscape search --scores`",
                MIXED: "No ended run with",
            },
        ),
        (["policy.json", "scores.json"], [RESULT, BITS, SCORES, AGAIN], {FRONT: "--model NAME"}),
        (
            ["grid.json"],
            [QUALITY, AGAIN],
            {RESULT: "a policy file", TRAINING: "bitscape train --out"},
        ),
        (["analysis.json"], [ERRORS, AGAIN], {QUALITY: "bitscape evaluate --corruptions"}),
        (["policy.json"], [RESULT, BITS, AGAIN], {ERRORS: "`bitscape analyze --out`"}),
        (["bench.json"], [DEPLOYED, AGAIN], {QUALITY: "bitscape evaluate --corruptions"}),
        (["mixed0"], [RESULT, BITS, TRAINING, AGAIN], {DEPLOYED: "bitscape bench --json"}),
    ],
)
def test_a_section_without_data_is_named_with_what_would_bring_it(
    everything: list[Path], names: list[str], there: list[str], absent: dict[str, str]
) -> None:
    shown = page(*(path for path in everything if path.name in names))
    assert [name for name in shown.sections if name != ABSENT] == there
    assert shown.scripts == []
    assert all(name in shown.said(ABSENT) for name in ORDER if name not in there)
    for words in absent.values():
        assert words.strip("`") in shown.said(ABSENT)


def test_costs_in_the_page_are_those_of_the_policy(everything: list[Path]) -> None:
    shown = page(*everything[:2], network=network())
    own = policy_cost(network(), searched())
    found = shown.table("Cost, counted on the network")["BitOps"]
    text = cost_text("bitops", own["bitops"]).replace(NO_BREAK, " ")
    eight = policy_cost(network(), Policy(dict.fromkeys(LAYERS, LayerBits(8, 8))))["bitops"]
    assert list(found.values()) == [
        *(
            "BitOps",
            text,
            cost_text("bitops", eight).replace(NO_BREAK, " "),
            f"{100 * own['bitops'] / eight:.1f} %",
        ),
        *("20 k", f"{100 * own['bitops'] / CAPS['bitops']:.1f} %"),
    ]
    rows = shown.table("Costs as a table")
    assert list(rows) == ["first", "third", "second", "last"]
    for layer in network().layers:
        bits = searched().layers[layer.name]
        cost = layer_cost("bitops", layer, bits)
        expected = [
            cost_text("bitops", cost).replace(NO_BREAK, " "),
            f"{100 * cost / own['bitops']:.1f} %",
        ]
        found = rows[layer.name]
        assert [found["bits"], found["BitOps"]] == [str(bits), expected[0]]
        assert expected[1] in list(found.values()) or found["share"]
    assert shown.table("Weight/activation bits as a table")["second"]["policy.json"] == "2/4"


def test_what_was_asked_is_what_the_policy_tells(everything: list[Path]) -> None:
    shown = page(everything[0])
    asked = {
        name: row["as the policy file tells"] for name, row in shown.table("What was asked").items()
    }
    assert asked["network"] == "made:Net"
    assert asked["budget"] == "BitOps ≤ 20 k and weight bytes ≤ 400 B"
    assert asked["images"] == "16 of 1x4x4 from digits"
    assert (asked["seed of the search"], asked["to be trained afterwards"]) == ("3", "yes")
    assert shown.table("Cost, as saved")["BitOps"] == {
        "cost of one image": "BitOps",
        "chosen policy": "11.01 k",
        "cap": "20 k",
        "of the cap": "55.0 %",
    }


def test_accuracy_and_the_answer_are_those_of_the_runs(everything: list[Path]) -> None:
    shown = page(*everything[5:])
    rows = shown.table("Top-1 after the last epoch")
    assert [(row["bits"], row["seed"], row["validation, %"]) for row in rows.values()] == [
        *(("uniform 3/3", str(seed), "90.00") for seed in range(3)),
        *(("fisher", str(seed), f"{91 + seed}.00") for seed in range(3)),
    ]
    # 1, 2, 3: half = 4.30265 / sqrt(3) = 2.4842
    assert "No difference seen between fisher and uniform 3/3: +2.00 points" in shown.said(MIXED)
    assert "-0.48 to +4.48 holds zero" in shown.said(MIXED)
    assert (
        "Top-1 after training: 90.00 % uniform 3/3 (3 seeds) and 92.00 % fisher (3 seeds)."
        in shown.said(RESULT)
    )


def test_the_layer_that_hurts_is_named_and_its_values_are_drawn(everything: list[Path]) -> None:
    shown = page(everything[-1])
    assert (
        "last, at 4/8 bits, moves the outputs most by itself; most of its noise is from its weight."
        in shown.said(ERRORS)
    )
    table = shown.table("Layers by the error that each causes alone")
    assert list(table) == ["last", "third", "second", "first"]
    assert (table["last"]["error %"], table["last"]["divergence"], table["last"]["saves"]) == (
        "80",
        "8",
        "3.5",
    )
    assert (table["last"]["weight dB"], table["last"]["input dB"], table["last"]["its range"]) == (
        "27.0",
        "-",
        "-1..3",
    )
    assert len(shown.pictures) == 1 + 8


def test_scores_of_the_file_are_in_the_page(everything: list[Path]) -> None:
    shown = page(*everything[:2], network=network())
    table = shown.table("Scores of scores.json as a table")
    assert table["second"] == {
        "layer": "second",
        "2/2": "1",
        "4/4": "0.01",
        "2/4": "0.125",
        "4/2": "0.5",
    }
    front = shown.table("Points as a table")
    assert front["chosen"]["score"] == "0.375"  # 0.125 + 0.25
    assert front["uniform 4/4"]["score"] == "0.03"
    assert "The chosen policy scores 0.375" in shown.said(FRONT)


def test_the_slider_holds_the_policy_at_every_budget(everything: list[Path]) -> None:
    written = report_page(read_inputs(everything[:2]), network=network())
    shown = Page(written)
    (data,) = (
        json.loads(found["data-front"] or "") for _, found in shown.tags if "data-front" in found
    )
    front = front_of(scores(), network(), searched(), CAPS)
    policies = [point.policy for point in front.best]
    for kind in ("weight", "activation"):
        expected = [[getattr(own.layers[name], kind) for name in CALLED] for own in policies if own]
        assert data[f"{kind}s"] == expected
    (slider,) = (found for tag, found in shown.tags if tag == "input")
    assert (slider["min"], slider["max"]) == ("0", str(len(policies) - 1))
    start = int(slider["value"] or "")
    assert front.best[start].cost <= policy_cost(network(), searched())["bitops"]
    assert data["told"][start].replace("\u00a0", " ") in shown.said(FRONT)
    assert [len(data[name]) for name in ("told", "x", "y")] == [len(policies)] * 3


def test_no_other_script_than_that_of_the_slider_may_run(everything: list[Path]) -> None:
    written = report_page(read_inputs(everything[:2]), network=network())
    (script,) = Page(written).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (rules,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', written)
    assert rules == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_times_and_quality_are_those_of_their_files(everything: list[Path]) -> None:
    shown = page(*everything[2:5])
    row = shown.table("bench.json: images of 1x4x4, a CPU, threads: 1; median of 5 rounds")[
        "net.onnx"
    ]
    assert [row[name] for name in ("size", "CPU ms", "x first", "agrees, %")] == [
        "1.234 kB",
        "1.625",
        "2.00",
        "98.50",
    ]
    assert (
        "latency table (openvino 1, a CPU, threads: 1, batch: 1) is flat below 8 bits"
        in shown.said(DEPLOYED)
    )
    assert "Top-1 90.50 % clean" in shown.said(QUALITY)
    drawn = {each.text for each in shown.pictures[0].iter("{http://www.w3.org/2000/svg}text")}
    assert {"90.5", "89.5", "85.5"} <= drawn


def test_commands_say_what_the_files_record(everything: list[Path]) -> None:
    said = page(
        *everything[:1], *everything[5:], command="bitscape report policy.json --out x.html"
    ).said(AGAIN)
    search = "bitscape search --model made:Net --weights net.safetensors --data digits --images 16"
    caps = "--budget bitops=20000 --budget weight_bytes=400"
    assert (
        f"{search} {caps} --method fisher --set images=16 --for-training --seed 3 --out policy.json"
        in said
    )
    trained = (
        "bitscape train --model made:Net --weights net.safetensors --data '<digits train>' "
        "--policy policy.json"
    )
    assert (
        f"{trained} --epochs 2 --batch-size 64 --optimizer sgd --lr 0.05 --seed 1 --out mixed1"
        in said
    )
    assert "--policy uniform0.json" in said
    assert "bitscape report policy.json --out x.html" in said
    assert "torch 2.11" in said and "0, 1, 2" in said


def test_a_recorded_command_and_machine_are_shown_as_they_are_and_the_commit_in_short(
    tmp_path: Path,
) -> None:
    folder, old = run(tmp_path / "new"), run(tmp_path / "old", seed=1)
    about = json.loads((folder / "run.json").read_text())
    given = {
        "command": "bitscape train --data 'my photos' --out new",
        "hardware": "Some CPU, 2 cores",
        "commit": "abc123" * 6 + "abcd-dirty",
    }
    (folder / "run.json").write_text(json.dumps({**about, **given}))
    shown = page(folder, old)
    said = shown.said(AGAIN)
    assert given["command"] in said and "as run.json records them" in said
    assert (
        "--out old" in said and said.count("bitscape train") == 2
    )  # the old one is put together from its settings
    rows = shown.table("Software, hardware, seeds")
    assert [(row["ran on"], row["seeds"], row["commit"]) for row in rows.values()] == [
        ("cpu: Some CPU, 2 cores", "0", "abc123abc123-dirty"),
        ("cpu", "1", "not recorded"),
    ]


def test_bits_that_images_decide_are_no_static_policy(tmp_path: Path) -> None:
    folder = run(
        tmp_path / "dynamic", policy=policy("4/8", "4/8"), step={"kind": "Dqmq", "bitops": 15_000}
    )
    about = {
        "format": 1,
        "low": 2,
        "high": 8,
        "weights": False,
        "static": None,
        "input_shape": [1, 4, 4],
    }
    (folder / "dynamic.json").write_text(json.dumps(about))
    records = [
        {"epoch": at, "loss": 1.0, "top1": 80.0, "bits": 5.0 - at, "bitops": 14_000.0}
        for at in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    policy("4/8", "4/8").save(tmp_path / "static.json")
    shown = page(folder, tmp_path / "static.json", network=network())
    assert any("images decide on their bits (dynamic 2-8)" in words for words in shown.head)
    row = shown.table("Top-1")["dynamic"]
    assert [row[name] for name in ("bits", "bits of images", "BitOps of images", "asked for")] == [
        "dynamic 2-8",
        "3",
        "14 k",
        "15 k",
    ]
    assert [row["method"] for row in shown.table("All policies").values()] == [
        "dynamic 2-8",
        "uniform 4/8",
    ]
    assert "--dynamic 2-8 --budget bitops=15000" in shown.said(AGAIN)


EVIL = '<script>alert("1")</script>\'&`{{ 7 * 7 }}'


def test_no_text_of_a_file_is_more_than_text(tmp_path: Path) -> None:
    bits = {EVIL: LayerBits(2, 4), "b": LayerBits(4, 4), "c": LayerBits(3, 2)}
    about = {
        "method": EVIL,
        "model": EVIL,
        "data": EVIL,
        "budget": {"bitops": 9},
        "settings": {EVIL: EVIL},
        "weights": EVIL,
        "commit": EVIL,
    }
    Policy(bits, None, {EVIL: 3.5}, {**about, "version": EVIL}).save(tmp_path / "policy.json")
    ScoreTable((EVIL, "b"), (LayerBits(2, 4),), [[0.5], [1.0]], EVIL).save(tmp_path / "scores.json")
    folder = run(
        tmp_path / "run <script>",
        policy=Policy(bits, None, {}, about),
        optimizer={"kind": EVIL},
        batches={"dataset": {"name": EVIL}},
    )
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"torch"', json.dumps(EVIL)))
    paths = [
        tmp_path / "policy.json",
        tmp_path / "scores.json",
        folder,
        bench(tmp_path / "bench.json", EVIL),
    ]
    written = report_page(read_inputs(paths), model=EVIL, command=EVIL)
    shown = Page(written)
    assert "<script" not in written
    assert EVIL in shown.words[0] or any(EVIL in words for words in shown.words)
    assert EVIL in shown.table("Weight/activation bits as a table")
    assert not [
        tag
        for tag, attributes in shown.tags
        if tag in ("script", "img", "iframe", "link")
        or any(name.startswith("on") for name in attributes)
    ]


def test_characters_that_no_page_can_hold_are_written_as_escapes(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text('{"format": 1, "layers": {"a\\u0000b": {"weight": 4, "activation": 4}}}')
    written = report_page(read_inputs([file]), command="name of a file: \ud800")
    assert "a\\x00b" in written and "\\ud800" in written
    written.encode()
    Page(written)


@pytest.mark.parametrize("value", [None, 1, "text", [1], [1, 2, 3, 4], {"a": 1}, True])
def test_provenance_of_any_form_is_no_error(tmp_path: Path, value: object) -> None:
    names = (
        "method",
        "model",
        "weights",
        "data",
        "budget",
        "settings",
        "images",
        "seed",
        "for_training",
        "pick",
        "version",
        "normalize",
        "target",
    )
    saved = policy(**dict.fromkeys(names, value))
    saved.save(tmp_path / "policy.json")
    folder = run(
        tmp_path / "run",
        policy=saved,
        step=value,
        optimizer=value,
        loss=value,
        batches=value,
        validation=value,
        seed=value,
        compile=value,
    )
    page(tmp_path / "policy.json", folder, network=network())


def test_the_page_fetches_nothing_and_is_the_same_every_time(everything: list[Path]) -> None:
    first, second = (report_page(read_inputs(everything), network=network()) for _ in range(2))
    assert first == second
    assert set(re.findall(r"https?://[^\"' <)]*", first)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|srcset|action)=|@import|url\(", first)
    shown = Page(first)
    assert all(
        attributes["href"].startswith("#") for tag, attributes in shown.tags if "href" in attributes
    )
    for picture in shown.pictures:
        assert picture.get("role") == "img" and [each.tag.rpartition("}")[2] for each in picture][
            :2
        ] == ["title", "desc"]
        assert all(each.text for each in list(picture)[:2])
    assert len(shown.pictures) == 24
    headed = [rows for rows in shown.tables.values() if not rows[0] or not all(rows[0])]
    assert headed == []


def test_sixty_layers_at_all_pairs_stay_below_300_kb(tmp_path: Path) -> None:
    names = [f"features.{at}.block.convolution.{at}" for at in range(60)]
    widths = (2, 3, 4, 5, 6, 8)
    pairs = tuple(LayerBits(weight, activation) for weight in widths for activation in widths)
    saved = Policy(
        {name: pairs[at % 36] for at, name in enumerate(names)},
        None,
        {"bitops": 1},
        {"method": "fisher"},
    )
    saved.save(tmp_path / "policy.json")
    values = [[1.2345e-6 * (at + 1) * (column + 1) for column in range(36)] for at in range(60)]
    ScoreTable(tuple(names), pairs, values, "fisher").save(tmp_path / "scores.json")
    runs = [run(tmp_path / f"run{seed}", policy=saved, seed=seed, epochs=200) for seed in range(6)]
    written = report_page(read_inputs([tmp_path / "policy.json", tmp_path / "scores.json", *runs]))
    assert len(written.encode()) < 300_000
    Page(written)


def test_a_policy_of_another_network_is_named(tmp_path: Path) -> None:
    Policy({"conv": LayerBits(4, 4)}).save(tmp_path / "other.json")
    with pytest.raises(BitscapeError, match=r"other\.json: the network has no layer 'conv'"):
        report_page(read_inputs([tmp_path / "other.json"]), network=network())


def _luminance(color: str) -> float:
    shares = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    ]
    return sum(
        weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


def test_words_and_lines_stand_out_in_light_and_in_dark(everything: list[Path]) -> None:
    style = report_page(read_inputs(everything[:1])).partition(
        "@media (prefers-color-scheme: dark)"
    )
    for part in (style[0], style[2].partition("* {")[0]):
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part))
        contrasts = {}
        for name, color in colors.items():
            low, high = sorted((_luminance(color), _luminance(colors["paper"])))
            contrasts[name] = (high + 0.05) / (low + 0.05)
        assert min(contrasts[name] for name in ("ink", "soft", "link")) >= 4.5  # WCAG 2.1 AA, text
        assert min(contrasts[f"s{at}"] for at in range(8)) >= 3  # and graphics


def test_what_files_say_is_quoted_in_commands() -> None:
    evil = "a; rm -rf ~ #$(id)`id`\n\x1b[2J\u202e'"
    budget = {"bitops": evil}
    policy = Policy(
        {"a": LayerBits(4, 4)},
        provenance={
            "model": evil,
            "data": evil,
            "budget": budget,
            "images": [evil],
            "method": evil,
        },
    )
    words = shlex.split(search_command(policy, evil) or "")
    shown = printable(evil)
    assert words[:4] == ["bitscape", "search", "--model", shown] and words[-1] == shown
    assert words.count(shown) == 5 and f"bitops={shown}" in words


def test_recorded_commands_are_quoted_again() -> None:
    usual = "bitscape train --data 'my photos' --out new"
    assert _as_given(usual) == usual
    assert (
        _as_given("bitscape train; rm -rf ~ && $(id)")
        == "bitscape 'train;' rm -rf '~' '&&' '$(id)'"
    )
    assert shlex.split(_as_given("bitscape 'x; rm -rf ~")) == ["bitscape 'x; rm -rf ~"]


def test_measured_networks_are_compared_with_the_float_one(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("mixed.json", "float.json", "policy.json")]
    save_evaluation(evaluation("policy.json", 88.5), files[0])
    save_evaluation(evaluation(), files[1])
    searched().save(files[2])
    shown = page(*files, network=network())
    rows = shown.table("Measured on digits")
    assert list(rows) == ["float", "policy.json"]
    assert rows["policy.json"] == {
        **{"network": "policy.json", "top-1 %": "88.5", "beside float": "-1.5", "loss": "0.5"},
        **{"weight bytes": "70 B", "BitOps": "11.01 k", "samples": "100"},
    }
    assert rows["float"]["weight bytes"] == "300 B" and rows["float"]["BitOps"] == "-"
    assert "Measured on digits, top-1 %: 90 float and 88.5 policy.json." in shown.said(RESULT)
