import pytest
import torch
from torch import nn

from bitscape.cli.network import ImageSettings, pick_device
from bitscape.cli.parsing import parse_normalization
from bitscape.data.batches import Normalization
from bitscape.errors import BitscapeError


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as far as can be told without one; returns where tensors were made."""
    made = []

    def zeros(*_, device):
        made.append(device)
        if device.type == "cuda" and device.index not in (0, 1):
            raise RuntimeError("CUDA error: invalid device ordinal\nmore")
        return 0.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return made


@pytest.mark.parametrize("name", [None, "cuda"])
@pytest.mark.parametrize(("local_rank", "found"), [(None, "cuda:0"), ("0", "cuda:0"), ("1", "cuda:1")])
def test_every_worker_has_its_own_gpu(gpus, monkeypatch, name, local_rank, found):
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert pick_device(name) == torch.device(found) and gpus == [torch.device(found)]


@pytest.mark.parametrize(("name", "found"), [("cpu", "cpu"), ("cuda:0", "cuda:0")])
def test_a_device_that_is_named_in_full_is_taken(gpus, monkeypatch, name, found):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(name) == torch.device(found)


@pytest.mark.parametrize("name", [None, "cuda"])
def test_a_gpu_that_is_not_there_is_named(gpus, monkeypatch, name):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BitscapeError, match=r"--device 'cuda:2' cannot be used \(CUDA error: invalid device ordinal\); allowed are"):
        pick_device(name)


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(None) == torch.device("cpu")


def _like_timm() -> nn.Linear:
    model = nn.Linear(1, 1)
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 32, 32)}
    return model


@pytest.mark.parametrize(("given", "found"), [(None, 32), (48, 48)])
def test_the_network_itself_says_how_images_look(given, found):
    settings = ImageSettings(input_size=given, normalize="model").of_model(_like_timm())
    assert settings.input_size == found
    assert parse_normalization(settings.normalize, "photos/") == Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_other_settings_are_left_alone_and_other_networks_are_refused():
    settings = ImageSettings(input_size=None, normalize="imagenet")
    assert settings.of_model(_like_timm()) is settings
    with pytest.raises(BitscapeError, match="--normalize model: model: Linear has no configuration"):
        ImageSettings(input_size=None, normalize="model").of_model(nn.Linear(1, 1))
