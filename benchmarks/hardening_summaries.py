"""Tables of what damaged files, kills and full disks did: outcomes counted, none of them bad."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.summaries_common import Run

Columns = Mapping[str, Callable[[Run], str]]
_READ: Columns = {
    "file": lambda run: run["variant"],
    "damaged files": lambda run: f"{run['extra']['cases']:,}",
    "refused by name": lambda run: f"{run['extra']['refused']:,}",
    "refused when used": lambda run: f"{run['extra']['refused_when_used']:,}",
    "read, and valid": lambda run: f"{run['extra']['loaded']:,}",
    "bad": lambda run: str(run["extra"]["bad"]),
    "slowest, s": lambda run: f"{run['extra']['slowest_s']:.2f}",
    "largest process, MiB": lambda run: f"{run['extra']['peak_mib']:.0f}",
    "all, s": lambda run: f"{run['extra']['wall_s']:.0f}",
}
_HOSTILE: Columns = {
    "file": lambda run: run["variant"],
    "hostile files": lambda run: str(run["extra"]["cases"]),
    "refused by name": lambda run: str(run["extra"]["refused"]),
    "refused when used": lambda run: str(run["extra"]["refused_when_used"]),
    "read, and valid": lambda run: str(run["extra"]["loaded"]),
    "bad": lambda run: str(run["extra"]["bad"]),
    "slowest, CPU s": lambda run: f"{run['extra']['slowest_s']:.2f}",
    "most memory above the start, MiB": lambda run: f"{run['extra']['above_start_mib']:.0f}",
}
_KILLED: Columns = {
    "command": lambda run: run["variant"],
    "kills": lambda run: str(run["extra"]["kills"]),
    "while writing": lambda run: str(run["extra"]["while_writing"]),
    "bad": lambda run: str(run["extra"]["bad"]),
    "temporary files left": lambda run: str(run["extra"]["left_files"]),
    "one run, s": lambda run: f"{run['extra']['whole_s']:.0f}",
}
_WRITTEN: Columns = {
    "written": lambda run: run["variant"],
    "disk": lambda run: run["settings"]["condition"],
    "exit code": lambda run: str(run["extra"]["exit"]),
    "bad": lambda run: str(run["extra"]["bad"]),
    "last line": lambda run: f"`{run['extra']['message']}`",
}
_PARTS: Mapping[str, tuple[str, Columns]] = {
    "fuzz": ("Damaged files, read", _READ),
    "hostile": ("Files made to take memory or time, read", _HOSTILE),
    "kill": ("Commands killed, and run again: files the same to the last byte", _KILLED),
    "write": ("Disks that do not take what is written: the file is named, the old one stays", _WRITTEN),
}


def hardening(runs: Sequence[Run]) -> str:
    """A table for damaged files, one for kills, one for disks."""
    parts = []
    for method, (title, columns) in _PARTS.items():
        rows = [[cell(run) for cell in columns.values()] for run in runs if run["method"] == method]
        if rows:
            lines = [list(columns), ["---"] * len(columns), *rows]
            parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)
