"""Names, paths and tables that a docstring, a comment or a document mentions: each of them exists."""

import ast
import builtins
import importlib
import importlib.util
import io
import keyword
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks.cards import Card, sections

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "benchmarks", "recipes", "tools")
PYTHON = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
ROOT_PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
DOCUMENTS = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
WRITERS = [*DOCUMENTS, *PYTHON]
"""Files whose prose is checked. Those of tests are not: they may well mention what does not exist."""

WORD = re.compile(r"(?<![\w-])[A-Za-z_]\w*")
PATH = re.compile(r"(?<![\w/.-])(?:docs|recipes|benchmarks|src|tests|tools)/[\w./-]*\w")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
FILE = re.compile(r"(?<![\w/.<-])[\w-]+\.(?:md|py|toml|cfg)\b")
FOREIGN = {
    "output_size": "an argument of torch's transposed convolutions",
    "act_order": "an option of GPTQ's code",
    "KL": "the divergence, in a formula",
    "pack_to_int32": "a function of compressed-tensors",
    "MALLOC_MMAP_THRESHOLD_": "read by glibc",
    "MALLOC_TRIM_THRESHOLD_": "read by glibc",
    "_kc": "the end of a name",
    "_top1": "the end of a name",
    "photos": "a folder of the user",
    "opt_in_out": "a command of OpenVINO's telemetry",
    "pth": "the end of a file name",
    "_s4": "the end of a name",
    "_s8": "the end of a name",
    "tierN": "N stands for a number",
    "search1": "a folder of the user",
    **dict.fromkeys(("File", "space"), "the operating system's message"),
    "CUDA": "in torch's message",
    "config_from_dict": "a function of torchao",
    "get_symmetric_a16w8_quantization_config": "a function of ExecuTorch",
    "a8w4": "the name of a config of ExecuTorch",
    "original_names": "an entry of Hailo's files",
    "total_bops": "a column of QONNX's tool",
    **dict.fromkeys(("output0", "output1"), "outputs of a network, named by their numbers"),
    "file.py": "a file of the user",
    "docs/NAME": "NAME stands for a page",
    "benchmarks/results/NAME.jsonl": "NAME stands for a benchmark",
    **dict.fromkeys(
        (
            "test_damped",
            "test_relative",
            "src/bitscape/searches/relative.py",
            "src/bitscape/steps/damped.py",
            "tests/searches/test_relative.py",
            "tests/steps/test_damped.py",
        ),
        "written by who follows the example",
    ),
}
"""What is mentioned and is not ours -> why."""


def _prose_and_names(source: str) -> tuple[list[str], set[str]]:
    """Docstrings and comments of a Python file, and the words of its code, those in texts that are no docstring included."""
    tree = ast.parse(source)
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    prose = [node.value for node in docstrings if isinstance(node.value, str)]
    prose += [part.string for part in tokenize.generate_tokens(io.StringIO(source).readline) if part.type == tokenize.COMMENT]
    for node in docstrings:
        node.value = ""
    return prose, set(WORD.findall(ast.unparse(tree)))


@cache
def known_names() -> frozenset[str]:
    """Every word of the code and of the documents' examples, every part of a file's path, and Python's own."""
    names = {*dir(builtins), *keyword.kwlist}
    for path in PYTHON:
        names |= _prose_and_names(path.read_text(encoding="utf-8"))[1]
        names |= set(path.relative_to(ROOT).with_suffix("").parts)
    for path in DOCUMENTS:
        for example in FENCED.findall(path.read_text(encoding="utf-8")):
            names |= set(WORD.findall(example))
    return frozenset(names)


@cache
def known_files() -> frozenset[str]:
    """Names of the repository's files, without folders."""
    files = (path.name for folder in (*FOLDERS, "tests", "docs") for path in (ROOT / folder).rglob("*.*"))
    return frozenset((*files, *(path.name for path in ROOT.iterdir())))


def unknown(text: str) -> list[str]:
    """Words in backticks, paths and file names of a text that are neither in the repository nor in `FOREIGN`."""
    text = " ".join(text.split())
    words = (word for code in re.findall(r"`([^`]+)`", text) for word in WORD.findall(code))
    missing = [word for word in words if word not in known_names()]
    missing += [path for path in PATH.findall(text) if not any((ROOT / f"{path}{end}").exists() for end in ("", ".md", ".py"))]
    missing += [name for name in FILE.findall(text) if name not in known_files()]
    return [name for name in missing if name not in FOREIGN]


def _prose(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return _prose_and_names(text)[0] if path.suffix == ".py" else [FENCED.sub("", text)]


@pytest.mark.parametrize("folder", [*FOLDERS, "docs", *ROOT_PAGES])
def test_what_the_prose_mentions_exists(folder: str):
    files = [path for path in WRITERS if path.relative_to(ROOT).parts[0] == folder]
    missing = {path.name: names for path in files if (names := [name for text in _prose(path) for name in unknown(text)])}
    assert files
    assert missing == {}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`MeanAbsolute` gives the paper's", ["MeanAbsolute"]),
        ("read `Policy.layerz`, or `no_such_function(x)`", ["layerz", "no_such_function"]),
        ("see docs/speed and docs/results", ["docs/speed"]),
        ("the control of search-base.md, beside cards.py", ["search-base.md"]),
        ("shown by recipes/resnet50.py", ["recipes/resnet50.py"]),
        ("`Policy.load`, recipes/networks, benchmarks/saq.py and formats.md", []),
    ],
)
def test_what_does_not_exist_is_found(text: str, missing: list[str]):
    assert unknown(text) == missing


def test_only_what_is_mentioned_is_excused():
    everything = "\n".join(text for path in WRITERS for text in _prose(path))
    assert [name for name in FOREIGN if name not in everything] == []


CARDS = [card for cards in sections().values() for card in cards]


def unknown_tables(measured: str) -> list[str]:
    """Tables that the field "Measured" of a card names behind a page of docs and that this page does not have."""
    missing = []
    for page, names in re.findall(r"docs/([\w-]+): ([\w, -]+)", measured):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        tables = re.findall(r"<!-- table: ([\w-]+) -->", text)
        missing += [name for name in names.split(", ") if re.fullmatch(r"[\w-]+", name) and name not in tables]
    return missing


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_tables_of_a_card_exist(card: Card):
    assert unknown_tables(card.fields["Measured"]) == []


def test_a_table_that_does_not_exist_is_found():
    assert unknown_tables("docs/results: qat-cifar10, qat-cifar100. docs/results-flat-training: saq.") == ["qat-cifar100"]


def _targets(computes: str) -> Iterator[str]:
    """Names behind the arrows of "Computes": those with a dot, an underscore or a capital, and words that end their part."""
    for name, end in re.findall(r"-> `?([A-Za-z_][\w.]*\w)`?(.?)", computes):
        if re.search(r"[._A-Z]", name) or end in ("", ";", ",", "."):
            yield name


def resolves(name: str, module: str) -> bool:
    """Whether a dotted name is an attribute of the module, of a class in it, of a package above, or of a module beside it."""
    here, package = importlib.import_module(module), importlib.import_module(module.rpartition(".")[0])
    beside = [importlib.import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)]
    classes = [value for value in vars(here).values() if isinstance(value, type)]
    above = [importlib.import_module(module.rsplit(".", steps)[0]) for steps in range(1, module.count(".") + 1)]
    return any(_follow(place, name.split(".")) for place in (here, *classes, *beside, *above))


def _follow(place: object, parts: list[str]) -> bool:
    for part in parts:
        inner = getattr(place, part, None)
        if inner is None and hasattr(place, "__path__") and importlib.util.find_spec(f"{place.__name__}.{part}"):
            inner = importlib.import_module(f"{place.__name__}.{part}")
        if inner is None:
            return False
        place = inner
    return True


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_what_a_card_says_is_computed_by_exists(card: Card):
    module = card.source.removeprefix("src/").removesuffix(".py").replace("/", ".")
    assert [name for name in _targets(card.fields["Computes"]) if not resolves(name, module)] == []


def test_a_function_that_does_not_exist_is_found():
    assert list(_targets("Eq. 7 -> its form; Eq. 8 -> `scores`, sum -> quant.grid.missing; end -> walk")) == [
        "scores",
        "quant.grid.missing",
        "walk",
    ]
    assert resolves("quant.grid", "bitscape.searches.fisher")
    assert resolves("pair_scores", "bitscape.searches.fisher")
    assert not resolves("quant.grid.missing", "bitscape.searches.fisher")
