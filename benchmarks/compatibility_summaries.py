"""The compatibility matrix as a table, with the reasons for what does not work."""

from collections.abc import Sequence

from benchmarks.summaries_common import Run

PARTS = {"search": "search", "train": "train", "packed": "packed", "onnx": "ONNX", "openvino": "OpenVINO"}
"""Part -> heading."""
SHOWN = 300
"""Characters of a reason."""


def compatibility(runs: Sequence[Run]) -> str:
    """A row for each network; what does not work has a number, under which the reason stands below the table."""
    reasons: dict[str, int] = {}
    heading = ["network", "family", "pixels", "layers", "MACs in layers", *PARTS.values()]
    rows = [_row(run, reasons) for run in runs]
    counts = [f"{sum(_part(run, part).get('outcome') == 'works' for run in runs)} of {len(runs)}" for part in PARTS]
    lines = [heading, ["---"] * len(heading), *rows, ["**works**", "", "", "", "", *counts]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *(f"{number}. {_short(reason)}" for reason, number in reasons.items())])


def _row(run: Run, reasons: dict[str, int]) -> list[str]:
    extra, cost = run["extra"], _part(run, "cost")
    counted = f"{100 * cost['counted_macs']:.0f} %" if "counted_macs" in cost else "-"
    first = [f"`{run['network']}`", extra["family"], str(extra["size"]), str(cost.get("layers", "-")), counted]
    return first + [_cell(run, part, reasons) for part in PARTS]


def _cell(run: Run, part: str, reasons: dict[str, int]) -> str:
    """ "yes", or how it ended and the number of the reason; of a part that was not tried, the reason of the one that it needs."""
    found = _part(run, part) or next(each for name in ("build", "cost", "search") if (each := _part(run, name))["outcome"] != "works")
    if found["outcome"] == "works":
        layers = _part(run, "cost").get("layers")
        return "yes" if found.get("integer_layers", layers) == layers else f"yes, {found['integer_layers']} layers"
    number = reasons.setdefault(found["reason"], len(reasons) + 1)
    return f"{found['outcome']} ({number})"


def _part(run: Run, name: str) -> Run:
    found: Run = run["extra"]["parts"].get(name, {})
    return found


def _short(reason: str) -> str:
    text = " ".join(reason.replace("|", "/").split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
