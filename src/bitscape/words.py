"""Numbers as reports and the command line write them. Imports no torch."""

from collections.abc import Iterable

NONE = "-"
"""Stands where a value is not known."""
NO_BREAK = "\u00a0"
NAMES = {
    "bitops": "BitOps",
    "weight_bytes": "weight bytes",
    "mean_weight_bits": "mean weight bits",
    "mean_activation_bits": "mean activation bits",
    "peak_activation_bytes": "peak activation bytes",
    "latency_ms": "predicted milliseconds",
    "flash_bytes": "predicted flash bytes",
    "sram_bytes": "predicted SRAM bytes",
}
_UNITS = {"bitops": "", "weight_bytes": "B", "peak_activation_bytes": "B", "flash_bytes": "B", "sram_bytes": "B"}
"""Of costs that are written with a prefix."""
_PREFIXES = ("", "k", "M", "G", "T")


def amount(value: float, unit: str = "") -> str:
    """A number with 4 digits and a decimal prefix: 34.71 G, 1.2 MB."""
    step = 0
    while abs(value) >= 999.95 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.4g}{NO_BREAK}{_PREFIXES[step]}{unit}".rstrip()


def cost_text(kind: str, value: float | None) -> str:
    """A cost in its unit; a dash for none."""
    if value is None:
        return NONE
    if kind in _UNITS:
        return amount(value, _UNITS[kind])
    return f"{value:.4g}{NO_BREAK}ms" if kind == "latency_ms" else f"{value:.4g}"


def cost_name(kind: str) -> str:
    """A kind of cost in words."""
    return NAMES.get(kind, kind)


def percent(part: float | None, whole: float | None) -> str:
    """Share of a whole."""
    return NONE if part is None or not whole else f"{100 * part / whole:.1f}{NO_BREAK}%"


def points(value: float | None) -> str:
    """A percentage with two digits after the point."""
    return NONE if value is None else f"{value:.2f}"


def counted(count: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(words: Iterable[object]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last
