import json
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.summaries import NO_RUNS
from bitscape.errors import BitscapeError

DOCUMENT = "# Title\n\n<!-- table: speed -->\nold\n<!-- end -->\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one table, before anything was written."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    (tmp_path / "README.md").write_text(DOCUMENT)
    (tmp_path / "docs" / "results.md").write_text(DOCUMENT)
    (tmp_path / "docs" / "methods" / "former.md").write_text("a method that is gone\n")
    return tmp_path


def test_the_documentation_is_up_to_date():
    assert [str(path) for path in tables.stale()] == [], "run python -m benchmarks.tables"


def test_what_was_written_is_not_stale(repository: Path):
    changed = tables.write(repository)
    assert {repository / "README.md", repository / "docs" / "results.md", repository / "docs" / "methods" / "fisher.md"} <= set(changed)
    assert tables.stale(repository) == []
    assert (repository / "README.md").read_text() == DOCUMENT.replace("old", NO_RUNS)
    assert not (repository / "docs" / "methods" / "former.md").exists()


def test_new_runs_edits_and_lost_pages_are_stale(repository: Path):
    tables.write(repository)
    (repository / "docs" / "methods" / "fisher.md").write_text("edited\n")
    (repository / "docs" / "methods" / "local.md").unlink()
    shared = {"device": "a CPU", "threads": 1, "versions": {}, "commit": "a", "date": "2026-01-02", "command": "c"}
    measured = {"search_s": 1.0, "peak_bytes": 2e6, "extra": {"wall_s": 1.0, "load_average": [0.0]}}
    run = {"method": "job", "variant": "fisher", "network": "net", "settings": {"images": 8}, **measured, **shared}
    (repository / "benchmarks" / "results" / "speed.jsonl").write_text(json.dumps(run) + "\n")
    names = {"README.md", "docs/results.md", "docs/methods/fisher.md", "docs/methods/local.md"}
    assert {path.relative_to(repository).as_posix() for path in tables.stale(repository)} == names
    tables.write(repository)
    assert "| net | fisher | 8 | 1 | 1.0 | 1.0 | 2 | 0.0 |" in (repository / "README.md").read_text()


def test_an_unknown_table_is_an_error_that_names_the_file(repository: Path):
    (repository / "docs" / "results.md").write_text(DOCUMENT.replace("speed", "sped"))
    with pytest.raises(BitscapeError, match=r"results\.md: line 3: there is no table 'sped'; nearest: speed"):
        tables.write(repository)


def test_check_names_what_is_stale_and_writes_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tables, "ROOT", repository)
    monkeypatch.setattr(tables.stale, "__defaults__", (repository,))
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    with pytest.raises(SystemExit) as stopped:
        tables.main()
    assert stopped.value.code == "run python -m benchmarks.tables"
    assert "stale: README.md\n" in capsys.readouterr().out
    assert (repository / "README.md").read_text() == DOCUMENT
