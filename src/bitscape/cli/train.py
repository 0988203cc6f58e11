"""`bitscape train`: float or quantized training, by the one engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

import bitscape as bs
from bitscape.cli.network import (
    ImageSettings,
    load_batches,
    load_images,
    load_network,
    with_random_corruptions,
)
from bitscape.cli.options import (
    COUNT,
    all_of,
    channels_last_option,
    data_options,
    image_options,
    mixed_option,
    network_options,
    repair_options,
    seed_option,
)
from bitscape.cli.output import print_table
from bitscape.cli.parsing import make_step, make_trackers, parse_normalization, parse_repair
from bitscape.cli.paths import FILE, OUTPUT_FOLDER, SOURCE, TRACKER, keep_locked
from bitscape.cli.train_dynamic import dynamic_options, dynamic_training
from bitscape.errors import BitscapeError
from bitscape.folders import CHECKPOINT, POLICY_FILE, WEIGHTS_FILE, results_in
from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import nn

    from bitscape.data.batches import Batches
    from bitscape.data.splits import Split
    from bitscape.engine import AdamW, OptimizerSettings, Sgd, Step, StepSettings, Tracker, TrainResult
    from bitscape.steps import Loss
    from bitscape.verbs.quantize import Repair

_recipe = all_of(
    click.option("--epochs", default=10, show_default=True, type=COUNT, help="Passes over the data."),
    click.option("--lr", type=float, help="Highest learning rate; falls along a cosine.  [default: sgd 0.01, adamw 0.001]"),
    click.option("--batch-size", default=128, show_default=True, type=COUNT, help="Images a step."),
    click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default="sgd", show_default=True),
    click.option("--step", "step_name", help="plain, sam or saq; see `bitscape methods`.  [default: plain; dqmq with --dynamic]"),
    click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Setting of the step, e.g. rho=0.003; repeatable."),
    click.option("--accumulate", default=1, show_default=True, type=COUNT, help="Parts of a batch, where memory is short."),
    click.option("--augment", type=click.Choice(["none", "flip", "crop-flip"]), default="none", show_default=True),
    click.option(
        "--label-smoothing",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0, 1, max_open=True),
        help="Probability spread over all classes.",
    ),
    click.option("--distill", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Weight of the float network as teacher."),
    click.option("--autocast", type=click.Choice(["bf16"]), help="Compute in this type.  [default: float32]"),
    click.option("--compile", "compiled", is_flag=True, help="torch.compile; pays after about a minute."),
    click.option(
        "--tracker",
        "trackers",
        multiple=True,
        type=TRACKER,
        metavar="NAME=WHERE",
        help="Also follow the run there, epoch by epoch: tensorboard=FOLDER; repeatable.",
    ),
    click.option(
        "--ema",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="DECAY",
        help="Average the weights, e.g. 0.999; the average is kept.",
    ),
)


@click.command()
@network_options
@data_options
@image_options
@click.option(
    "--validation", type=SOURCE, metavar="SOURCE", help="Evaluate on this after each epoch; split test, or val, where there is one."
)
@click.option("--policy", "policy_file", type=FILE, metavar="FILE", help="Train at these bits (LSQ).  [default: float]")
@repair_options
@_recipe
@mixed_option
@dynamic_options
@channels_last_option
@seed_option
@click.option("--out", required=True, type=OUTPUT_FOLDER, metavar="FOLDER", help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint, if there is one.")
def train(
    model: str,
    weights: Path | None,
    device: str | None,
    data: str,
    split: str | None,
    input_size: int | None,
    normalize: str | None,
    validation: str | None,
    policy_file: Path | None,
    out: Path,
    resume: bool,
    **recipe: Any,
) -> None:
    """Train a network: in float, at a policy's bits, or at bits that each image decides.

    The folder gets a checkpoint at least every minute, metrics.jsonl, run.json, and at the end model.safetensors.

    \b
    Example:
      bitscape train --model timm:resnet18 --weights resnet18.safetensors \\
        --data train/ --validation val/ --input-size 224 --normalize imagenet \\
        --policy policy.json --epochs 5 --lr 0.01 --step saq --set interval=5 --out run1
      bitscape train ... --policy w4.json --mixed-quality \\
        --dynamic 2-8 --budget bitops=w4a4 --out run2
    """
    from bitscape.data.splits import EVALUATION, TRAINING

    _check_folder(out, resume, policy_file)
    if recipe["distill"] and weights is None and not model.startswith("hf:"):
        raise BitscapeError("--distill: the float network is the teacher, and it has no --weights")
    settings = ImageSettings.checked(input_size, normalize, data, validation)
    training: Training = dynamic_training(policy_file, recipe) or _static_training(policy_file, recipe)
    trackers = make_trackers(recipe["trackers"])
    keep_locked(out)
    teacher = load_network(model, weights, device, recipe["seed"])
    settings = settings.of_model(teacher)
    batches = _training_batches(data, split or TRAINING, settings, recipe)
    checked = None if validation is None else load_batches(validation, EVALUATION, settings, recipe["batch_size"], teacher)
    student = training.network(teacher, batches, recipe["seed"])
    try:
        result = _train(student, batches, checked, training, _loss(teacher, recipe), trackers, out, recipe)
        written = training.save(student, result, batches, out, recipe["seed"])
    except KeyboardInterrupt:
        raise click.Abort(_how_to_go_on(out)) from None
    _print_epochs(result)
    click.echo(f"\n{written}; next: bitscape evaluate --checkpoint {out} ...")


class Training(Protocol):
    """What differs between training at static bits and at bits that images decide."""

    @property
    def optimizer(self) -> "OptimizerSettings":
        """Of all that is trained."""

    def network(self, float_model: "nn.Module", batches: "Batches", seed: int) -> "nn.Module":
        """A copy of the float network as it is trained."""

    def step(self, network: "nn.Module") -> "Step | StepSettings":
        """How it is trained."""

    def save(self, network: "nn.Module", result: "TrainResult", batches: "Batches", out: Path, seed: int) -> str:
        """Write the trained network; say what was written."""


@dataclass(frozen=True, kw_only=True)
class StaticTraining:
    """Training in float, or at the bits of a policy."""

    policy: Policy | None
    """None = float."""
    repair: "Repair | None"
    """Of the rounding that training starts from."""
    repair_folder: Path | None
    """Where a repair that trains keeps its checkpoint."""
    settings: "Step | StepSettings"
    """Of the step."""
    optimizer: "Sgd | AdamW"
    """Of all parameters."""

    def network(self, float_model: "nn.Module", batches: "Batches", seed: int) -> "nn.Module":
        """A copy of the float network, or the network at the policy's bits, repaired on training images."""
        from bitscape.models.copies import copied

        if self.policy is None:
            return copied(float_model)
        return bs.quantize(
            float_model,
            self.policy,
            batches,
            for_training=True,
            repair=self.repair,
            folder=self.repair_folder,
            seed=seed,
        )

    def step(self, network: "nn.Module") -> "Step | StepSettings":
        """The step, the same for every network."""
        return self.settings

    def save(self, network: "nn.Module", result: "TrainResult", batches: "Batches", out: Path, seed: int) -> str:
        """Write the weights, averaged if that was asked for, and the policy; return the name of their file."""
        from bitscape.quant.storage import save_static

        save_static(network.state_dict() if result.ema is None else result.ema, self.policy, out)
        return str(out / WEIGHTS_FILE)


def _static_training(policy_file: Path | None, recipe: dict[str, Any]) -> StaticTraining:
    from bitscape.engine import AdamW, Sgd

    kind = Sgd if recipe["optimizer"] == "sgd" else AdamW
    return StaticTraining(
        policy=None if policy_file is None else Policy.load(policy_file),
        repair=parse_repair(
            recipe["repair"], recipe["repair_folder"], has_policy=policy_file is not None
        ),
        repair_folder=recipe["repair_folder"],
        settings=make_step(recipe["step_name"] or "plain", recipe["settings"]),
        optimizer=kind() if recipe["lr"] is None else kind(lr=recipe["lr"]),
    )


def _check_folder(out: Path, resume: bool, policy_file: Path | None) -> None:
    """Refuse a folder that holds what the run would overwrite: all but the run that is resumed."""
    held = results_in(out)
    if CHECKPOINT in held and not resume:
        raise BitscapeError(f"--out {out}: it holds a checkpoint; add --resume to go on, or give another folder")
    if held and CHECKPOINT not in held:
        raise BitscapeError(f"--out {out}: it holds {', '.join(held)}, and no checkpoint to go on from; give another folder")
    if POLICY_FILE in held and policy_file is None:
        raise BitscapeError(f"--out {out}: it holds {POLICY_FILE}, and a float network has none; add --policy, or give another folder")


def _how_to_go_on(out: Path) -> str:
    if not (out / CHECKPOINT).is_file():
        return ""
    return f"{out / CHECKPOINT} is kept; run the same command with --resume to go on from it"


def _training_batches(data: str, split: "Split", settings: ImageSettings, recipe: dict[str, Any]) -> "Batches":
    from bitscape.data.batches import Batches

    dataset = load_images(data, split, settings)
    return Batches(
        dataset=with_random_corruptions(dataset, data, recipe["seed"]) if recipe["mixed_quality"] else dataset,
        normalization=parse_normalization(settings.normalize, data),
        batch_size=recipe["batch_size"],
        shuffle=True,
        augment=recipe["augment"],
        seed=recipe["seed"],
    )


def _loss(teacher: "nn.Module", recipe: dict[str, Any]) -> "Loss":
    from bitscape.steps import Loss

    share = recipe["distill"]
    return Loss(label_smoothing=recipe["label_smoothing"], teacher=teacher if share else None, distillation=share)


def _train(
    student: "nn.Module",
    batches: "Batches",
    validation: "Batches | None",
    training: Training,
    loss: "Loss",
    trackers: "Sequence[Tracker]",
    out: Path,
    recipe: dict[str, Any],
) -> "TrainResult":
    import torch

    return bs.train(
        student,
        batches,
        task="classes",
        step=training.step(student),
        optimizer=training.optimizer,
        epochs=recipe["epochs"],
        loss=loss,
        autocast=torch.bfloat16 if recipe["autocast"] else None,
        compile=recipe["compiled"],
        channels_last=recipe["channels_last"],
        accumulate=recipe["accumulate"],
        ema_decay=recipe["ema"],
        validation=validation,
        folder=out,
        seed=recipe["seed"],
        trackers=trackers,
    )


def _print_epochs(result: "TrainResult") -> None:
    names = {"loss": "loss", "top1": "top-1 %", "validation_top1": "validation top-1 %"}
    names |= {"validation_top5": "validation top-5 %", "ema_validation_top1": "averaged, top-1 %"}
    names |= {"bits": "activation bits", "bitops": "BitOps"}
    shown = [name for name in names if name in result.records[0]]
    rows, before_s = [], 0.0
    for record in result.records:
        speed = record["images"] / max(record["train_s"] - before_s, 1e-9)
        before_s = record["train_s"]
        rows.append([str(record["epoch"]), *(f"{record[name]:.4g}" for name in shown), f"{speed:.0f}"])
    print_table(["epoch", *(names[name] for name in shown), "images/s"], rows, left=0)
