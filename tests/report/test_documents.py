import json
from pathlib import Path

import pytest

from bitscape.engine.quality_table import Cell, QualityTable
from bitscape.errors import BitscapeError
from bitscape.report.documents import load_bench, load_quality, save_quality
from tests.report.made import bench

PAIRS = [("clean", 0), ("jpeg", 1), ("jpeg", 5)]


def grid(bits: float | None = None) -> QualityTable:
    made = (Cell(corruption=name, severity=at, top1=90.5 - at, loss=0.25, images=10, bits=bits, bitops=bits) for name, at in PAIRS)
    return QualityTable(tuple(made))


@pytest.mark.parametrize("bits", [None, 3.5])
def test_a_grid_comes_back_as_it_was(tmp_path: Path, bits: float | None) -> None:
    save_quality(grid(bits), tmp_path / "grid.json")
    assert load_quality(tmp_path / "grid.json").cells == grid(bits).cells


def test_a_grid_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    save_quality(grid(), path)
    good = json.loads(path.read_text())
    cells = good["cells"]
    wrong = {
        "this version reads format 1": {**good, "format": 2},
        "one cell of clean images": {**good, "cells": cells[1:]},
        "of each corruption one for each severity": {**good, "cells": [*cells, cells[-1]]},
        "cells.0.top1": {**good, "cells": [{**cells[0], "top1": "90"}, *cells[1:]]},
        "cells.0.extra": {**good, "cells": [{**cells[0], "extra": 1}, *cells[1:]]},
        "NaN is no allowed number": {**good, "cells": [{**cells[0], "top1": float("nan")}, *cells[1:]]},
    }
    for message, document in wrong.items():
        path.write_text(json.dumps(document))
        with pytest.raises(BitscapeError, match=r"grid\.json: ") as raised:
            load_quality(path)
        assert message in str(raised.value)


def test_a_bench_is_read_and_one_without_times_refused(tmp_path: Path) -> None:
    path = bench(tmp_path / "bench.json")
    read = load_bench(path)
    assert [(row.file, row.cpu_ms, row.file_bytes) for row in read.rows] == [("float", 3.25, 4000), ("net.onnx", 1.625, 1234)]
    document = json.loads(path.read_text())
    del document["rows"][1]["cpu_ms"]
    path.write_text(json.dumps(document))
    with pytest.raises(BitscapeError, match=r"bench.json: rows.1.cpu_ms: Field required"):
        load_bench(path)


def test_a_bench_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    bench(path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "rows": []}))
    with pytest.raises(BitscapeError, match=r"bench\.json: it has no rows"):
        load_bench(path)
