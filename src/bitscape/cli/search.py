"""`bitscape search`: from a network, a few images and a budget to a policy file."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

import bitscape as bs
from bitscape.cli.latency import load_target
from bitscape.cli.network import ImageSettings, draw_samples, load_network
from bitscape.cli.options import (
    all_of,
    budget_option,
    channels_last_option,
    data_options,
    image_options,
    keep_float_option,
    latency_option,
    method_options,
    network_options,
    pin_option,
    policy_out_option,
    samples_option,
    seed_option,
    target_option,
    task_option,
)
from bitscape.cli.parsing import make_method, parse_candidates, parse_pins
from bitscape.cli.paths import OUTPUT_FOLDER, OutputFile, keep_locked
from bitscape.cli.tables import gain_text, print_layers, print_loose_caps, print_pins, print_storage, print_within_budget, repairs_text
from bitscape.errors import BitscapeError
from bitscape.folders import CHECKPOINT, POLICY_FILE

if TYPE_CHECKING:
    from bitscape.engine.task import TaskName
    from bitscape.searches.problem import Pick, SearchResult

_search_options = all_of(
    samples_option,
    method_options,
    click.option(
        "--for-training/--no-training",
        default=False,
        help="Whether the network will be trained at its bits afterwards.  [default: no-training]",
    ),
    task_option,
    click.option(
        "--pick",
        type=click.Choice(["best", "least-sharp"]),
        default="best",
        show_default=True,
        help="Of policies with near-equal scores take the best-scored, or the one with the least sharp loss.",
    ),
    click.option(
        "--refine",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Quantize, repair and measure so many policies, and keep the best.",
    ),
)
_outputs = all_of(
    click.option(
        "--folder",
        type=OUTPUT_FOLDER,
        metavar="FOLDER",
        help="Where a search that trains, or --refine, keeps its work and the policy so far; the same command goes on from there.",
    ),
    policy_out_option,
    click.option("--scores", type=OutputFile(".json"), metavar="FILE", help="Where the scores go, .json, for `bitscape solve`."),
)


@click.command()
@network_options
@data_options
@image_options
@budget_option
@_search_options
@latency_option
@target_option
@pin_option
@keep_float_option
@channels_last_option
@seed_option
@_outputs
def search(
    model: str,
    weights: Path | None,
    device: str | None,
    data: str,
    split: str | None,
    input_size: int | None,
    normalize: str | None,
    budgets: tuple[str, ...],
    images: int | None,
    method_name: str,
    settings: tuple[str, ...],
    candidates: str | None,
    for_training: bool,
    task: "TaskName",
    pick: "Pick",
    refine: int,
    latency: Path | None,
    target_name: str | None,
    pins: tuple[str, ...],
    keep_float: tuple[str, ...],
    channels_last: bool | None,
    seed: int,
    folder: Path | None,
    out: Path | None,
    scores: Path | None,
) -> None:
    """Find the bits of each layer within a budget.

    Several budgets hold together; none is ever exceeded. Labels of the images are used for a drop alone.

    \b
    Example:
      bitscape search --model timm:resnet18 --weights resnet18.safetensors \\
        --data photos/ --input-size 224 --normalize imagenet \\
        --budget bitops=0.25x --budget weight_bytes=6MB --out policy.json
    """
    if not budgets:
        raise BitscapeError("--budget is missing; give at least one, e.g. --budget bitops=0.25x or weight_bytes=1.2MB")
    from bitscape.data.splits import TRAINING
    from bitscape.searches.problem import name_of
    from bitscape.verbs.search import check_request

    method, pinned = make_method(method_name, settings), parse_pins(pins)
    offered = None if candidates is None else parse_candidates(candidates)
    if scores is not None and "pick" not in method.options:
        raise BitscapeError(f"--scores: {name_of(method)} has no scores; leave --scores out, or use another method")
    times, target = load_target(latency, target_name)
    check_request(
        method,
        budgets,
        pick=pick,
        refine=refine,
        for_training=for_training,
        folder=folder,
        candidates=offered,
        target=target,
        latency=times,
    )
    seen = ImageSettings.checked(input_size, normalize, data)
    if out is None and scores is None and folder is None:
        click.echo("warning: the policy will be shown and not kept; --out FILE keeps it, --scores FILE keeps the scores", err=True)
    if folder is not None:
        keep_locked(folder)
    network = load_network(model, weights, device, seed)
    seen = seen.of_model(network)
    samples = draw_samples(data, split or TRAINING, images, seen, seed)
    source = {"model": model, "weights": None if weights is None else weights.name, "data": data, "normalize": seen.normalize}
    try:
        result = bs.search(
            network,
            samples,
            budgets,
            method=method,
            task=task,
            count=len(samples),
            candidates=offered,
            pinned=pinned,
            keep_float=keep_float,
            target=target,
            latency=times,
            for_training=for_training,
            pick=pick,
            refine=refine,
            folder=folder,
            channels_last=channels_last,
            seed=seed,
        )
        policy = replace(result.policy, provenance={**result.policy.provenance, **source})
        _keep_and_print(replace(result, policy=policy), len(samples), out, scores)
    except KeyboardInterrupt:
        raise click.Abort(_how_to_go_on(folder)) from None


def _how_to_go_on(folder: Path | None) -> str:
    from bitscape.verbs.evaluations import EVALUATIONS_FILE

    if folder is None or not any((*folder.glob(f"*/{CHECKPOINT}"), *folder.glob(EVALUATIONS_FILE))):
        return ""
    so_far = folder / POLICY_FILE
    found = f"the policy so far is {so_far}; " if so_far.is_file() else ""
    return f"{found}run the same command to go on from {folder}"


def _keep_and_print(result: "SearchResult", images: int, out: Path | None, scores: Path | None) -> None:
    policy, choices = result.policy, result.choices
    if scores is not None and result.scores is not None:  # files first: whatever becomes of the output, the work is kept
        result.scores.save(scores)
    if out is not None:
        policy.save(out)
    print_layers(policy, choices.network)
    click.echo()
    print_within_budget(policy, choices.network, choices.budget)
    print_pins(choices)
    print_loose_caps(policy, choices)
    if drop := policy.provenance.get("drop"):
        click.echo(f"{drop['metric']}: {drop['value']:.4g}, float {drop['float']:.4g}; a drop of {drop['allowed']:g} was allowed")
    if about := policy.provenance.get("refine"):
        click.echo(
            f"refine: divergence {about['first']:.4g} -> {about['divergence']:.4g}, {about['evaluations']} evaluations"
        )
    if choices.latency is not None:
        click.echo(f"latency_ms: {choices.latency.where}")
    print_storage(policy, choices.network, choices.target)
    click.echo(f"\n{policy.provenance['method']}: {images} images, {result.seconds:.1f} s")
    if result.scores is not None:
        click.echo(repairs_text(result.scores))
    click.echo(gain_text(result.gain))
    if scores is not None and result.scores is not None:
        shape = "x".join(map(str, choices.network.input_shape))
        solve = f"bitscape solve --scores {scores} --model {policy.provenance['model']} --input-shape {shape} --budget ..."
        click.echo(f"scores: {scores}; other budgets need no search: {solve}")
    if out is not None:
        click.echo(f"policy: {out}")
