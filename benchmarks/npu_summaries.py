"""Tables of networks on other hardware: `ethos-u`, what they take on an NPU, `tflite`, files in LiteRT, and `fpga`, in hls4ml."""

from collections.abc import Sequence

from benchmarks.summaries_common import Run, groups


def ethos_u(runs: Sequence[Run]) -> str:
    """A table for each network and NPU: figures of the compiler, of 8 bits in percent, the metric, and how far the table was off."""
    parts = []
    for (network, accelerator), group in groups(runs, ("network", "settings.accelerator")).items():
        eight = next((run for run in group if run["variant"] == "w8"), None)
        first = group[0]
        head = f"**{network} on {accelerator}**, {first['metric']} on {first['test_images']} images, float {first['float_value']:.2f}"
        rows = [["weights", "ms", "of w8", "flash", "of w8", "SRAM", "metric", "table off: ms", "flash", "on the CPU"]]
        rows += [_taken(run, eight) for run in group]
        parts += [f"{head}; time and bytes by the compiler's performance model, not measured on silicon", _table(rows)]
    return "\n\n".join(parts)


def _taken(run: Run, eight: Run | None) -> list[str]:
    compiled, predicted = run["extra"]["compiled"], run["extra"].get("predicted", {})
    base = None if eight is None else eight["extra"]["compiled"]
    return [
        run["variant"],
        f"{compiled['latency_ms']:.3f}",
        _share(compiled, base, "latency_ms"),
        f"{compiled['flash_bytes'] / 1000:,.0f} kB",
        _share(compiled, base, "flash_bytes"),
        f"{compiled['sram_bytes'] / 1000:,.0f} kB",
        f"{run['value']:.2f}",
        *(_off(compiled, predicted, kind) for kind in ("latency_ms", "flash_bytes")),
        ", ".join(sorted(set(compiled["on_cpu"]))) or "-",
    ]


def _share(compiled: Run, base: Run | None, kind: str) -> str:
    return "-" if base is None else f"{100 * compiled[kind] / base[kind]:.0f} %"


def _off(compiled: Run, predicted: Run, kind: str) -> str:
    return f"{100 * (predicted[kind] / compiled[kind] - 1):+.1f} %" if predicted else "-"


def tflite(runs: Sequence[Run]) -> str:
    """One row for each file."""
    rows = [["network", "weights", "file", "codes that differ", "in fixed point", "off by one", "float", "simulated", "LiteRT", "CPU ms"]]
    return _table([*rows, *map(_file, runs)], left=2)


def _file(run: Run) -> list[str]:
    extra = run["extra"]
    if "refused" in extra:
        return [run["network"], run["variant"], "refused", *["-"] * 7]
    fixed = extra["fixed_point"]
    share = f"{100 * fixed['differing'] / fixed['codes']:.2g} %" if fixed["codes"] else "-"
    metric = ["-"] * 3 if "value" not in run else [f"{value:.2f}" for value in (run["float_value"], extra["simulated"], run["value"])]
    codes = f"{extra['differing']} of {extra['codes'] / 1e6:.3g} M"
    return [run["network"], run["variant"], f"{extra['bytes'] / 1000:,.0f} kB", codes, f"{fixed['layers']} layers", share, *metric,
            f"{extra['cpu_ms']:.3g}"]  # fmt: skip


def fpga(runs: Sequence[Run]) -> str:
    """One row for each network in hardware."""
    rows = [["network", "BitOps", "bits of weights/inputs", "images whose outputs differ", "float", "simulated", "hls4ml"]]
    return _table([*rows, *map(_hardware, runs)], left=3)


def _hardware(run: Run) -> list[str]:
    extra, bits = run["extra"], ", ".join("/".join(map(str, pair)) for pair in run["policy"].values())
    metric = [f"{value:.2f}" for value in (run["float_value"], extra["simulated"], run["value"])]
    return [run["network"], run["variant"], bits, f"{extra['differing_images']} of {run['test_images']}", *metric]


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    line = [*["---"] * left, *["---:"] * (len(rows[0]) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], line, *rows[1:]))
