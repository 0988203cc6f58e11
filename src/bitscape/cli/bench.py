"""`bitscape bench`: exported files timed beside one another, and beside float and another tool's int8."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitscape.cli.network import ImageSettings, load_images, load_network, normalized_images
from bitscape.cli.npu import VELA, accelerator_option, bench_vela
from bitscape.cli.options import COUNT, MOST, all_of, image_options, seed_option
from bitscape.cli.output import amount, print_table, short_names
from bitscape.cli.parsing import is_whole, parse_normalization, parse_shape
from bitscape.cli.paths import FILE, MODEL, SOURCE, OutputFile
from bitscape.errors import BitscapeError
from bitscape.files import write_atomic
from bitscape.folders import scratch_folder
from bitscape.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitscape.measure.bench import Contender, Measured

RUNTIME_NAMES = ("onnxruntime", "openvino")
IMAGES = 128
"""Images that calibrate, where nobody says how many."""
threads_option = click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 1024), help="Threads of the runtime.")
RESULTS = (("top-1", "top1"), ("agrees", "agreement"), ("off", "difference"))
"""Columns of what files compute of test images, and their keys in the figures."""
_network_options = all_of(
    click.option("--model", type=MODEL, metavar="NAME", help="Also time this network in float, and as ONNX Runtime's own int8."),
    click.option("--weights", type=FILE, metavar="FILE", help="Its float weights, .safetensors or .pt. Default: as built."),
    click.option("--data", type=SOURCE, metavar="SOURCE", help="Images: digits, a .parquet or .npz file, a folder, hf:name."),
    click.option("--split", metavar="NAME", help="Split of --data for --accuracy.  [default: test, or val]"),
    click.option(
        "--calibration",
        type=SOURCE,
        metavar="SOURCE",
        help="Images that set the ranges of ONNX Runtime's int8.  [default: --data, train]",
    ),
    click.option("--images", type=click.IntRange(2, MOST), help=f"Images drawn for it.  [default: {IMAGES}]"),
)


@click.command()
@click.argument("files", nargs=-1, type=FILE, metavar="FILE...")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice((*RUNTIME_NAMES, VELA)),
    help="Repeatable.  [default: by the file's suffix]",
)
@accelerator_option
@click.option("--batch-size", "batch_sizes", default="1", show_default=True, metavar="N,N", help="Images at once, several to time each.")
@threads_option
@click.option("--rounds", default=15, show_default=True, type=COUNT, help="Visits of each file; the median counts.")
@_network_options
@image_options
@click.option("--input-shape", metavar="CxHxW", help="Shape of one image.  [default: of the file or --data]")
@click.option("--accuracy", type=COUNT, metavar="N", help="Also compare outputs on N images of --data.")
@click.option("--json", "json_file", type=OutputFile(".json"), metavar="FILE", help="Where the figures go, .json.")
@seed_option
def bench(
    files: tuple[Path, ...], runtimes: tuple[str, ...], accelerator: str | None, threads: int, json_file: Path | None, **given: Any
) -> None:
    """Time exported files in a runtime on this machine's CPU, beside one another.

    All files are visited in turn, so that a change of the machine's speed meets all. With --model also the float network, and the int8
    file that ONNX Runtime's own post-training quantization makes of it.

    With --runtime vela nothing runs: Arm's compiler tells what .tflite files take on an Ethos-U NPU, by its performance model: time,
    flash, SRAM, and operators that are left to the CPU.

    \b
    Example:
      bitscape bench resnet18.onnx other.onnx --batch-size 1,16
      bitscape bench w8.tflite mixed.tflite --runtime vela --accelerator ethos-u55-128
      bitscape bench resnet18.onnx resnet18.xml --model timm:resnet18 \\
        --weights resnet18.safetensors --data val/ --input-size 224 \\
        --normalize imagenet --accuracy 1000
    """
    from bitscape.measure.bench import figures, measure_files

    if VELA in runtimes or accelerator is not None:
        bench_vela(files, runtimes, accelerator, threads, json_file, given)
        return
    if not files and given["model"] is None:
        raise BitscapeError("FILE is missing; give exported files, or --model to time a float network")
    if given["accuracy"] is not None and given["data"] is None:
        raise BitscapeError("--accuracy needs --data: the images to classify")
    batch_sizes, input_shape = _batch_sizes(given["batch_sizes"]), parse_shape(given["input_shape"])
    settings = ImageSettings.checked(given["input_size"], given["normalize"], given["data"], given["calibration"])
    with scratch_folder() as folder:
        network = None if given["model"] is None else load_network(given["model"], given["weights"], "cpu", given["seed"])
        settings = settings if network is None else settings.of_model(network)
        test, labels = _test_images(given, settings)
        images = None if network is None else _calibration_images(given, settings, network)
        shape = _image_shape(files, input_shape, images if test is None else test)
        if network is not None and images is None:
            images = random_images(given["images"] or IMAGES, shape, given["seed"])
        contenders = _contenders(files, runtimes, threads, network, images, folder)
        _check_batches(contenders, batch_sizes)
        measured = measure_files(contenders, shape, batch_sizes, rounds=given["rounds"], test=None if test is None else test.numpy())
        right = None if labels is None else labels.numpy()
        rows = [row for size in batch_sizes for row in figures(measured, size, 0 if test is None else len(test), right)]
    if json_file is not None:
        _write(json_file, rows, threads, given["rounds"], shape)
    _print(rows, measured, threads, given["rounds"])
    if test is not None:
        compared = f"top-1 and agreement with {rows[0]['file']}" if "agreement" in rows[0] else f"difference from {rows[0]['file']}"
        split = f", split {given['split']}" if given["split"] else ""  # else the log says which one was taken
        click.echo(f"{compared} on {len(test)} images of {given['data']}{split}")
    if json_file is not None:
        click.echo(f"figures: {json_file}")


def random_images(images: int, shape: Sequence[int], seed: int) -> "Tensor":
    """Normal random images (n, c, h, w): as good as any for timing."""
    import torch

    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))


def _batch_sizes(text: str) -> list[int]:
    sizes = [size.strip() for size in text.split(",")]
    if not all(is_whole(size) and 1 <= int(size) <= MOST for size in sizes):
        raise BitscapeError(f"--batch-size {text!r}: write whole numbers from 1 to {MOST}, e.g. 1,16")
    return list(dict.fromkeys(map(int, sizes)))


def _test_images(given: dict[str, Any], settings: ImageSettings) -> "tuple[Tensor | None, Tensor | None]":
    """Images of --accuracy, normalized, and their labels, where there are any."""
    if given["accuracy"] is None:
        return None, None
    from bitscape.data.splits import EVALUATION

    drawn = load_images(given["data"], given["split"] or EVALUATION, settings, limit=given["accuracy"], seed=given["seed"])
    return parse_normalization(settings.normalize, given["data"]).apply(drawn.images), drawn.labels


def _calibration_images(given: dict[str, Any], settings: ImageSettings, network: "nn.Module") -> "Tensor | None":
    """The images that calibrate the network, where options name them."""
    source = given["calibration"] or given["data"]
    return None if source is None else normalized_images(source, given["images"], settings, given["seed"], network, usual=IMAGES)


def _image_shape(files: Sequence[Path], given: tuple[int, ...] | None, images: "Tensor | None") -> tuple[int, ...]:
    """Shape of one image: as given, of the data, or of the first file in which it is fixed. Raises BitscapeError unless all agree."""
    from bitscape.measure.bench import input_shape

    shapes = {file: input_shape(file)[1:] for file in files}
    known = [shape for shape in shapes.values() if shape and None not in shape]
    shape = given or (tuple(images.shape[1:]) if images is not None else next(iter(known), None))
    if shape is None:
        raise BitscapeError("--input-shape is missing, and no file tells it; write e.g. --input-shape 3x224x224")
    for file, own in shapes.items():
        if len(own) != len(shape) or any(size not in (None, wanted) for size, wanted in zip(own, shape, strict=True)):
            raise BitscapeError(f"{file} takes images of {_text(own)}, not {_text(shape)}; give --input-shape, --data or files that agree")
    return shape  # type: ignore[return-value]  # without None


def _text(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _contenders(
    files: Sequence[Path], runtimes: Sequence[str], threads: int, network: "nn.Module | None", images: "Tensor | None", folder: Path
) -> "list[Contender]":
    from bitscape.measure.baselines import save_float_onnx, save_onnxruntime_int8
    from bitscape.measure.bench import OPENVINO_SUFFIX, Contender
    from bitscape.runtimes.sessions import RUNTIMES

    def contender(name: str, path: Path, runtime: str) -> Contender:
        return Contender(name=name, path=path, runtime=RUNTIMES[runtime](threads=threads))

    wanted = {file: runtimes or (RUNTIME_NAMES[file.suffix == OPENVINO_SUFFIX],) for file in files}
    exported = [contender(str(file), file, runtime) for file, names in wanted.items() for runtime in names]
    if network is None or images is None:
        return exported
    plain = save_float_onnx(network, folder / "float.onnx", images)
    int8 = save_onnxruntime_int8(plain, folder / "int8.onnx", images)
    used = dict.fromkeys([*runtimes, *(name for names in wanted.values() for name in names)]) or (RUNTIME_NAMES[0],)
    floats = [contender("float", plain, name) for name in used]
    return [*floats, *(contender("onnxruntime's int8", int8, name) for name in runtimes or RUNTIME_NAMES[:1]), *exported]


def _check_batches(contenders: "Sequence[Contender]", batch_sizes: Sequence[int]) -> None:
    from bitscape.measure.bench import input_shape

    for contender in contenders:
        fixed = input_shape(contender.path)[0]
        if fixed is not None and batch_sizes != [fixed]:
            raise BitscapeError(
                f"{contender.name} takes batches of {fixed} alone; give --batch-size {fixed}, or export with a free batch size"
            )


def _print(rows: Sequence[dict[str, Any]], measured: "Sequence[Measured]", threads: int, rounds: int) -> None:
    from bitscape.report.records import environment

    first, names = rows[0], short_names([row["file"] for row in rows])
    columns = ["file", "runtime", "batch", "size", "float layers", "CPU ms", "+-", "wall ms", "images/s", f"x {names[first['file']]}"]
    columns += [name for name, key in RESULTS if any(key in row for row in rows)]
    results = [key for _, key in RESULTS if any(key in row for row in rows)]
    print_table(columns, [_texts(row, names, results) for row in rows], left=2)
    by = "CPU time" if threads == 1 else "wall-clock time"
    by += ", within each runtime" if any(row["runtime"] != first["runtime"] for row in rows) else ""
    click.echo(f"\n{environment()['cpu']}, threads: {threads}; median of {rounds} rounds, each visiting every file; x: by {by}")


def _texts(row: dict[str, Any], names: Mapping[str, str], results: Sequence[str]) -> list[str]:
    texts = [names[row["file"]], row["runtime"], str(row["batch_size"]), amount(row["file_bytes"], "B"), str(row["float_layers"])]
    texts += [f"{row['cpu_ms']:.4g}", f"{100 * row['cpu_spread']:.0f} %", f"{row['wall_ms']:.4g}"]
    texts += [f"{row['images_per_s']:,.0f}", "" if row["times_faster"] is None else f"{row['times_faster']:.2f}"]
    return texts + [f"{row[key]:.2f} %" if key in row else "" for key in results]


def _write(path: Path, rows: Sequence[dict[str, Any]], threads: int, rounds: int, shape: Sequence[int]) -> None:
    from bitscape.report.records import environment

    document = {
        "format": 1,
        "tool": f"bitscape {__version__}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": environment()["cpu"],
        "threads": threads,
        "rounds": rounds,
        "input_shape": list(shape),
        "rows": list(rows),
    }
    write_atomic(path, json.dumps(document, indent=1) + "\n")
