"""The notebooks of docs: run, with their outputs kept in the files.

    python -m tools.notebooks

runs all of them anew, each in an empty folder, and writes what their cells print and return.
"""

import ast
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
Cell = dict[str, Any]
"""As nbformat 4 describes it."""


def read(path: Path) -> dict[str, Any]:
    """Return the content of a notebook."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    """Return the cells that are run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any], folder: Path) -> None:
    """Run all cells in one namespace, with `folder` as working directory, and keep their outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for number, cell in enumerate(code_cells(notebook), start=1):
            cell["execution_count"] = number
            cell["outputs"] = list(_outputs("".join(cell["source"]), namespace, number))


def _outputs(source: str, namespace: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """What a cell prints, and the value of its last line if that is an expression."""
    body, value = ast.parse(source), None
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(body, f"<cell {number}>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            line = compile(ast.Expression(last.value), f"<cell {number}>", "eval")
            value = eval(line, namespace)
    if text := printed.getvalue():
        yield {"name": "stdout", "output_type": "stream", "text": _lines(text)}
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = _lines(value._repr_html_())
        yield {
            "data": data,
            "execution_count": number,
            "metadata": {},
            "output_type": "execute_result",
        }


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Run all notebooks and write them back."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = read(path)
        with TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
