import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitscape.data.proxy import draw_proxy
from bitscape.data.sources import Dataset
from bitscape.errors import BitscapeError


def dataset(labels):
    """Pixel 0 of image i is i, so that a drawn image can be told."""
    count = len(labels)
    images = torch.zeros(count, 1, 1, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    return Dataset("here", images, torch.tensor(labels), tuple("abcdefgh"))


def rows(proxy):
    return proxy.images[:, 0, 0, 0].tolist()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=80), st.data())
def test_draws_are_distinct_balanced_and_reproducible(labels, data):
    count = data.draw(st.integers(1, len(labels)))
    proxy = draw_proxy(dataset(labels), images=count, seed=3)
    assert len(set(rows(proxy))) == len(proxy) == count
    assert [labels[row] for row in rows(proxy)] == proxy.labels.tolist()
    drawn = {label: proxy.labels.tolist().count(label) for label in labels}
    most = max(drawn.values())
    assert all(drawn[label] >= min(most - 1, labels.count(label)) for label in drawn)
    assert rows(draw_proxy(dataset(labels), images=count, seed=3)) == rows(proxy)


@given(st.integers(1, 59), st.integers(0, 2**32))
def test_fewer_images_are_a_prefix(count, seed):
    whole = dataset([row % 5 for row in range(60)])
    assert rows(draw_proxy(whole, images=count, seed=seed)) == rows(draw_proxy(whole, images=60, seed=seed))[:count]


def test_classes_limits_the_classes_and_keeps_their_numbers():
    whole = dataset([row % 8 for row in range(80)])
    drawn = {tuple(draw_proxy(whole, images=30, classes=3, seed=seed).labels.unique().tolist()) for seed in range(20)}
    assert all(len(classes) == 3 for classes in drawn)
    assert len(drawn) > 5
    assert draw_proxy(whole, images=30, classes=3, seed=0).class_names == whole.class_names


def test_seeds_differ():
    whole = dataset([0] * 80)
    assert rows(draw_proxy(whole, images=20, seed=0)) != rows(draw_proxy(whole, images=20, seed=1))


def test_without_labels_the_draw_is_uniform():
    whole = Dataset("here", dataset([0] * 50).images)
    proxy = draw_proxy(whole, images=20, seed=0)
    assert proxy.labels is None
    assert len(set(rows(proxy))) == 20
    with pytest.raises(BitscapeError, match="no labels; leave classes out"):
        draw_proxy(whole, images=20, classes=2, seed=0)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw_proxy(dataset([0, 1] * 10), images=5, classes=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images is 0; here allows 1 to 20"),
        ({"images": 21}, "images is 21"),
        ({"images": 2.5}, "images is 2.5"),
        ({"images": 5, "classes": 3}, "classes is 3; here allows 1 to 2"),
        ({"images": 5, "classes": 0}, "classes is 0"),
        ({"images": 1, "classes": 2}, "every class needs an image"),
        ({"images": 11, "classes": 1}, "here in 1 classes allows 1 to 10"),
    ],
)
def test_impossible_draws_are_errors(settings, message):
    with pytest.raises(BitscapeError, match=message):
        draw_proxy(dataset([0, 1] * 10), seed=0, **settings)
