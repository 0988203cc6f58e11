from pathlib import Path
from typing import Any

from tools.notebooks import run
from tools.site import notebook_page


def cell(kind: str, source: str) -> dict[str, Any]:
    return {"cell_type": kind, "source": source.splitlines(keepends=True), "outputs": []}


class Rich:
    def _repr_html_(self) -> str:
        return "<b>rich</b>"


def notebook(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"cells": list(cells)}


def test_cells_share_names_and_keep_what_they_print_and_return(tmp_path: Path):
    made = notebook(
        cell("code", "import os\nfor at in range(2):\n    print(at)"),
        cell("markdown", "# Words"),
        cell("code", "at + 1; os.getcwd()"),
        cell("code", "at = 5"),
    )
    here = Path.cwd()
    run(made, tmp_path)
    first, _, second, third = made["cells"]
    assert first["outputs"] == [
        {"name": "stdout", "output_type": "stream", "text": ["0\n", "1\n"]}
    ]
    (value,) = second["outputs"]
    assert value["data"] == {"text/plain": [repr(str(tmp_path))]}
    assert (second["execution_count"], third["outputs"]) == (2, [])
    assert Path.cwd() == here


def test_a_page_has_words_code_and_outputs(tmp_path: Path):
    made = notebook(
        cell("markdown", "# Words"),
        cell("code", "from tests.tools.test_notebooks import Rich\nprint('said')\nRich()"),
        cell("code", "1 + 1"),
    )
    run(made, tmp_path)
    text = notebook_page(made, "n.ipynb")
    assert text.startswith('# Words\n\n<a href="n.ipynb" download>')
    assert '```text\nsaid\n```\n\n<div class="output"><b>rich</b></div>' in text
    assert "```python\n1 + 1\n```\n\n```text\n2\n```" in text
