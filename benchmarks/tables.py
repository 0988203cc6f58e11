"""Write the generated parts of the documentation: the tables in README.md and docs, figures, and the pages of docs/methods.

    python -m benchmarks.tables [--check]

Tables stand between `<!-- table: NAME -->` and `<!-- end -->` and come from benchmarks/results/NAME.jsonl (`overview` from
tasks.jsonl); pages of methods come from the cards in the source. `--check` writes nothing and exits with 1, naming what is stale.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cards import pages
from benchmarks.dqmq_summaries import figure as dqmq_figure
from benchmarks.figures import equal_bytes
from benchmarks.overview import overview
from benchmarks.policy_figure import policy_figure
from benchmarks.saq_summaries import landscape
from benchmarks.summaries import tables
from benchmarks.summaries_common import Run
from benchmarks.transfer_summaries import heat_map
from bitscape.errors import BitscapeError
from bitscape.files import write_atomic
from bitscape.report.records import read_runs
from bitscape.report.tables import update_tables

ROOT = Path(__file__).parents[1]
FIGURES: dict[str, tuple[str, Callable[[Sequence[Run]], str]]] = {
    "transfer-scores": ("transfer-scores", heat_map),
    "landscape": ("landscape", landscape),
    "dqmq": ("dqmq", dqmq_figure),
    "ptq-imagenet": ("ptq-imagenet", equal_bytes),
    "policy": ("tasks", policy_figure),
}
"""Name of the figure -> name of its results file, and what draws it from the runs; without the file there is none."""


def wanted(root: Path) -> dict[Path, str | None]:
    """Every document that has generated parts -> the text it should have; None for a page whose method is gone."""
    results = root / "benchmarks" / "results"
    made = {**tables(results), "overview": overview(results)}
    methods = {root / "docs" / "methods" / name: text for name, text in pages().items()}
    written = [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.exists()]
    gone = {path: None for path in written if path.parent.name == "methods" and path not in methods}
    updated = {path: _updated(path, made) for path in written if path.parent.name != "methods"}
    files = {name: (results / f"{runs}.jsonl", draw) for name, (runs, draw) in FIGURES.items()}
    drawn = {name: draw(read_runs(path)) for name, (path, draw) in files.items() if path.exists()}
    figures = {root / "docs" / "figures" / f"{name}.svg": text for name, text in drawn.items()}
    return {**updated, **gone, **methods, **figures}


def stale(root: Path = ROOT) -> list[Path]:
    """Documents that are not what the results and the cards make of them."""
    return [path for path, text in wanted(root).items() if _text_of(path) != text]


def write(root: Path = ROOT) -> list[Path]:
    """Bring all documents up to date and return those that changed."""
    documents = wanted(root)
    changed = [path for path, text in documents.items() if _text_of(path) != text]
    for path in changed:
        text = documents[path]
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
    return changed


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _updated(path: Path, made: dict[str, str]) -> str:
    try:
        return update_tables(path.read_text(encoding="utf-8"), made)
    except BitscapeError as error:
        raise BitscapeError(f"{path}: {error}") from error


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything is stale")
    options = parser.parse_args()
    paths = stale() if options.check else write()
    for path in paths:
        print(f"{'stale' if options.check else 'written'}: {path.relative_to(ROOT)}")
    if options.check and paths:
        sys.exit("run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
