import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bitscape.data.batches import DIGITS, Batches
from bitscape.data.sources import load_dataset
from bitscape.engine import (
    AdamW,
    Batch,
    BatchLoss,
    CheckpointError,
    Cosine,
    NonFiniteError,
    Sgd,
    StepRecord,
    TrainResult,
    evaluate,
    origin,
    train,
)
from bitscape.engine import (
    loop as loop_module,
)
from bitscape.engine.checkpoint import load_checkpoint
from bitscape.engine.loop import CHECKPOINT, METRICS, RUN
from bitscape.engine.step import CrossEntropy
from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.steps import Loss, Plain, Saq
from tests.engine.tiny import TinyBatches, same_state, tiny_batches, tiny_net

pytestmark = pytest.mark.slow

USUAL: dict[str, Any] = {"step": Plain(), "optimizer": Sgd(lr=0.05), "epochs": 3, "schedule": Cosine(warmup_epochs=0.5)}


def test_parts_of_a_batch_add_up_to_it() -> None:
    whole, in_parts = (nn.Sequential(nn.Flatten(), nn.Linear(72, 3)) for _ in range(2))
    in_parts.load_state_dict(whole.state_dict())
    (one,) = train(whole, tiny_batches(), **{**USUAL, "epochs": 1}).records
    (other,) = train(in_parts, tiny_batches(), **{**USUAL, "epochs": 1}, accumulate=3).records  # 16 images: 6, 5 and 5
    torch.testing.assert_close(in_parts.state_dict(), whole.state_dict())
    assert other["loss"] == pytest.approx(one["loss"]) and other["top1"] == one["top1"]


def test_a_batch_is_cut_by_images_and_shares_of_the_loss_are_prepared_once() -> None:
    images, labels = next(iter(tiny_batches().epoch(0)))
    prepared: list[int] = []

    class Noted:
        def for_batch(self, x: Tensor) -> BatchLoss:
            prepared.append(len(x))
            return CrossEntropy().for_batch(x)

    batch = Batch.of(images, labels, Noted(), 3)
    for _ in range(2):
        batch.backward(tiny_net())
    assert prepared == [6, 5, 5] and len(batch) == 16
    assert [part.share for part in batch.parts] == [6 / 16, 5 / 16, 5 / 16]
    assert torch.equal(torch.cat([part.targets for part in batch.parts]), labels)
    assert len(Batch.of(images[:2], labels[:2], Noted(), 5).parts) == 2


def test_extras_are_the_mean_over_the_batches_that_have_them() -> None:
    calls: list[int] = []

    def every_second(model: nn.Module, batch: Batch) -> StepRecord:
        record = Plain()(model, batch)
        calls.append(len(batch))
        return replace(record, extras={} if len(calls) % 2 else {"gap": torch.tensor(float(len(calls)))})

    (record,) = train(tiny_net(), tiny_batches(), **{**USUAL, "epochs": 1, "step": every_second}).records
    assert record["gap"] == pytest.approx((2 * 16 + 4 * 16) / 32)


class Killed(Exception):
    pass


class KilledAt:
    """A plain step that stops the run after some batches, as a kill would."""

    def __init__(self, calls: list[int], last: int) -> None:
        self.calls, self.last = calls, last

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        self.calls.append(len(batch))
        if len(self.calls) > self.last:
            raise Killed
        return Plain()(model, batch)


def without_times(records: tuple[Any, ...] | list[Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "train_s"} for record in records]


def lines(folder: Path) -> list[dict[str, Any]]:
    return without_times([json.loads(line) for line in (folder / METRICS).read_text().splitlines()])


def test_training_learns_and_reports() -> None:
    model = tiny_net()
    batches = tiny_batches()
    result = train(model, batches, **{**USUAL, "epochs": 8}, validation=tiny_batches(seed=1))
    first, last = result.records[0], result.records[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert last["validation_top1"] > 60.0
    assert [record["epoch"] for record in result.records] == list(range(1, 9))
    assert last["images"] == 70
    assert model.training and "forward" not in vars(model)


def test_records_are_the_mean_over_images() -> None:
    batches = tiny_batches()  # the last of five batches has 6 images, the others 16
    seen: list[tuple[float, int]] = []

    def watched(model: nn.Module, batch: Batch) -> StepRecord:
        record = Plain()(model, batch)
        seen.append((record.loss.item(), len(batch)))
        return replace(record, extras={"sharpness": torch.tensor(float(len(batch)))})

    (record,) = train(tiny_net(), batches, **{**USUAL, "epochs": 1, "step": watched}).records
    assert record["loss"] == pytest.approx(sum(loss * images for loss, images in seen) / 70)
    assert record["sharpness"] == pytest.approx((4 * 16 * 16 + 6 * 6) / 70)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_same_seed_same_bits_and_the_callers_random_state_is_kept(autocast: torch.dtype | None) -> None:
    one, other, third = tiny_net(), tiny_net(), tiny_net()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(one, tiny_batches(), **USUAL, autocast=autocast)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    train(other, tiny_batches(), **USUAL, autocast=autocast)
    assert same_state(one, other)
    train(third, tiny_batches(), **USUAL, autocast=autocast, seed=1)
    assert not same_state(one, third)  # dropout


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.05), AdamW(lr=0.01)])
@pytest.mark.parametrize("killed_after", [2, 5, 7, 15])
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, optimizer: Sgd | AdamW, killed_after: int) -> None:
    settings = {**USUAL, "optimizer": optimizer, "ema_decay": 0.9, "validation": tiny_batches(seed=1)}
    whole, halved = tiny_net(), tiny_net()
    calls: list[int] = []
    uninterrupted = train(whole, tiny_batches(), **{**settings, "step": KilledAt([], 99)})
    every_batch = {"folder": tmp_path, "checkpoint_every_s": 0.0}
    with pytest.raises(Killed):
        train(halved, tiny_batches(), **{**settings, "step": KilledAt(calls, killed_after - 1)}, **every_batch)
    resumed = tiny_net(seed=9)
    result = train(resumed, tiny_batches(), **{**settings, "step": KilledAt(calls, 99)}, **every_batch)
    assert same_state(whole, resumed)
    assert len(calls) == 15 + 1  # nothing but the killed batch ran twice
    assert without_times(result.records) == without_times(uninterrupted.records) == lines(tmp_path)
    assert result.ema is not None and uninterrupted.ema is not None
    assert all(torch.equal(result.ema[name], value) for name, value in uninterrupted.ema.items())


class Counting:
    """A step with state: every second batch gets a doubled gradient."""

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.int64)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count = state["count"]

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        record = Plain()(model, batch)
        self.count = self.count + 1
        if self.count % 2 == 0:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= 2
        return record


def test_a_steps_own_state_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = tiny_net(), tiny_net()
    train(whole, tiny_batches(), **{**USUAL, "step": Counting()})
    step = Counting()
    monkeypatch.setattr(loop_module.Pace, "count_step", lambda _pace: stop_at(step, 3))
    with pytest.raises(Killed):
        train(resumed, tiny_batches(), **{**USUAL, "step": step}, folder=tmp_path, checkpoint_every_s=0.0)
    monkeypatch.undo()
    train(resumed, tiny_batches(), **{**USUAL, "step": Counting()}, folder=tmp_path, checkpoint_every_s=0.0)
    assert same_state(whole, resumed)


def stop_at(step: Counting, count: int) -> None:
    if int(step.count) == count:
        raise Killed


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bitscape.engine import Sgd, train
from bitscape.steps import Plain
from tests.engine.tiny import tiny_batches, tiny_net
folder = Path(sys.argv[1])
model = tiny_net()
print("ready", flush=True)
train(model, tiny_batches(images=400), step=Plain(), optimizer=Sgd(), epochs=6, folder=folder, checkpoint_every_s=0.0)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src")])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = tiny_net(), tiny_net()
    settings: dict[str, Any] = {"step": Plain(), "optimizer": Sgd(), "epochs": 6}
    train(whole, tiny_batches(images=400), **settings, folder=tmp_path / "whole", checkpoint_every_s=0.0)
    killed = tmp_path / "killed"
    for delay_s in (0.0, 0.08):  # after the first checkpoint; any moment must do
        with start(killed) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            while not (killed / CHECKPOINT).exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
    result = train(resumed, tiny_batches(images=400), **settings, folder=killed, checkpoint_every_s=0.0)
    assert same_state(whole, resumed)
    assert without_times(result.records) == lines(killed) == lines(tmp_path / "whole")
    assert sorted(file.name for file in killed.iterdir()) == sorted([".lock", CHECKPOINT, METRICS, RUN])


def test_a_finished_run_is_only_loaded_and_can_be_started_over(tmp_path: Path) -> None:
    done, again, over = tiny_net(), tiny_net(seed=1), tiny_net(seed=1)
    first = train(done, tiny_batches(), **USUAL, folder=tmp_path)
    assert without_times(train(again, tiny_batches(), **USUAL, folder=tmp_path).records) == without_times(first.records)
    assert same_state(done, again)
    train(over, tiny_batches(), **USUAL, folder=tmp_path, resume=False)
    assert not same_state(done, over)


def test_what_the_hook_returns_joins_the_records(tmp_path: Path) -> None:
    batches_done: list[tuple[int, int]] = []

    def after_epoch(epochs: int) -> dict[str, float]:
        batches_done.append((epochs, len((tmp_path / METRICS).read_text().splitlines())))
        return {"score": 10.0 * epochs}

    hooked, plain = tiny_net(), tiny_net()
    result = train(hooked, tiny_batches(), **USUAL, folder=tmp_path, after_epoch=after_epoch)
    assert batches_done == [(1, 0), (2, 1), (3, 2)]  # before the epoch is saved
    assert [record["score"] for record in result.records] == [10.0, 20.0, 30.0]
    assert [record["score"] for record in lines(tmp_path)] == [10.0, 20.0, 30.0]
    again = train(plain, tiny_batches(), **USUAL, folder=tmp_path)  # without the hook
    assert without_times(again.records) == without_times(result.records)
    train(plain := tiny_net(), tiny_batches(), **USUAL)
    assert same_state(hooked, plain)


@pytest.mark.parametrize("name", ["loss", "lr", "validation_top1"])
def test_a_hook_may_not_overwrite_what_the_loop_records(name: str) -> None:
    with pytest.raises(BitscapeError, match=f"after_epoch returns {name}, which the loop records itself"):
        train(tiny_net(), tiny_batches(), **USUAL, validation=tiny_batches(), after_epoch=lambda _: {"mine": 1.0, name: 1.0})


@dataclass(frozen=True)
class NesterovAdam:
    """Not the library's own; it keeps a scalar beside each parameter's moments."""

    lr: float = 0.01

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.NAdam(model.parameters(), lr=self.lr)


def test_any_optimizer_settings_resume_and_are_compared(tmp_path: Path) -> None:
    whole, resumed = tiny_net(), tiny_net(seed=9)
    settings = {**USUAL, "optimizer": NesterovAdam()}
    train(whole, tiny_batches(), **{**settings, "step": KilledAt([], 99)})
    with pytest.raises(Killed):
        train(tiny_net(), tiny_batches(), **{**settings, "step": KilledAt([], 7)}, folder=tmp_path, checkpoint_every_s=0.0)
    other = {**settings, "step": KilledAt([], 99), "optimizer": NesterovAdam(lr=0.02)}
    with pytest.raises(CheckpointError, match=r"optimizer\.lr was 0\.01 and is 0\.02"):
        train(resumed, tiny_batches(), **other, folder=tmp_path)
    train(resumed, tiny_batches(), **{**settings, "step": KilledAt([], 99)}, folder=tmp_path)
    assert same_state(whole, resumed)


def test_a_failing_validation_leaves_the_epoch_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**USUAL, "validation": tiny_batches(seed=1)}
    whole, failed, resumed = tiny_net(), tiny_net(), tiny_net(seed=9)
    expected = train(whole, tiny_batches(), **settings)

    def fails(*_args: object, **_kwargs: object) -> None:
        raise NonFiniteError("no accuracy")

    monkeypatch.setattr(loop_module, "measured", fails)
    with pytest.raises(NonFiniteError, match="no accuracy"):
        train(failed, tiny_batches(), **settings, folder=tmp_path)
    tensors, header = load_checkpoint(tmp_path / CHECKPOINT)
    assert (header["epoch"], header["batch"]) == (0, 5) and lines(tmp_path) == []
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in failed.state_dict().items())
    monkeypatch.undo()
    result = train(resumed, tiny_batches(), **settings, folder=tmp_path)
    assert same_state(whole, resumed)
    assert without_times(result.records) == without_times(expected.records)  # the rate, too


def test_run_json_holds_settings_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bin/bitscape", "train"])
    train(tiny_net(), tiny_batches(), **USUAL, folder=tmp_path, seed=7)
    run = json.loads((tmp_path / RUN).read_text())
    assert run["settings"]["optimizer"] == {
        "kind": "Sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "quantizer_lr": None,
    }
    assert run["settings"]["seed"] == 7
    assert run["versions"]["torch"] == torch.__version__
    assert run["format"] == 1
    assert (run["device"], run["hardware"]) == ("cpu", origin.hardware(torch.device("cpu")))
    assert run["command"] == origin.command() is not None
    assert run.get("commit") == origin.commit()


def test_run_json_holds_no_command_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [""])  # as at Python's prompt
    train(tiny_net(), tiny_batches(), **USUAL, folder=tmp_path)
    assert "command" not in json.loads((tmp_path / RUN).read_text())


@pytest.mark.parametrize("kind", [str, Path, os.fspath])
def test_a_folder_is_a_path_or_a_text(tmp_path: Path, kind: Callable[[Path], str | Path]) -> None:
    train(tiny_net(), tiny_batches(), **{**USUAL, "epochs": 1}, folder=kind(tmp_path / "run"))
    assert len(lines(tmp_path / "run")) == 1


def one_channel() -> TinyBatches:
    batches = tiny_batches()
    return replace(batches, dataset=replace(batches.dataset, images=batches.dataset.images[:, :1]))


class OutOfMemory(nn.Linear):
    def forward(self, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_that_do_not_fit_are_explained(channels_last: bool) -> None:
    with pytest.raises(BitscapeError, match=r"shape \(16, 1, 6, 6\), torch.float32: .*to have 2 channels.*; check channels"):
        train(tiny_net(), one_channel(), **USUAL, channels_last=channels_last)


class Flattened(nn.Module):
    """A view behind a convolution, which channels_last does not take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(144, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).view(len(images), -1))


@pytest.mark.parametrize(
    ("model", "asked", "laid_out"),
    [(tiny_net, None, True), (tiny_net, True, True), (tiny_net, False, False), (Flattened, None, False), (Flattened, False, False)],
)
def test_convolutions_are_laid_out_as_the_network_takes_it(model: Any, asked: bool | None, laid_out: bool, tmp_path: Path) -> None:
    network = model()
    train(network, tiny_batches(), **USUAL, channels_last=asked, folder=tmp_path)
    weight = next(network.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last) == laid_out
    assert json.loads((tmp_path / RUN).read_text())["settings"]["channels_last"] == laid_out


@pytest.mark.parametrize("bits", [2, 8])
def test_rounded_activations_do_not_decide_on_the_memory_format(bits: int) -> None:
    images = tiny_batches().dataset.images
    policy = uniform_policy(layer_shapes(tiny_net()), LayerBits(bits, bits))
    network = calibrate(with_quantizers(tiny_net(), policy), images)
    train(network, tiny_batches(), **USUAL)
    assert next(network.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_asked_for_where_the_network_does_not_take_it_is_refused() -> None:
    with pytest.raises(BitscapeError, match=r"channels_last: True, but the network does not take that memory format: .*view size"):
        train(Flattened(), tiny_batches(), **USUAL, channels_last=True)


def test_images_that_do_not_fit_the_teacher_or_the_validation_are_explained() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 3, 6), nn.Flatten())
    with pytest.raises(BitscapeError, match=r"shape \(16, 2, 6, 6\).*to have 3 channels"):
        train(tiny_net(), tiny_batches(), **USUAL, loss=Loss(teacher=teacher, distillation=0.5))
    with pytest.raises(BitscapeError, match=r"shape \(16, 1, 6, 6\).*to have 2 channels"):
        train(tiny_net(), tiny_batches(), **USUAL, validation=one_channel())


def test_running_out_of_memory_is_not_taken_for_bad_images() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        train(OutOfMemory(3, 3), tiny_batches(), **USUAL)


def other_labels() -> TinyBatches:
    batches = tiny_batches()
    assert batches.dataset.labels is not None
    return replace(batches, dataset=replace(batches.dataset, labels=batches.dataset.labels.flip(0)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": Sgd(lr=0.1)}, "optimizer.lr was 0.05 and is 0.1"),
        ({"epochs": 4}, "epochs was 3 and is 4"),
        ({"loss": Loss(label_smoothing=0.1)}, "loss.kind was 'TaskLoss' and is 'Loss'"),
        ({"batches": other_labels()}, "batches.dataset.labels.sample_sha256 was"),
        ({"model": nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())}, "another model: "),
        ({"model": tiny_net(classes=4)}, r"7.weight has shape \(3, 16\), the model \(4, 16\)"),
        (
            {"model": tiny_net()[:1].requires_grad_(False).extend(tiny_net()[1:])},
            r"frozen was \[\] and is \['0.weight'\]",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    usual = {"model": tiny_net(), "batches": tiny_batches(), **USUAL, "folder": tmp_path}
    train(**usual)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train(**{**usual, **changed})
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_bits_of_another_policy_are_refused(tmp_path: Path) -> None:
    # The state dicts have the same names and shapes.
    def quantized(weight: int) -> nn.Module:
        bits = {"0": LayerBits(8, 8), "4": LayerBits(weight, 4), "7": LayerBits(8, 8)}
        return calibrate(with_quantizers(tiny_net(), Policy(bits)), tiny_batches().dataset.images)

    train(quantized(4), tiny_batches(), **USUAL, folder=tmp_path)
    refused = r"other settings: bits\.4\.weight was 4 and is 2; pass those settings, or start over in another folder"
    with pytest.raises(CheckpointError, match=refused):
        train(quantized(2), tiny_batches(), **USUAL, folder=tmp_path)
    assert json.loads((tmp_path / RUN).read_text())["settings"]["bits"]["4"] == {"weight": 4, "activation": 4}
    train(quantized(4), tiny_batches(), **USUAL, folder=tmp_path)


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def poisoned_at(number: int) -> Callable[[nn.Module, Batch], StepRecord]:
    seen: list[int] = []

    def step(model: nn.Module, batch: Batch) -> StepRecord:
        seen.append(0)
        if len(seen) > number:
            with torch.no_grad():
                model[4].weight[0, 0] = float("nan")
        return Plain()(model, batch)

    return step


def test_a_nan_weight_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"epoch 2 of 3, batch 2 .*1 weight tensors are not finite, first 4.weight") as e:
        train(tiny_net(), tiny_batches(), **{**USUAL, "step": poisoned_at(7)}, folder=tmp_path)
    assert f"Last good checkpoint: {tmp_path / CHECKPOINT}." in str(e.value)
    assert len(lines(tmp_path)) == 1


def test_a_nan_activation_is_traced_to_its_layer_and_the_weights_are_kept() -> None:
    model = tiny_net()
    model.insert(3, Log())
    weights = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"epoch 1 of 3, batch 0 .*first the output of layer '3' \(Log\).*: none"):
        train(model, tiny_batches(), **USUAL)
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())


def test_the_message_tells_whether_the_model_in_memory_is_usable() -> None:
    with_norm = tiny_net()
    with_norm.insert(0, Log())
    with pytest.raises(NonFiniteError, match="but the model in memory is not usable: its norm statistics"):
        train(with_norm, tiny_batches(), **USUAL)
    assert not with_norm[2].running_mean.isfinite().all()
    without = nn.Sequential(nn.Flatten(), Log(), nn.Linear(72, 3))
    before = {name: value.clone() for name, value in without.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"the update was not made\. Last good") as e:
        train(without, tiny_batches(), **USUAL)
    assert "not usable" not in str(e.value)
    assert all(torch.equal(before[name], value) for name, value in without.state_dict().items())


def test_a_nan_gradient_with_a_finite_loss_stops_the_run() -> None:
    def step(model: nn.Module, batch: Batch) -> StepRecord:
        record = Plain()(model, batch)
        model[0].weight.grad[0] = float("inf")
        return record

    with pytest.raises(NonFiniteError, match="in the loss or in the backward pass"):
        train(tiny_net(), tiny_batches(), **{**USUAL, "step": step})


def test_nan_images_are_named() -> None:
    batches = tiny_batches()
    batches.dataset.images[:] = float("nan")
    with pytest.raises(NonFiniteError, match="images themselves"):
        train(tiny_net(), batches, **USUAL)


def test_clipping_shortens_the_gradient() -> None:
    lengths: list[float] = []
    model = tiny_net()

    def hook(_optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        lengths.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())

    handle = register_optimizer_step_pre_hook(hook)
    try:
        (record,) = train(model, tiny_batches(), **{**USUAL, "epochs": 1}, clip_norm=0.01).records
    finally:
        handle.remove()
    assert lengths == pytest.approx([0.01] * 5, rel=1e-3)
    assert record["gradient_norm"] > 0.1  # as it was before clipping


def test_two_passes_in_one_step_work_under_autocast() -> None:
    def twice(model: nn.Module, batch: Batch) -> StepRecord:
        Plain()(model, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.5  # the second pass must see this, not a cached copy
        batch.backward(model)
        assert not torch.is_autocast_enabled("cpu")
        return Plain()(model, batch)

    record = train(tiny_net(), tiny_batches(), **{**USUAL, "epochs": 1, "step": twice}, autocast=torch.bfloat16).records
    assert len(record) == 1


def test_log_lines_tell_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("bitscape.engine.pace.REPORT_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, "bitscape.engine"):
        train(tiny_net(), tiny_batches(), **USUAL)
    said = [record.getMessage() for record in caplog.records if "images/s" in record.getMessage()]
    assert len(said) == 15
    assert said[-1].startswith("epoch 3/3, batch 5/5: loss 0.") and said[-1].endswith("images/s, 0 s left")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"checkpoint_every_s": -1.0}, "checkpoint_every_s is -1.0"),
        ({"autocast": torch.float16}, "float16"),
        ({"step": Plain}, r"step is the class Plain; give an instance, e\.g\. step=Plain\(\)"),
        ({"step": Saq}, r"step is the class Saq; give an instance, e\.g\. step=Saq\(\)"),
        ({"step": "saq"}, r"step is 'saq'; it must be a training step or the settings of one, e\.g\. step=Saq\(\)"),
        ({"step": None}, "step is None; it must be"),
        ({"model": tiny_net(classes=2)}, r"outputs 0\.\.1"),
        (
            {"step": lambda model, batch: StepRecord(batch.parts[0].outputs(model).sum(), torch.zeros(3))},
            "no gradient",
        ),
    ],
)
def test_wrong_arguments_are_explained(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        train(**{"model": tiny_net(), "batches": tiny_batches(), **USUAL, **wrong})


def test_missing_labels_are_explained() -> None:
    batches = tiny_batches()
    with pytest.raises(BitscapeError, match="no labels"):
        train(tiny_net(), replace(batches, dataset=replace(batches.dataset, labels=None)), **USUAL)


def result_of(**settings: Any) -> tuple[nn.Module, TrainResult]:
    model = tiny_net()
    return model, train(model, tiny_batches(), **{**USUAL, **settings})


def test_without_a_compiler_training_goes_on_uncompiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, "bitscape.engine"):
        model, _ = result_of(compile=True)
    assert "no-such-compiler" in caplog.text
    assert same_state(model, result_of()[0])


def test_compile_compiles_the_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    model = tiny_net()

    def compiler(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        compiled.append(forward)
        return lambda images: forward(images) * 1.0

    monkeypatch.setattr(shutil, "which", lambda name: name)  # nothing is compiled
    monkeypatch.setattr(torch, "compile", compiler)
    eager = model.forward
    train(model, tiny_batches(), **USUAL, compile=True)
    assert compiled == [eager]
    assert same_state(model, result_of()[0])


def test_the_real_digits_resume_with_shuffled_augmented_batches(tmp_path: Path) -> None:
    def batches() -> Batches:
        data = load_dataset("digits", limit=400)
        return Batches(dataset=data, normalization=DIGITS, batch_size=64, shuffle=True, augment="flip")

    def net() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with torch.no_grad():
            model[1].weight.zero_()
            model[1].bias.zero_()
        return model

    whole, resumed, calls = net(), net(), []
    settings = {**USUAL, "optimizer": Sgd(lr=0.3), "autocast": torch.bfloat16}
    (*_, last) = train(whole, batches(), **{**settings, "step": KilledAt([], 99)}).records
    with pytest.raises(Killed):
        train(net(), batches(), **{**settings, "step": KilledAt(calls, 9)}, folder=tmp_path, checkpoint_every_s=0.0)
    train(resumed, batches(), **{**settings, "step": KilledAt(calls, 99)}, folder=tmp_path)
    assert same_state(whole, resumed)
    assert len(calls) == 3 * 7 + 1
    assert last["top1"] > 50.0  # ten classes
    assert evaluate(whole, batches()).images == 400


def norm_of_a_pixel() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))


@pytest.mark.parametrize(
    ("images", "accumulate", "parts"),
    [(9, 1, [[4], [5]]), (9, 2, [[2, 2], [3, 2]]), (9, 4, [[2, 2], [3, 2]]), (7, 3, [[2, 2], [3]]), (6, 2, [[2, 2], [2]])],
)
def test_no_norm_gets_a_single_image(images: int, accumulate: int, parts: list[list[int]]) -> None:
    seen: list[list[int]] = []

    def step(model: nn.Module, batch: Batch) -> StepRecord:
        seen.append([len(part) for part in batch.parts])
        return batch.backward(model)

    data = Batches(dataset=load_dataset("digits", limit=images), normalization=DIGITS, batch_size=4)
    train(norm_of_a_pixel(), data, step=step, optimizer=Sgd(lr=0.01), epochs=1, accumulate=accumulate)
    assert seen == parts


@pytest.mark.parametrize("step", [Plain(), Saq(rho=0.1)], ids=repr)
def test_the_only_image_of_a_norm_of_a_pixel_is_an_error_with_the_reason(step: Any) -> None:
    data = Batches(dataset=load_dataset("digits", limit=1), normalization=DIGITS, batch_size=4)
    with pytest.raises(BitscapeError, match="a norm has no variance in it: give at least 2 images"):
        train(norm_of_a_pixel(), data, step=step, optimizer=Sgd(lr=0.01), epochs=1)
    train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, step=Plain(), optimizer=Sgd(lr=0.01), epochs=1)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_network_that_is_not_float32_is_refused_before_anything_is_written(kind: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(BitscapeError, match=rf"{kind}; the network must be float32: call model\.float\(\) first"):
        train(tiny_net().to(kind), tiny_batches(), **USUAL, folder=tmp_path / "run")
    with pytest.raises(BitscapeError, match=r"call model\.float\(\) first"):
        evaluate(tiny_net().to(kind), tiny_batches())
    assert not (tmp_path / "run").exists()
