"""The table of several processes beside one: speeds, what is gained, and how busy the machine was."""

from collections.abc import Sequence

from benchmarks.summaries_common import Run, groups


def workers(runs: Sequence[Run]) -> str:
    """A table for each network and number of processes."""
    parts = []
    for (network, _), group in groups(runs, ("network", "settings")).items():
        settings = group[0]["settings"]
        count, on = settings["processes"], "GPUs, one a process" if settings["device"] == "cuda" else "the CPU, one thread a process"
        head = [
            "step",
            "1 process, images/s",
            f"{count} processes, images/s",
            "times faster",
            "in processor time",
            "same bits",
            "cores of others",
        ]
        lines = [head, ["---", *["---:"] * 4, "---", "---:"], *map(_cells, group)]
        title = f"**{network}, batches of {settings['batch_size']} images**; on {on}, {group[0]['extra']['rounds']} starts each"
        parts.append(title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _cells(run: Run) -> list[str]:
    extra = run["extra"]
    speeds = [f"{extra[f'{name}_images_per_s']:.1f}" for name in ("one", "several")]
    gained = [
        f"{extra[name]:.2f} [{extra[f'{name}_range'][0]:.2f}, {extra[f'{name}_range'][1]:.2f}]" for name in ("ratio", "process_ratio")
    ]
    same = "yes" if extra["same_bits"] else "no"
    return [f"{run['method']}, {run['variant']}", *speeds, *gained, same, f"{extra['cores_of_others']:.2f}"]
