"""bs.train on networks, data, tasks and optimizers of many forms."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bitscape as bs
from bitscape.engine import AdamW, Batch, CheckpointError, Cosine, NonFiniteError, StepRecord, TrainResult
from bitscape.policy import uniform_policy
from bitscape.steps import Loss, Plain

DRAWN = torch.Generator().manual_seed(0)
LEFT, RIGHT = torch.randn(22, 4, generator=DRAWN), torch.randn(22, 3, generator=DRAWN)
SUMS = torch.stack([LEFT.sum(1), RIGHT.sum(1)], 1)
LABELS = torch.arange(22) % 3


class Two(nn.Module):
    """A regression from two inputs, with dropout: what it draws shows whether random states are put back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.last = nn.Linear(4, 6), nn.Linear(3, 6), nn.Dropout(0.2), nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.drop(torch.relu(self.a(left) + self.b(right))))
        return outputs


def seeded(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def two() -> Any:
    return seeded(Two)


def classifier(outputs: int = 3, *last: nn.Module) -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs), *last))


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_times(result: TrainResult) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "train_s"} for record in result.records]


PAIRS: dict[str, Any] = {"inputs": lambda batch: (batch[0], batch[1]), "targets": lambda batch: batch[2]}
THREE = TensorDataset(LEFT, RIGHT, SUMS)


class Noisy(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Draws from every global generator for each row."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return LEFT[row] + noise.float(), RIGHT[row], SUMS[row]


class Killed(Exception):
    pass


class KilledAfter:
    """A plain step that stops the run, as a kill would; it has no settings that would tell one from another."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        if not self.left:
            raise Killed
        self.left -= 1
        return batch.backward(model)


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, 0.01, total_steps=9)


def in_sequence(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return SequentialLR(optimizer, [LinearLR(optimizer, total_iters=2), MultiStepLR(optimizer, [1, 4])], [3])


WAYS: dict[str, dict[str, Any]] = {
    "a shuffling loader of rows with noise, Adam, OneCycleLR": {
        "data": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True),
        "optimizer": torch.optim.Adam,
        "schedule": one_cycle,
    },
    "a loader with a generator of its own, NAdam, a sequence": {
        "data": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True, generator=torch.Generator()),
        "optimizer": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
        "schedule": in_sequence,
    },
    "a dataset of rows with noise, settings, warm restarts": {
        "data": Noisy,
        "batch_size": 8,
        "optimizer": AdamW(lr=0.01),
        "schedule": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 2),
    },
    "tensors, RMSprop": {"data": lambda: (LEFT, RIGHT, SUMS), "batch_size": 8, "optimizer": torch.optim.RMSprop},
    "a list of batches, augmented": {
        "data": lambda: [tuple(part) for part in zip(LEFT.split(8), RIGHT.split(8), SUMS.split(8), strict=True)],
        "augment": lambda pair: (pair[0] + torch.rand(()) + random.random(), pair[1]),
    },
    "a loader without a length": {"data": lambda: Stream()},
}


class Stream:
    """Batches of which nobody knows how many there are."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from zip(LEFT.split(8), RIGHT.split(8), SUMS.split(8), strict=True)


@pytest.mark.parametrize("killed_after", [1, 3, 5])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_killed_run_goes_on_to_the_same_bits(way: dict[str, Any], killed_after: int, tmp_path: Path) -> None:
    settings = {key: value for key, value in way.items() if key != "data"}
    settings |= {"epochs": 3, "loss": functional.mse_loss, "validation": THREE, "checkpoint_every_s": 0.0, **PAIRS}
    whole, killed, resumed = two(), two(), two()
    expected = bs.train(whole, way["data"](), **settings)
    with pytest.raises(Killed):
        bs.train(killed, way["data"](), **settings, step=KilledAfter(killed_after), folder=tmp_path)
    result = bs.train(resumed, way["data"](), **settings, step=KilledAfter(9), folder=tmp_path)
    assert same(resumed, whole) and without_times(result) == without_times(expected)


def test_a_run_that_failed_goes_on_in_the_same_process_at_the_same_rates(tmp_path: Path) -> None:
    def run(network: nn.Module, built: torch.optim.Optimizer, steps: int, **settings: Any) -> list[Any]:
        usual = {"epochs": 4, "batch_size": 8, "optimizer": built, "schedule": Cosine()}
        step = KilledAfter(steps)
        return without_times(bs.train(network, (LEFT, LABELS), step=step, **usual, **settings))

    whole, network = classifier(), classifier()
    expected = run(whole, torch.optim.SGD(whole.parameters(), lr=0.1), 12)
    built = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(Killed):
        run(network, built, 9, folder=tmp_path)
    assert built.param_groups[0]["lr"] == 0.1
    assert run(network, built, 12, folder=tmp_path) == expected and same(network, whole)
    assert built.param_groups[0]["lr"] == 0.1
    built.param_groups[0]["lr"] = 0.01  # as a run that the process was killed in may leave it
    assert run(network, built, 0, folder=tmp_path) == expected
    assert built.param_groups[0]["lr"] == 0.1


def test_the_result_is_that_of_a_plain_loop() -> None:
    loader = DataLoader(TensorDataset(LEFT, LABELS), batch_size=8)
    trained, by_hand = classifier(), classifier()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    losses = []
    for _ in range(3):
        losses.append(0.0)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(by_hand(images), labels)
            loss.backward()
            optimizer.step()
            losses[-1] += float(loss.detach()) * len(images) / 22
    mine = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    result = bs.train(trained, loader, epochs=3, optimizer=mine)
    assert same(trained, by_hand)
    assert [record["loss"] for record in result.records] == pytest.approx(losses)
    assert [record["lr"] for record in result.records] == [0.1] * 3


def test_a_schedule_of_torch_moves_after_every_batch() -> None:
    by_hand, trained = classifier(), classifier()
    mine = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    schedule = OneCycleLR(mine, 0.2, total_steps=6)
    rates = []
    for images, labels in 2 * list(zip(LEFT.split(8), LABELS.split(8), strict=True)):
        mine.zero_grad()
        functional.cross_entropy(by_hand(images), labels).backward()
        mine.step()
        rates.append(mine.param_groups[0]["lr"])
        schedule.step()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    batches = list(zip(LEFT.split(8), LABELS.split(8), strict=True))
    result = bs.train(
        trained, batches, epochs=2, optimizer=optimizer, schedule=OneCycleLR(optimizer, 0.2, total_steps=6)
    )
    assert same(trained, by_hand)
    assert [record["lr"] for record in result.records] == [rates[2], rates[5]]


def test_our_schedule_falls_by_batch_or_by_epoch_where_there_is_no_length() -> None:
    rates: list[float] = []
    optimizer = torch.optim.SGD(classifier().parameters(), lr=1.0)

    def noted(model: nn.Module, batch: Batch) -> StepRecord:
        rates.append(optimizer.param_groups[0]["lr"])
        return batch.backward(model)

    for data in (list(Stream()), Stream()):
        network = two()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        bs.train(network, data, epochs=2, optimizer=optimizer, schedule=Cosine(), step=noted, **PAIRS)
    cosine = [0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([*cosine, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5])


def test_data_of_every_form_give_the_same_network() -> None:
    rows = TensorDataset(LEFT, LABELS)

    class Mapped(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 22

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"input": LEFT[row], "label": LABELS[row]}

    networks = []
    for data in ((LEFT, LABELS), {"input": LEFT, "labels": LABELS}, rows, Mapped()):
        networks.append(classifier())
        bs.train(networks[-1], data, epochs=2, batch_size=8, seed=3)
    assert all(same(network, networks[0]) for network in networks)
    ordered = []
    for data in (
        list(zip(LEFT.split(8), LABELS.split(8), strict=True)),
        DataLoader(rows, batch_size=8),
        [{"input": left, "y": label} for left, label in zip(LEFT.split(8), LABELS.split(8), strict=True)],
    ):
        ordered.append(classifier())
        bs.train(ordered[-1], data, epochs=2)
    assert all(same(network, ordered[0]) for network in ordered) and not same(ordered[0], networks[0])


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    def order(seed: int) -> list[list[float]]:
        seen: list[list[float]] = []

        def noted(model: nn.Module, batch: Batch) -> StepRecord:
            seen.append(batch.parts[0].targets.tolist())
            return batch.backward(model)

        loader = DataLoader(TensorDataset(LEFT, torch.arange(22.0)), batch_size=22, shuffle=True)
        bs.train(classifier(1), loader, epochs=2, step=noted, loss=lambda o, t: (o[:, 0] - t).square(), seed=seed)
        return seen

    first, again, other = order(1), order(1), order(2)
    assert first == again and first != other and first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1]) == list(range(22))


def test_batches_by_keyword() -> None:
    batches = [
        {"left": a, "right": b, "target": t, "name": "x"}
        for a, b, t in zip(LEFT.split(8), RIGHT.split(8), SUMS.split(8), strict=True)
    ]
    by_name, by_place = two(), two()
    bs.train(by_name, batches, epochs=2, loss=functional.mse_loss)
    bs.train(by_place, list(Stream()), epochs=2, loss=functional.mse_loss, **PAIRS)
    assert same(by_name, by_place)


def test_a_loss_may_be_a_scalar_or_a_value_for_each_sample() -> None:
    scalar, each = two(), two()
    one = bs.train(scalar, THREE, epochs=2, batch_size=8, loss=functional.mse_loss, **PAIRS)
    other = bs.train(
        each, THREE, epochs=2, batch_size=8, loss=lambda o, t: (o - t).square().mean(1), accumulate=1, **PAIRS
    )
    torch.testing.assert_close(scalar.state_dict(), each.state_dict())
    assert one.records[1]["loss"] == pytest.approx(other.records[1]["loss"])
    assert "top1" not in one.records[0]


def test_a_loss_of_ones_own_for_classes_keeps_top1_and_a_metric_is_recorded() -> None:
    def smooth(outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels, label_smoothing=0.1)

    own, ours = classifier(), classifier()
    first = bs.train(own, (LEFT, LABELS), epochs=2, loss=smooth)
    second = bs.train(ours, (LEFT, LABELS), epochs=2, loss=Loss(label_smoothing=0.1))
    assert same(own, ours) and without_times(first) == without_times(second) and "top1" in first.records[0]

    def share_right(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).float()

    measured = classifier()
    third = bs.train(measured, (LEFT, LABELS), epochs=2, loss=smooth, metric=share_right, validation=(LEFT, LABELS))
    assert same(measured, own)
    for record, expected in zip(third.records, first.records, strict=True):
        assert record["share_right"] == pytest.approx(expected["top1"] / 100)
    right = float(share_right(measured.eval()(LEFT), LABELS).mean())
    assert third.records[-1]["validation_share_right"] == pytest.approx(right)
    plain, default = classifier(), classifier()
    bs.train(plain, (LEFT, LABELS), epochs=2, metric=share_right)
    bs.train(default, (LEFT, LABELS), epochs=2)
    assert same(plain, default)


@pytest.mark.parametrize("ignored", [255, -100])
@pytest.mark.parametrize("shape", [(5, 4), (6,)])
def test_dense_classes_leave_ignored_positions_out(ignored: int, shape: tuple[int, ...]) -> None:
    images = torch.randn(10, 2, *shape, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, (10, *shape), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    labels[:, 0] = ignored

    def network() -> Any:
        return seeded(lambda: (nn.Conv2d if len(shape) == 2 else nn.Conv1d)(2, 3, 1))

    trained, by_hand, before = network(), network(), network()
    result = bs.train(trained, [(images, labels)], epochs=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = functional.cross_entropy(by_hand(images), labels.long(), ignore_index=ignored)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.testing.assert_close(trained.state_dict(), by_hand.state_dict())
    assert [record["loss"] for record in result.records] == pytest.approx(losses)
    decided, counted = before(images).argmax(1)[:, 1:], labels[:, 1:]
    ious = [float(((decided == k) & (counted == k)).sum() / ((decided == k) | (counted == k)).sum()) for k in range(3)]
    assert result.records[0]["mean_iou"] == pytest.approx(100 * sum(ious) / 3)


@pytest.mark.parametrize("sigmoid", [True, False])
def test_yes_or_no(sigmoid: bool) -> None:
    answers = (LEFT[:, 0] > 0).long()
    network, by_hand = (classifier(1, *([nn.Sigmoid()] if sigmoid else [])) for _ in range(2))
    result = bs.train(network, [(LEFT, answers)], epochs=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    loss_of = functional.binary_cross_entropy if sigmoid else functional.binary_cross_entropy_with_logits
    outputs = by_hand(LEFT)[:, 0]
    loss = loss_of(outputs, answers.float())
    loss.backward()
    right = ((outputs > (0.5 if sigmoid else 0.0)).long() == answers).float().mean()
    assert result.records[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.records[0]["accuracy"] == pytest.approx(100 * float(right))
    for parameter, other in zip(network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, other - 0.5 * other.grad, rtol=1e-4, atol=1e-6)


class Heads(nn.Module):
    """Two outputs of different scale, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = self.body(x)
        return {"near": values[:, :2], "far": 100 * values[:, 2:]}


def test_outputs_follow_those_of_a_reference_in_units_of_their_spread() -> None:
    reference, network, by_hand = seeded(Heads), Heads(), Heads()
    by_hand.load_state_dict(network.state_dict())
    result = bs.train(
        network, [LEFT], epochs=1, reference=reference, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), validation=[LEFT]
    )
    aim, outputs = reference(LEFT), by_hand(LEFT)
    spread = {name: float(value.detach().std(unbiased=False)) for name, value in aim.items()}
    gaps = torch.cat([(outputs[name] - aim[name].detach()) / spread[name] for name in aim], 1)
    loss = gaps.square().mean() / 2
    loss.backward()
    assert result.records[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    errors = [float(((outputs[name] - aim[name]).norm() / aim[name].norm()).detach()) for name in aim]
    assert result.records[0]["relative_error"] == pytest.approx(sum(errors) / 2, rel=1e-5)
    for parameter, other in zip(network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, other - 0.1 * other.grad, rtol=1e-4, atol=1e-6)
    assert {"validation_relative_error", "validation_relative_error.near"} <= result.records[0].keys()


def test_a_regression_follows_its_targets() -> None:
    network = two()
    result = bs.train(network, THREE, epochs=40, optimizer=AdamW(lr=0.03, weight_decay=0.0), **PAIRS)
    assert result.records[-1]["relative_error"] < 0.6 * result.records[0]["relative_error"]


def test_augmentation_is_drawn_by_seed_epoch_and_batch_alone() -> None:
    def noise(images: Tensor) -> Tensor:
        seen.append(float(torch.rand(())) + random.random() + float(np.random.rand()))
        return images + seen[-1]

    networks, runs = [], []
    for seed in (0, 0, 1):
        seen: list[float] = []
        networks.append(classifier())
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        bs.train(networks[-1], (LEFT, LABELS), epochs=2, batch_size=8, augment=noise, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(seen)
    assert runs[0] == runs[1] and same(networks[0], networks[1])
    assert len(set(runs[0])) == 6 and not set(runs[0]) & set(runs[2])


def generated() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(LEFT.split(8), LABELS.split(8), strict=True)


def test_a_generator_serves_one_epoch() -> None:
    once, from_list = classifier(), classifier()
    result = bs.train(once, generated(), epochs=1)
    bs.train(from_list, list(generated()), epochs=1, schedule=Cosine(final=1.0))
    assert same(once, from_list) and result.records[0]["images"] == 22
    with pytest.raises(bs.BitscapeError, match="data: a generator gives its batches once, and they are needed in every epoch"):
        bs.train(classifier(), generated(), epochs=2)
    with pytest.raises(bs.BitscapeError, match="validation: a generator gives its batches once"):
        bs.train(classifier(), (LEFT, LABELS), epochs=2, validation=generated())


def test_a_killed_epoch_of_a_generator_goes_on(tmp_path: Path) -> None:
    whole, resumed = classifier(), classifier()
    bs.train(whole, generated(), epochs=1, step=KilledAfter(9))
    with pytest.raises(Killed):
        bs.train(classifier(), generated(), epochs=1, step=KilledAfter(2), folder=tmp_path, checkpoint_every_s=0.0)
    bs.train(resumed, generated(), epochs=1, step=KilledAfter(1), folder=tmp_path)
    assert same(whole, resumed)


class FailsOnce(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of which a row cannot be read at first, as of a disk that was away."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 22

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        if self.read == 8 + 22 + 12:  # after one look at the first batch, in the second epoch's second batch
            raise OSError("disk away")
        return LEFT[row], LABELS[row]


def test_data_that_fail_leave_the_batches_before_them(tmp_path: Path) -> None:
    whole, resumed = classifier(), classifier()
    bs.train(whole, (LEFT, LABELS), epochs=3, batch_size=8)
    data = FailsOnce()
    data.read -= 8  # there are two looks
    with pytest.raises(OSError, match="disk away"):
        bs.train(classifier(), data, epochs=3, batch_size=8, folder=tmp_path)
    done = data.read
    result = bs.train(resumed, data, epochs=3, batch_size=8, folder=tmp_path)
    assert same(whole, resumed) and len(result.records) == 3
    assert data.read == done + 16 + (22 - 8) + 22  # the two looks, what was left of the second epoch, the third


class Spent:
    """Gives its batches once, which only the second epoch shows."""

    def __init__(self) -> None:
        self.batches = generated()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches


def test_an_epoch_without_a_batch_is_an_error_and_the_one_before_is_kept(tmp_path: Path) -> None:
    with pytest.raises(bs.BitscapeError, match="epoch 2 has no batch, the data gave theirs in an epoch before"):
        bs.train(classifier(), Spent(), epochs=2, folder=tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_rows_that_come_one_by_one_are_put_into_batches() -> None:
    class Rows(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(LEFT, LABELS, strict=True)

    by_row, by_batch = classifier(), classifier()
    bs.train(by_row, Rows(), epochs=1, batch_size=8)
    bs.train(by_batch, generated(), epochs=1)
    assert same(by_row, by_batch)


def test_a_quantized_network_is_trained_by_saq_on_a_loader() -> None:
    model = classifier().eval()
    policy = uniform_policy(["0", "2"], bs.LayerBits(4, 4))
    network = bs.quantize(model, policy, LEFT, for_training=True)
    result = bs.train(network, DataLoader(TensorDataset(LEFT, LABELS), batch_size=11), epochs=2, step=bs.Saq())
    assert {"top1", "rho", "gap"} <= result.records[0].keys()


def test_batches_stay_the_fast_way() -> None:
    from bitscape.data.batches import DIGITS
    from bitscape.engine import train as by_engine

    batches = bs.Batches(dataset=bs.load_dataset("digits", limit=40), normalization=DIGITS, batch_size=16, shuffle=True)
    networks = [seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))) for _ in range(2)]
    first = bs.train(networks[0], batches, epochs=2, validation=batches)
    second = by_engine(networks[1], batches, epochs=2, validation=batches, step=Plain(), optimizer=bs.Sgd())
    assert same(*networks) and without_times(first) == without_times(second)
    names = ["epoch", "loss", "top1", "gradient_norm", "lr", "images"]
    assert list(without_times(first)[0]) == [*names, "validation_top1", "validation_top5", "validation_loss"]


def test_a_metric_that_collects_is_asked_of_the_validation_set() -> None:
    class Largest:
        def __init__(self) -> None:
            self.seen = -1

        def update(self, outputs: Tensor, labels: Tensor) -> None:
            self.seen = max(self.seen, int(labels.max()))

        def compute(self) -> float:
            return float(self.seen)

    metric = Largest()
    result = bs.train(classifier(), (LEFT, LABELS), epochs=2, metric=metric, validation=(LEFT[:2], LABELS[:2]))
    assert [record["validation_Largest"] for record in result.records] == [1.0, 1.0]
    assert "Largest" not in result.records[0] and metric.seen == -1


def test_an_optimizer_that_finds_its_own_rate_is_taken() -> None:
    class Signs(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= 0.1 * parameter.grad.sign()

    network, before = classifier(), classifier()
    result = bs.train(network, (LEFT, LABELS), epochs=1, optimizer=Signs)
    assert "lr" not in result.records[0]
    moved = (network[0].weight - before[0].weight).abs()
    assert float(moved[moved > 1e-6].detach().sub(0.1).abs().max()) < 1e-6


def test_lists_of_targets_are_cut_with_their_samples() -> None:
    targets = [{"boxes": torch.full((22, 1), float(row))} for row in range(22)]  # as many boxes as samples
    whole, parted = classifier(1), classifier(1)

    def loss(outputs: Tensor, boxes: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([(o - t["boxes"].mean()).square().mean() for o, t in zip(outputs, boxes, strict=True)])

    batch = [(LEFT, targets)]
    bs.train(whole, batch, epochs=1, loss=loss)
    bs.train(parted, batch, epochs=1, loss=loss, accumulate=4)
    torch.testing.assert_close(whole.state_dict(), parted.state_dict())


def test_settings_of_another_run_are_refused(tmp_path: Path) -> None:
    def run(**changed: Any) -> None:
        usual = {"optimizer": torch.optim.Adam, "schedule": one_cycle, "epochs": 1, "batch_size": 8, "folder": tmp_path}
        bs.train(classifier(), (LEFT, LABELS), **{**usual, **changed})

    run()
    run()  # a finished run is only read
    for changed, said in (
        ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.5)}, "optimizer.lr was 0.001 and is 0.5"),
        ({"optimizer": torch.optim.RMSprop}, "optimizer.kind was 'Adam' and is 'RMSprop'"),
        ({"schedule": lambda o: OneCycleLR(o, 0.01, total_steps=12)}, "schedule.total_steps was 9 and is 12"),
        ({"batch_size": 11}, "batches.batch_size was 8 and is 11"),
        ({"task": "follow", "reference": classifier()}, "task was 'classes' and is 'follow'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            run(**changed)


def first_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def second_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


def first_metric(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float()


second_loss.__qualname__ = "first_loss"  # as when a notebook's cell was edited


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": second_loss}, "loss.task.own_loss was 'first_loss, code .*' and is 'first_loss, code .*'"),
        ({"metric": lambda outputs, targets: outputs.mean()}, "metric.function was 'first_metric, code .*' and is '<lambda>, code"),
        ({"metric": None}, "metric.kind was 'Averaged' and is 'TopK'"),
        ({"loss": Loss(), "metric": lambda outputs, targets: 0.0}, "metric.function was 'first_metric, "),
        ({"augment": lambda inputs: inputs * 2}, "augment was None and is '<lambda>, code "),
    ],
    ids=["loss", "metric", "no metric", "both", "augment"],
)
def test_a_run_does_not_go_on_with_other_functions(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    usual = {"epochs": 1, "loss": first_loss, "metric": first_metric, "folder": tmp_path}
    expected = without_times(bs.train(classifier(), (LEFT, LABELS), **usual))
    assert without_times(bs.train(classifier(), (LEFT, LABELS), **usual)) == expected  # only read
    with pytest.raises(CheckpointError, match=said):
        bs.train(classifier(), (LEFT, LABELS), **{**usual, **changed})


def test_gradients_are_the_trainings_own_matter():
    results = []
    for on in (True, False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(LEFT[0].numel(), 3))
        with torch.set_grad_enabled(on):
            results.append(bs.train(network, (LEFT, LABELS), epochs=1).records[0]["loss"])
    assert results[0] == results[1]
    with (
        torch.inference_mode(),
        pytest.raises(bs.BitscapeError, match=r"torch\.inference_mode is on, and training needs"),
    ):
        bs.train(network, (LEFT, LABELS), epochs=1)


def foreign() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"network": "resnet"}, "network='resnet': it must be a Module"),
        ({"data": "photos/"}, "a name or path is read by bitscape.load_dataset"),
        ({"data": bs.Batches}, "data: the class .*; pass a tensor"),
        ({"data": []}, "data: it holds no batch"),
        ({"data": (LEFT[:0], LABELS[:0])}, "data: it holds no batch"),
        ({"data": (LEFT, LABELS[:20])}, "data: its tensors have 20 and 22 rows"),
        ({"data": LEFT}, r"a batch has no labels \(no labels or targets\); give \(input, label\) pairs"),
        ({"data": (LEFT, LABELS + 1)}, r"label 3, the model has outputs 0\.\.2"),
        ({"data": (LEFT, LABELS - 1)}, "it has the label -1; labels count from 0"),
        ({"data": [(LEFT, RIGHT, LABELS)]}, "a tuple of 3 entries"),
        (
            {"network": two()},
            r"data: of a pair, the first entry is the input and the second the label, and the "
            r"network cannot be called with it: forward\(left, right\) \(missing a required "
            r"argument: 'right'\); pass inputs=.*inputs=tuple where both",
        ),
        (
            {"inputs": lambda batch: (batch[0], batch[0])},
            r"inputs: the function returns a tuple, and the network cannot be called with it: "
            r"forward\(.*\) \(too many positional arguments\); return a tensor, a tuple",
        ),
        ({"data": (RIGHT, LABELS)}, r"fails on a batch of shape \(22, 3\), torch.float32"),
        ({"data": list(generated()), "batch_size": 4}, "batch_size is 4, and the data come in batches of their own"),
        ({"batch_size": 0}, "batch_size is 0; allowed are whole numbers from 1"),
        ({"optimizer": foreign()}, r"the SGD has 2 parameters that the network does not have, first one of shape \(2, 2\)"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the loss by itself"),
        ({"optimizer": bs.Sgd}, "optimizer is <class 'bitscape.engine.settings.Sgd'>; it must be settings such as"),
        ({"optimizer": "adam"}, "optimizer='adam': it must be an OptimizerSettings, an Optimizer, a function or"),
        ({"optimizer": lambda parameters: None}, "optimizer: the function returns NoneType"),
        ({"schedule": OneCycleLR(foreign(), 0.1, total_steps=3)}, "the OneCycleLR was built on another optimizer"),
        ({"schedule": ReduceLROnPlateau}, "schedule is ReduceLROnPlateau, which waits for a metric"),
        ({"optimizer": torch.optim.Adam, "schedule": one_cycle, "epochs": 10}, "the OneCycleLR ends after 9 steps, and the run has 10"),
        ({"loss": lambda outputs, targets: outputs.detach().square()}, "loss: what it returns has no gradient"),
        ({"schedule": "cosine"}, "schedule='cosine': it must be a Schedule, "),
        ({"schedule": Cosine}, "schedule is <class 'bitscape.engine.settings.Cosine'>; it must be Cosine"),
        ({"schedule": lambda optimizer: 3}, "schedule: the function returns int"),
        ({"loss": "mse"}, "loss='mse': it must be a function"),
        ({"loss": nn.MSELoss}, "loss is <class .*MSELoss'>; it must be a function"),
        ({"loss": lambda outputs, targets: 3.0}, "loss: it returns float; it must return a floating-point tensor"),
        ({"loss": Loss(), "task": "follow", "reference": classifier()}, r"Loss\(...\) is for task 'classes', and the task is 'follow'"),
        ({"metric": lambda outputs, targets: "good"}, "metric: it returns str"),
        ({"metric": 3}, "metric is 3; it must be a function"),
        ({"task": "clases"}, "task='clases': allowed are 'auto', 'classes', 'dense', 'binary', 'follow'; nearest: classes"),
        ({"task": "dense"}, r"task='dense': the model returns shape \(22, 3\)"),
        ({"task": "classes", "reference": classifier()}, "reference: task 'classes' looks at targets"),
        ({"task": "follow", "data": LEFT}, "task 'follow' needs what to follow; pass reference="),
        ({"channels_last": True, "data": [(LEFT, LABELS)], "inputs": lambda batch: (batch[0],)}, "channels_last: True, and the network"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"network": classifier(), "data": (LEFT, LABELS), "epochs": 1, **wrong}
    network, data = arguments.pop("network"), arguments.pop("data")
    with pytest.raises(bs.BitscapeError, match=said):
        bs.train(network, data, **arguments)


def test_a_bad_batch_of_any_inputs_is_diagnosed() -> None:
    broken = LEFT.clone()
    broken[20] = torch.nan
    with pytest.raises(NonFiniteError, match=r"epoch 1 of 1, batch 2 .*the images themselves are not finite"):
        bs.train(two(), (broken[i : i + 8] for i in (0, 8, 16)), epochs=1, loss=lambda o, _: o.sum(), **{
            "inputs": lambda left: (left, torch.zeros(len(left), 3)), "targets": lambda _: None
        })


def test_a_step_of_dqmq_names_an_estimator_for_other_tasks() -> None:
    from bitscape.dynamic import Dqmq
    from bitscape.dynamic.build import DynamicBits, dynamic_network

    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))).eval()
    images = torch.randn(8, 2, 6, 6)
    network = dynamic_network(model, uniform_policy(["0", "2", "4"], bs.LayerBits(4, 4)), images, DynamicBits(static=()))
    said = "estimator='both' needs the loss of each label, and the task is 'user'; use estimator='pathwise'"
    with pytest.raises(bs.BitscapeError, match=said):
        bs.train(network, [images], epochs=1, step=Dqmq(bitops=1e9, estimator="both"), loss=lambda o, _: o.square().mean(1))
    result = bs.train(network, [images], epochs=1, step=Dqmq(bitops=1e9), loss=lambda o, _: o.square().mean(1))
    assert {"loss", "bits"} <= result.records[0].keys()


def resumable() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("changed", ["rows", "batch_size"])
def test_a_run_does_not_go_on_with_a_loader_of_other_data(tmp_path, changed):
    def loader(rows, batch_size):
        return DataLoader(TensorDataset(torch.randn(rows, 4), torch.arange(rows) % 3), batch_size=batch_size)

    bs.train(resumable(), loader(32, 8), epochs=1, folder=tmp_path)
    other = loader(64, 8) if changed == "rows" else loader(16, 4)
    with pytest.raises(bs.BitscapeError, match="batches_an_epoch was 4" if changed == "rows" else "first_batch"):
        bs.train(resumable(), other, epochs=1, folder=tmp_path)


def test_weights_that_a_checkpoint_replaces_are_told(tmp_path, caplog):
    data = torch.randn(16, 4), torch.arange(16) % 3
    first = resumable()
    bs.train(first, data, epochs=1, folder=tmp_path)
    bs.train(resumable(), data, epochs=1, folder=tmp_path)
    assert "began with other weights" not in caplog.text
    other = nn.Linear(4, 3)
    bs.train(other, data, epochs=1, folder=tmp_path)
    assert torch.equal(other.weight, first.weight) and "began with other weights" in caplog.text
