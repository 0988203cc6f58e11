"""What the site adds to the pages of docs: methods in the navigation, and links into the repository."""

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
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
    """The text of a page with links to files outside `docs` replaced by `address` and the file's path."""

    def target(found: re.Match[str]) -> str:
        path = (page.parent / found[1]).resolve()
        return found[1] if path.is_relative_to(docs) else f"{address}/{path.relative_to(docs.parent).as_posix()}"

    return LINK.sub(target, markdown)
