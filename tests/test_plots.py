import sys

import pytest

from bitscape.errors import BitscapeError
from bitscape.plots import NAMED, new_axes, steps


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BitscapeError, match=r"a package is missing .*: pip install 'bitscape\[plot\]'"):
        new_axes()


def test_axes_that_are_given_are_drawn_on() -> None:
    axes = object()
    assert new_axes(axes) is axes


@pytest.mark.parametrize("count", [1, NAMED, NAMED + 1, 500])
def test_steps_have_a_value_for_each_name_and_not_too_many_names(count: int) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    steps(axes, [f"layer{at}" for at in range(count)], {"one": list(range(count)), "two": [3] * count})
    one, two = axes.get_lines()
    assert list(one.get_ydata()) == list(range(count)) and list(two.get_ydata()) == [3] * count
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names[0] == "layer0" and len(names) <= NAMED and (count > NAMED or len(names) == count)
    figure.canvas.draw()


def test_without_axes_a_figure_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    axes = new_axes()
    assert pyplot.gca() is axes
    pyplot.close(axes.figure)
