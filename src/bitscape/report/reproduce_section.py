"""Section 11: the commands, versions, seeds and machines behind a report, as far as its files tell."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bitscape.errors import printable
from bitscape.policy import Policy
from bitscape.report.blocks import Block, Commands, Section, Table, Text
from bitscape.report.inputs import TrainedRun
from bitscape.report.material import Material
from bitscape.report.policies import Shown
from bitscape.version import __version__
from bitscape.words import NONE, listed

MIXED = " of mixed quality"
"""What `randomly_corrupted` appends to the name of a data set."""


HOW = (
    "Commands, put together from what the files record. Not recorded, so to be added where they were used: candidates, pins, folders of "
    "weights, settings of training steps; '<...>' is to be filled in."
)
AS_GIVEN = "Commands of trainings as run.json records them: what was given last, so that a run that was continued has --resume in it."


def reproduce(material: Material) -> Section:
    """Section 11."""
    files = {each.name: _file_of(each) for each in material.policies}
    searches = [line for each in material.policies if (line := search_command(each.policy, files[each.name]))]
    file_of = {name: files[each.name] for each in material.policies for name in each.names if not each.is_widest}
    runs = material.inputs.runs
    given = [_as_given(run.command) for run in runs.values() if run.command is not None]
    trainings = [train_command(name, run, file_of.get(name, "<policy>")) for name, run in runs.items() if run.command is None]
    blocks: list[Block] = []
    if searches or trainings:
        blocks.append(Text(HOW))
    blocks += [Commands(lines) for lines in (searches, trainings) if lines]
    blocks += [Text(AS_GIVEN), Commands(given)] if given else []
    blocks += [Commands([material.command])] if material.command else []
    columns = ["files", "software", "ran on", "seeds", "commit"]
    blocks.append(Table(caption="Software, hardware, seeds", columns=columns, rows=_origins(material), left=5))
    blocks.append(Text(f"Read: {listed(material.inputs.names)}. Report by bitscape {__version__}."))
    return Section(anchor="reproduce", title="How to reproduce", blocks=blocks)


def _as_given(command: str) -> str:
    """A recorded command with every word quoted again: whatever else a shell would do with the line, it does not."""
    try:
        return _line(shlex.split(command))
    except ValueError:  # a quotation that does not end
        return _line([command])


def search_command(policy: Policy, name: str) -> str | None:
    """The search that made a policy, as far as it tells; None if it names no network or no budget."""
    found = policy.provenance
    budget, images = found.get("budget"), found.get("images")
    if not isinstance(found.get("model"), str) or not isinstance(budget, dict) or "data" not in found:
        return None
    words = ["bitscape", "search", "--model", found["model"], *_option("--weights", found.get("weights")), "--data", found["data"]]
    words += _option("--normalize", found.get("normalize"))
    words += _option("--images", images[0] if isinstance(images, list) and images else None)
    words += [word for kind, value in budget.items() for word in ("--budget", f"{kind}={value}")]
    words += ["--method", str(found.get("method"))]
    settings = found.get("settings")
    words += [word for key, value in (settings.items() if isinstance(settings, dict) else ()) for word in ("--set", f"{key}={value}")]
    words += ["--for-training"] if found.get("for_training") is True else []
    words += _option("--pick", found.get("pick") if found.get("pick") != "best" else None) + _option("--target", found.get("target"))
    words += _option("--task", found.get("task") if found.get("task") != "auto" else None)
    return _line([*words, *_option("--seed", found.get("seed")), "--out", name])


def train_command(name: str, run: TrainedRun, policy_file: str) -> str:
    """The training that left a folder, as far as the settings in run.json tell."""
    source: Mapping[str, Any] = run.policy.provenance if run.policy else {}
    words = ["bitscape", "train", "--model", source.get("model", "<model>"), *_option("--weights", source.get("weights"))]
    words += [*_data_words(run.settings), *_option("--normalize", source.get("normalize"))]
    words += [] if run.is_float else ["--policy", policy_file]
    if run.dynamic:
        words += ["--dynamic", f"{run.dynamic.low}-{run.dynamic.high}", "--budget", f"bitops={run.bitops_cap}"]
        words += ["--dynamic-weights"] if run.dynamic.weights else []
    return _line([*words, *_recipe_words(run.settings), *_option("--seed", run.seed), "--out", name])


def _data_words(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for option, part in (("--data", "batches"), ("--validation", "validation")):
        name = _mapping(_mapping(settings, part), "dataset").get("name")
        words += [option, f"<{str(name).removesuffix(MIXED)}>"] if name is not None else []
        words += ["--mixed-quality"] if option == "--data" and str(name).endswith(MIXED) else []
    return words


def _recipe_words(settings: Mapping[str, Any]) -> list[str]:
    optimizer, step, loss, batches = (_mapping(settings, part) for part in ("optimizer", "step", "loss", "batches"))
    words = _option("--epochs", settings.get("epochs")) + _option("--batch-size", batches.get("batch_size"))
    if optimizer.get("kind") in ("Sgd", "AdamW"):
        words += ["--optimizer", str(optimizer["kind"]).lower(), *_option("--lr", optimizer.get("lr"))]
    if optimizer.get("kind") == "DqmqSgd":
        words += [*_option("--lr", _mapping(optimizer, "sgd").get("lr")), *_option("--head-lr", optimizer.get("head_lr"))]
    words += ["--step", str(step["kind"]).lower()] if step.get("kind") in ("Sam", "Saq") else []
    words += _unless("--augment", batches.get("augment"), "none") + _unless("--label-smoothing", loss.get("label_smoothing"), 0.0)
    words += _unless("--distill", loss.get("distillation"), 0.0) + _unless("--accumulate", settings.get("accumulate"), 1)
    words += ["--autocast", "bf16"] if settings.get("autocast") == "torch.bfloat16" else []
    words += ["--compile"] if settings.get("compile") is True else []
    return words + _option("--ema", settings.get("ema_decay"))


def _file_of(shown: Shown) -> str:
    """The file of a policy; of one that only folders hold, a new file named after the first."""
    return next((name for name in shown.names if name.endswith(".json")), f"{shown.name.replace('/', '-')}.json")


def _origins(material: Material) -> list[list[str]]:
    """Files that agree in software, machine and commit, in one row with their seeds."""
    unknown = "not recorded"
    found: list[tuple[str, tuple[str, str, str], object]] = []
    for name, run in material.inputs.runs.items():
        software = ", ".join(f"{package} {version}" for package, version in run.versions.items())
        ran_on = ": ".join(filter(None, (run.device, run.hardware)))
        commit = re.sub(r"(?<=^[0-9a-f]{12})[0-9a-f]+", "", run.commit or unknown)  # as long as telling them apart takes
        found.append((name, (software or unknown, ran_on or unknown, commit), run.seed))
    for each in material.policies:
        told = each.policy.provenance
        software = f"bitscape {told['version']}" if "version" in told else unknown
        found.append((f"search of {_file_of(each)}", (software, unknown, str(told.get("commit", unknown))), told.get("seed")))
    for name, bench in material.inputs.benches.items():
        found.append((name, (listed(dict.fromkeys(row.runtime for row in bench.rows)), bench.machine, unknown), None))
    found += [(name, (table.runtime, table.machine, unknown), None) for name, table in material.inputs.latencies.items()]
    alike: dict[tuple[str, str, str], list[tuple[str, object]]] = {}
    for name, origin, seed in found:
        alike.setdefault(origin, []).append((name, seed))
    return [
        [
            listed(name for name, _ in same),
            *origin[:2],
            ", ".join(dict.fromkeys(str(seed) for _, seed in same if seed is not None)) or NONE,
            origin[2],
        ]
        for origin, same in alike.items()
    ]


def _mapping(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = found.get(name)
    return inner if isinstance(inner, Mapping) else {}


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


def _unless(name: str, value: object, usual: object) -> list[str]:
    return [] if value == usual else _option(name, value)


def _line(words: Sequence[object]) -> str:
    """A line for a shell, each word quoted: names and settings come from files, and anything may stand in those."""
    return shlex.join(printable(str(word)) for word in words)
