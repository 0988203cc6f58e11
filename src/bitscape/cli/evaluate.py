"""`bitscape evaluate`: accuracy and cost of a float network, a policy on it, a packed file or a trained folder.

With --corruptions also its accuracy, and its bits if they depend on the image, under each corruption at each severity.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

import bitscape as bs
from bitscape.cli.network import (
    ImageSettings,
    load_batches,
    load_latency,
    load_network,
    measure_network,
    normalized_images,
    quantize_network,
)
from bitscape.cli.options import (
    COUNT,
    channels_last_option,
    data_options,
    image_options,
    latency_option,
    network_options,
    policy_options,
    seed_option,
)
from bitscape.cli.output import amount, print_table
from bitscape.cli.packed import packed_policy
from bitscape.cli.parsing import parse_repair
from bitscape.cli.paths import FILE, FOLDER, OutputFile
from bitscape.cli.spending import print_spent
from bitscape.cli.tables import print_within_budget
from bitscape.errors import BitscapeError
from bitscape.policy import Policy
from bitscape.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from bitscape.cost.latency import LatencyTable
    from bitscape.data.batches import Batches
    from bitscape.engine.evaluate import Evaluation
    from bitscape.engine.quality_table import Cell, QualityTable
    from bitscape.verbs.quantize import Repair


def _check_beside(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse to replace a file that is no table of qualities: policy.svg would go over policy.json."""
    if value is None or not (cells := value.with_suffix(".json")).exists():
        return value
    from bitscape.report.documents import load_quality

    try:
        load_quality(cells)
    except BitscapeError:
        option = f"{parameter.opts[0]} {str(value)!r}"
        raise BitscapeError(f"{option}: its cells go to {cells}, which holds something else; give another name") from None
    return value


@click.command()
@network_options
@data_options
@image_options
@click.option("--batch-size", type=COUNT, help="Images at once. Default: 128, or fewer of large ones.")
@policy_options
@click.option("--packed", type=FILE, metavar="FILE", help="Evaluate a packed file of this network.")
@click.option("--checkpoint", type=FOLDER, metavar="FOLDER", help="Evaluate what `bitscape train` or `tiers` left there.")
@click.option("--decisions", type=click.Choice(["per-image", "per-batch"]), help="Of a dynamic checkpoint.  [default: per-image]")
@click.option(
    "--corruptions",
    type=OutputFile(".svg", also=(".json",)),
    callback=_check_beside,
    metavar="FILE",
    help="Also measure ten corruptions at five severities; heat map, .svg, and its cells beside it, .json.",
)
@click.option("--json", "json_file", type=OutputFile(".json"), metavar="FILE", help="Where the figures go, .json, for `bitscape report`.")
@latency_option
@channels_last_option
@seed_option
def evaluate(
    model: str,
    weights: Path | None,
    device: str | None,
    data: str,
    split: str | None,
    input_size: int | None,
    normalize: str | None,
    batch_size: int | None,
    policy_file: Path | None,
    calibration: str | None,
    calibration_images: int | None,
    repair: "Repair | Literal['none'] | None",
    repair_folder: Path | None,
    packed: Path | None,
    checkpoint: Path | None,
    decisions: str | None,
    corruptions: Path | None,
    json_file: Path | None,
    latency: Path | None,
    channels_last: bool | None,
    seed: int,
) -> None:
    """Measure top-1 and top-5 accuracy, and what an image costs.

    \b
    Example:
      bitscape evaluate --model timm:resnet18 --weights resnet18.safetensors \\
        --data val/ --input-size 224 --normalize imagenet \\
        --policy policy.json --calibration train/
    """
    if sum(option is not None for option in (policy_file, packed, checkpoint)) > 1:
        raise BitscapeError("--policy, --packed and --checkpoint: give at most one of them; none evaluates the float network")
    if (policy_file is None) != (calibration is None):
        raise BitscapeError("--policy and --calibration go together: images set the policy's activation scales")
    chosen_repair = parse_repair(repair, repair_folder, has_policy=policy_file is not None)
    if decisions is not None and checkpoint is None:
        raise _undecided(decisions)
    from bitscape.data.splits import EVALUATION

    settings, times = ImageSettings.checked(input_size, normalize, data, calibration), load_latency(latency)
    policy = _policy(policy_file, packed, checkpoint)
    if times is not None and policy is None:
        raise BitscapeError("--latency: times are predicted at the bits of a policy; give --policy, --packed or a static --checkpoint")
    network = load_network(model, weights, device, seed)
    settings = settings.of_model(network)
    batches = load_batches(data, split or EVALUATION, settings, batch_size, network)
    shape = tuple(batches.dataset.images.shape[1:])
    if corruptions is not None and shape[0] != 3:
        raise BitscapeError(f"--corruptions needs images of three channels; --data {data!r} has {shape[0]}")
    if policy is not None and calibration is not None:
        images = normalized_images(calibration, calibration_images, settings, seed, network)
        network = quantize_network(network, policy, images, chosen_repair, repair_folder, seed)
    elif packed is not None:
        network = bs.load_packed(packed, network)
    elif checkpoint is not None:
        from bitscape.dynamic.storage import load_folder

        network, _ = load_folder(network, checkpoint, shape)
    _set_decisions(network, decisions)
    accuracy, cost = _report(network, policy, batches, shape, times, channels_last)
    if json_file is not None:
        _write(json_file, accuracy, cost, policy, model, data, next(filter(None, (policy_file, packed, checkpoint)), None))
    if corruptions is not None:
        _report_corruptions(network, batches, corruptions, seed)


def _policy(policy_file: Path | None, packed: Path | None, checkpoint: Path | None) -> Policy | None:
    """The policy of what is evaluated, None in float or where bits depend on the image; read before anything else is loaded."""
    from bitscape.dynamic.storage import folder_policy

    if policy_file is not None:
        return Policy.load(policy_file)
    if packed is not None:
        return packed_policy(packed)
    return None if checkpoint is None else folder_policy(checkpoint)


def _undecided(decisions: str) -> BitscapeError:
    return BitscapeError(
        f"--decisions {decisions}: the network does not decide on bits; give a --checkpoint of `bitscape train --dynamic`"
    )


def _set_decisions(network: "nn.Module", decisions: str | None) -> None:
    from bitscape.dynamic import DynamicNetwork

    if decisions is None:
        return
    if not isinstance(network, DynamicNetwork):
        raise _undecided(decisions)
    network.decisions = "per_image" if decisions == "per-image" else "per_batch"


def _report(
    network: "nn.Module",
    policy: Policy | None,
    batches: "Batches",
    shape: tuple[int, ...],
    times: "LatencyTable | None",
    channels_last: bool | None,
) -> "tuple[Evaluation, Mapping[str, float]]":
    """Print accuracy and costs, and return them."""
    from bitscape.cost.latency import with_latency
    from bitscape.cost.policy_cost import policy_cost
    from bitscape.data.epochs import first_of
    from bitscape.engine.spending import noting_spent
    from bitscape.verbs.arguments import stated_task

    timed = None
    if times is not None and policy is not None:  # a table that does not fit is refused before the images are classified
        timed = with_latency(measure_network(network, shape), times)
        policy_cost(timed, policy)
    task = stated_task(network, first_of(batches), "classes")  # its pass is not to be noted
    with noting_spent(network) as noted:
        accuracy = bs.evaluate(network, batches, task=task, channels_last=channels_last)
    top1, top5, loss = (accuracy.numbers[name] for name in ("top1", "top5", "loss"))
    click.echo(f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}, {accuracy.samples} images")
    if print_spent(network, noted):
        return accuracy, {}
    profile = timed or measure_network(network, shape)
    if policy is None:
        parameters = sum(parameter.numel() for parameter in network.parameters())
        click.echo(f"float: {amount(profile.total_macs)} MACs an image, {amount(4 * parameters, 'B')} of parameters")
        return accuracy, {"macs": profile.total_macs, "parameter_bytes": 4 * parameters}
    click.echo()
    print_within_budget(policy, profile)
    if times is not None:
        click.echo(f"latency_ms: {times.where}")
    return accuracy, policy_cost(profile, policy)


def _write(
    path: Path,
    accuracy: "Evaluation",
    cost: Mapping[str, float],
    policy: Policy | None,
    model: str,
    data: str,
    bits_from: Path | None,
) -> None:
    from bitscape.report.differences import share_interval
    from bitscape.report.documents import FORMAT, EvaluationDocument, save_evaluation
    from bitscape.report.policies import method_of

    document = EvaluationDocument(
        format=FORMAT,
        tool=f"bitscape {__version__}",
        evaluated="float" if bits_from is None else bits_from.name,
        model=model,
        data=data,
        metric="top-1 %",
        value=accuracy.value,
        others={"top-5 %": accuracy.numbers["top5"], "loss": accuracy.numbers["loss"]},
        samples=accuracy.samples,
        cost=dict(cost),
        fingerprint=None if policy is None else policy.fingerprint,
        interval=share_interval(accuracy.value, accuracy.samples),
        method=None if policy is None else method_of(policy),
        bits={} if policy is None else {name: str(bits) for name, bits in policy.layers.items()},
    )
    save_evaluation(document, path)
    click.echo(f"figures: {path}")


def _report_corruptions(network: "nn.Module", batches: "Batches", file: Path, seed: int) -> None:
    from bitscape.engine.quality_table import quality_table
    from bitscape.files import write_atomic
    from bitscape.report.documents import save_quality
    from bitscape.report.heat_map import heat_map

    table = quality_table(network, batches, seed=seed)
    cells = file.with_suffix(".json")
    file.unlink(missing_ok=True)  # never beside the cells of another table
    save_quality(table, cells)
    write_atomic(file, heat_map(table))
    _print_quality("top-1, %, at severity", table, lambda cell: cell.top1)
    if table.clean.bits is not None:
        _print_quality("mean activation bits at severity", table, lambda cell: cell.bits)
    click.echo(f"\nheat map: {file}; its cells: {cells}")


def _print_quality(title: str, table: "QualityTable", value: "Callable[[Cell], float | None]") -> None:
    """Print a line for each corruption; the last column is the mean over the severities."""
    rows = [[table.clean.corruption, *("" for _ in table.severities), f"{value(table.clean):.2f}"]]
    for name in table.corruptions:
        values = [number for cell in table.cells if cell.corruption == name and (number := value(cell)) is not None]
        rows.append([name, *(f"{number:.2f}" for number in (*values, sum(values) / len(values)))])
    click.echo()
    print_table([title, *map(str, table.severities), "mean"], rows)
