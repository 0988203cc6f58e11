import torch
from torch import Tensor, nn

from bitscape.data.sources import load_dataset
from bitscape.models.digits import digits_net
from bitscape.models.layers import quantizable_layers


def test_holds_every_kind_of_layer_that_quantization_treats_apart():
    layers = list(quantizable_layers(digits_net()).values())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 8
    assert any(layer.groups == layer.in_channels > 1 for layer in convolutions)
    assert any(layer.kernel_size == (1, 1) for layer in convolutions)
    assert isinstance(layers[-1], nn.Linear)


def test_layout_in_memory_does_not_change_the_output():
    model, images = digits_net().eval(), torch.randn(3, 1, 8, 8)
    expected = model(images)
    assert expected.shape == (3, 10)
    moved = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(moved, expected)


def _split(name: str) -> tuple[Tensor, Tensor]:
    dataset = load_dataset("digits", split=name)
    assert dataset.labels is not None
    return (dataset.images / 255 - 0.5) / 0.5, dataset.labels


def test_learns_the_digits_in_seconds():
    (images, labels), (test_images, test_labels) = _split("train"), _split("test")
    torch.manual_seed(0)
    model, epochs = digits_net(), 6
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 23)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        correct = model.eval()(test_images).argmax(dim=1) == test_labels
    assert correct.float().mean() > 0.9
