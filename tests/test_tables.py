import pytest

from bitscape.tables import Shown, Table, shortened, shortened_row

HOSTILE = "<b>x</b>\x1b[31m"


def test_a_table_as_text_and_as_html() -> None:
    table = Table(title="Two", columns=("name", "n"), rows=[("a", "1"), ("long", "20")], note="of 3\u00a0MB")
    assert table.text() == "Two\nname   n\na      1\nlong  20\nof 3 MB"
    left, right = '<td style="text-align: left">', '<td style="text-align: right">'
    head = '<th style="text-align: left">name</th><th style="text-align: right">n</th>'
    body = f"<tr>{left}a</td>{right}1</td></tr><tr>{left}long</td>{right}20</td></tr>"
    assert table.html() == (
        f"<table><caption>Two</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>of 3\u00a0MB</p>"
    )


def test_a_table_without_rows_is_its_title() -> None:
    assert Table(title="None").text() == "None"
    assert Table(title="None").html() == "<table><caption>None</caption></table>"


def test_nothing_acts_on_a_terminal_or_a_page() -> None:
    table = Table(title=HOSTILE, columns=(HOSTILE,), rows=[(HOSTILE,)], note=HOSTILE)
    assert "\x1b" not in table.text() and "\x1b" not in table.html()
    assert "<b>" not in table.html() and table.html().count("&lt;b&gt;x&lt;/b&gt;\\x1b[31m") == 4


def test_long_cells_lose_their_middle() -> None:
    (_, _, cell) = Table(title="", columns=("name",), rows=[("a" * 100 + "z" * 100,)]).text().splitlines()
    assert cell == "a" * 30 + "..." + "z" * 20


@pytest.mark.parametrize("count", [0, 1, 8, 9, 1000])
def test_many_rows_keep_both_ends(count: int) -> None:
    rows = [(str(at), "x") for at in range(count)]
    kept = shortened(rows)
    assert kept == (rows if count <= 8 else [*rows[:4], ["...", "..."], *rows[-3:]])
    assert shortened_row([first for first, _ in rows]) == [first for first, _ in kept]


def test_what_is_shown_prints_as_its_table() -> None:
    class Thing(Shown):
        def table(self) -> Table:
            return Table(title="<thing>")

    assert repr(Thing()) == "<thing>" and Thing()._repr_html_() == "<table><caption>&lt;thing&gt;</caption></table>"
