"""A page as a reader sees it: sections, tables, words, pictures and their shapes."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

from bitscape.report.svg import NAMESPACE

Element = ElementTree.Element
VOID = {"meta", "br", "input"}
SVG = re.compile(r"<svg .*?</svg>", re.S)


class Page(HTMLParser):
    """Parses a page; tags that do not close are an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.head: list[str] = []
        """Before the first section."""
        self.sections: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self.feed(SVG.sub("", text))
        self.close()
        assert self._open == [], self._open
        self.pictures = [
            ElementTree.fromstring(found) for found in SVG.findall(text) if "xmlns" in found
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows: list[list[str]] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        if where in ("style", "script", ""):
            assert where or not data.strip()
            self.scripts += [data] if where == "script" else []
            return
        data = data.replace("\u00a0", " ")
        self.words.append(data)
        if where == "h2":
            self.sections[data] = []
        elif self.sections and data.strip():
            next(reversed(self.sections.values())).append(data.strip())
        elif data.strip():
            self.head.append(data.strip())
        if where == "caption":
            self._caption = data
        if where in ("th", "td"):
            self._rows[-1][-1] += data

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """First cell of each row -> heading -> cell."""
        found = next(rows for name, rows in self.tables.items() if name.startswith(caption))
        return {row[0]: dict(zip(found[0], row, strict=True)) for row in found[1:]}

    def said(self, section: str) -> str:
        """All words of a section."""
        return " ".join(self.sections[section])


def parts(root: Element, tag: str, css: str) -> list[Element]:
    """Shapes of a class, in their order."""
    return [each for each in root.iter(f"{{{NAMESPACE}}}{tag}") if each.get("class") == css]


def texts(root: Element) -> list[str]:
    """All words of a picture."""
    return [each.text or "" for each in root.iter(f"{{{NAMESPACE}}}text")]


def tips(root: Element) -> list[str]:
    """What shows under the pointer."""
    return [each.text or "" for each in root.iter(f"{{{NAMESPACE}}}title")][1:]


def numbers(element: Element, *names: str) -> list[float]:
    """Attributes of a shape."""
    return [float(element.get(name, "")) for name in names]


def heights(found: list[Element]) -> list[float]:
    """Of boxes."""
    return [float(each.get("height", "")) for each in found]
