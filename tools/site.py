"""What the site adds to docs: methods in the navigation, notebooks as pages, repository links."""

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(?=[)#])")


def on_config(config: "MkDocsConfig") -> None:
    """Take the repository's address from pyproject.toml, and the list of methods from their index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url = project["urls"]["Repository"]
    config.repo_name = project["name"]
    assert config.nav is not None
    (methods,) = (entry for entry in config.nav if "Methods" in entry)
    methods["Methods"] = methods_nav(Path(config.docs_dir, "methods", "index.md").read_text(encoding="utf-8"))


def on_files(files: "Files", *, config: "MkDocsConfig") -> None:
    """Add a page for each notebook, beside the notebook itself."""
    from mkdocs.structure.files import File

    for path in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        text = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.name)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))


def methods_nav(index: str) -> list[Any]:
    """The navigation of docs/methods, from the headings and links of its index."""
    nav: list[Any] = ["methods/index.md"]
    for heading, entries in re.findall(r"^## (.*)\n\n((?:- .*\n)+)", index, re.M):
        nav.append({heading: [f"methods/{name}" for name in re.findall(r"^- \[[^]]*\]\(([^)]+)\)", entries, re.M)]})
    return nav


def on_page_markdown(markdown: str, *, page: "Page", config: "MkDocsConfig", **_: Any) -> str:
    """Let links that leave docs lead into the repository."""
    return outward(markdown, Path(config.docs_dir, page.file.src_uri), Path(config.docs_dir), f"{config.repo_url}/blob/main")


def outward(markdown: str, page: Path, docs: Path, address: str) -> str:
    """The text of a page with links as the site needs them.

    Those to files outside `docs` lead to `address`, those to notebooks to their pages.
    """

    def target(found: re.Match[str]) -> str:
        path = (page.parent / found[1]).resolve()
        if path.is_relative_to(docs):
            return found[1].removesuffix(".ipynb") + ".md" * found[1].endswith(".ipynb")
        return f"{address}/{path.relative_to(docs.parent).as_posix()}"

    return LINK.sub(target, markdown)


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """Return a notebook as Markdown, its outputs among it, with a link to the file `name`."""
    blocks: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
        else:
            blocks.append(f"```python\n{source}\n```")
            blocks += [_output(output) for output in cell["outputs"]]
    blocks.insert(1, f'<a href="{name}" download>Download this notebook</a>')
    return "\n\n".join(blocks) + "\n"


def _output(output: dict[str, Any]) -> str:
    """An output as Markdown: HTML where there is some, else text."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "text/html" in data:
        return f'<div class="output">{"".join(data["text/html"])}</div>'
    return f"```text\n{''.join(data['text/plain'])}\n```"
