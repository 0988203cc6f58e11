import pytest

from bitscape.cli.parsing import (
    make_method,
    parse_candidates,
    parse_normalization,
    parse_pins,
    parse_shape,
    parse_widths,
)
from bitscape.data.batches import CIFAR10, DIGITS, Normalization
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.choices import DEFAULT_CANDIDATES
from bitscape.searches.fisher import Fisher
from bitscape.searches.freedom import Pins
from bitscape.searches.uniform import Uniform

LONG = "9" * 5000
"""More digits than `int` takes."""


def test_candidates_are_all_pairs():
    assert parse_candidates("2,3,4,5,6,8") == DEFAULT_CANDIDATES
    assert parse_candidates("w=2,4; a=8") == (LayerBits(2, 8), LayerBits(4, 8))
    assert parse_candidates("w=4,8;a=8,16") == (LayerBits(4, 8), LayerBits(4, 16), LayerBits(8, 8), LayerBits(8, 16))


@pytest.mark.parametrize("text", ["2;3", "w=2;w=3;a=8", "", "w=2,4", "2,4;a=8", "2,x", "2,9", "w=2;b=4", "2.5"])
def test_bad_candidates_say_how_to_write_them(text):
    with pytest.raises(BitscapeError, match="--candidates"):
        parse_candidates(text)


def test_pins_add_to_or_drop_the_default():
    assert parse_pins(["a.b=8/4", "head*=float"]) == Pins({"a.b": LayerBits(8, 4), "head*": LayerBits.FLOAT})
    assert parse_pins(["none", "a=8/8"]) == Pins({"a": LayerBits(8, 8)}, ends=False)


@pytest.mark.parametrize("text", ["conv1", "conv1=8", "=8/8", "conv1=8/x", "conv1=9/8", f"conv1={LONG}/8"])
def test_bad_pins_are_refused(text):
    with pytest.raises(BitscapeError, match=r"layer=weight/activation|write weight/activation|from 1 to 8"):
        parse_pins([text])


def test_shapes():
    assert parse_shape("3x224x200") == (3, 224, 200)
    assert parse_shape(None) is None
    for text in ("224", "3x224", "3x0x4", "axbxc", f"3x{LONG}x4"):
        with pytest.raises(BitscapeError, match="3x224x224"):
            parse_shape(text)


def test_widths():
    assert parse_widths("2-8") == (2, 8)
    for text in ("", "4", "4-4", "8-2", "0-4", "2-9", "2..8", "a-b", "-2-8", f"2-{LONG}"):
        with pytest.raises(BitscapeError, match=r"--dynamic .* e\.g\. 2-8"):
            parse_widths(text)


def test_normalizations():
    assert parse_normalization("cifar10", "train.parquet") is CIFAR10
    assert parse_normalization(None, "digits") is DIGITS
    assert parse_normalization("0.5,0.4,0.3/1,2,3", "x") == Normalization((0.5, 0.4, 0.3), (1.0, 2.0, 3.0))


def test_a_normalization_is_never_guessed():
    with pytest.raises(BitscapeError, match="--normalize is missing"):
        parse_normalization(None, "train.parquet")
    with pytest.raises(BitscapeError, match="nearest: imagenet"):
        parse_normalization("imagnet", "x")


def test_settings_are_checked_by_the_methods_own_types():
    assert make_method("fisher", ["images=64", "variant=directional"]) == Fisher(images=64, variant="directional")
    assert make_method("uniform", ["mix=true"]) == Uniform(mix=True)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("fisher", "image=64", "has no field 'image'; nearest: images"),
        ("fisher", "images=many", "--set images=many: .*integer"),
        ("fisher", "variant=sideways", "'elementwise' or 'directional'"),
        ("fisher", "images", "write field=value"),
        ("random", "window=2", "window"),
        ("random", "tries=0", r"^--set tries=0; at least 1 is needed; see `bitscape methods random`$"),
        ("fishr", "images=1", "nearest: fisher"),
    ],
)
def test_bad_settings_are_refused(method, setting, message):
    with pytest.raises(BitscapeError, match=message):
        make_method(method, [setting])


def test_a_value_that_the_method_refuses_is_told_in_its_own_words() -> None:
    with pytest.raises(BitscapeError, match=r"^--set images = -3: it must be a whole number from 1; see `bitscape methods fisher`$"):
        make_method("fisher", ["images=-3"])
