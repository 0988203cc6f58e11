"""Damage to files, drawn from a seed: to their bytes, to JSON in them, to the header and the tensors of safetensors."""

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

BIG, LONG, DEEP = 10**400, 100_000, 50_000
"""A number that no float holds, length of a name that no file system takes, levels of brackets that no recursion survives."""
FITTED_BYTES = 2**20
"""Tensors that claim more do not get it."""
NUMBERS = (0, 1, 2, -1, 8, 9, 2**31, 2**63, -(2**63) - 1, BIG, 0.0, 8.0, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf)
TEXTS = ("", "../../../tmp/outside", "/etc/passwd", "a\0b", "x" * LONG, "\ud800", "8", "8/8", "lsq", "channel", "F32", "null", ".", "a.b")
EDGES = (0, 1, 2, 7, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
PATTERNS = (b"\0", b"\xff", struct.pack("<f", math.nan), struct.pack("<f", -math.inf), struct.pack("<f", 3e38), struct.pack("<f", -1.0))


@dataclass(frozen=True)
class Raw:
    """Text that is written into JSON as it stands."""

    text: str


@dataclass
class Object:
    """A JSON object as pairs, so that a name can stand twice."""

    pairs: list[tuple[str, Any]] = field(default_factory=list)


def damaged_bytes(content: bytes, rng: Random) -> bytes:
    """Bits flipped, bytes overwritten, removed, inserted or doubled, integers set to an extreme; once to three times."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_BYTES)(bytearray(content), rng)
    return content


def damaged_json(content: bytes, rng: Random) -> bytes:
    """The JSON document with one to three entries changed, removed, added, renamed or doubled."""
    return written(_changed(json.loads(content, object_pairs_hook=Object), rng)).encode("utf-8", "surrogatepass")


def damaged_lines(content: bytes, rng: Random) -> bytes:
    """One of the lines, each a JSON document, changed."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    return b"\n".join([*lines[:at], damaged_json(lines[at], rng), *lines[at + 1 :]])


def damaged_archive(content: bytes, rng: Random) -> bytes:
    """A zip file with one of its files damaged, whose checksums are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, damaged_bytes(part, rng) if name == chosen else part)
    return made.getvalue()


def written(value: Any) -> str:
    """JSON text of a value that may hold `Raw` and `Object`."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Object):
        return "{" + ", ".join(f"{json.dumps(name)}: {written(inner)}" for name, inner in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    # no integer of Python is written with so many digits
    return f"1{'0' * 5000}" if value is BIG else json.dumps(value)


def damaged_safetensors(content: bytes, rng: Random) -> bytes:
    """The file with its header or its tensors changed; offsets and lengths fit again in most cases."""
    header, data = _opened(content)
    kind = rng.randrange(4)
    if kind == 0:  # any entry, offsets and shapes among them
        return _closed(_changed(header, rng), data)
    notes = next((inner for name, inner in header.pairs if name == "__metadata__"), None)
    if kind == 1 and notes is not None:  # the JSON in the metadata
        at = rng.randrange(len(notes.pairs))
        name, text = notes.pairs[at]
        notes.pairs[at] = (name, damaged_json(text.encode(), rng).decode("utf-8", "replace"))
        return _closed(header, data)
    return _with_tensors(header, data, _STRUCTURE + _VALUES, rng)


def damaged_structure(content: bytes, rng: Random) -> bytes:
    """The file with other names, types, shapes or numbers of tensors; those that stay keep their values."""
    return _with_tensors(*_opened(content), _STRUCTURE, rng)


def metadata_only(content: bytes, rng: Random) -> bytes:
    """The file with changed JSON in its metadata; the tensors stay."""
    header, data = _opened(content)
    notes = next(inner for name, inner in header.pairs if name == "__metadata__")
    notes.pairs = [(name, damaged_json(text.encode(), rng).decode("utf-8", "replace")) for name, text in notes.pairs]
    return _closed(header, data)


def _with_tensors(header: Object, data: bytes, kinds: "Sequence[Callable[[list[_Tensor], Random], None]]", rng: Random) -> bytes:
    notes = [pair for pair in header.pairs if pair[0] == "__metadata__"]
    parts = [_Tensor.of(name, about, data) for name, about in header.pairs if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(kinds)(parts, rng)
    return _closed(Object([*notes, *_headers(parts)]), b"".join(part.data for part in parts))


@dataclass
class _Tensor:
    name: str
    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, name: str, about: Object, data: bytes) -> "_Tensor":
        entries = dict(about.pairs)
        begin, end = entries["data_offsets"]
        return cls(name, entries["dtype"], list(entries["shape"]), data[begin:end])


def _headers(parts: list[_Tensor]) -> list[tuple[str, Any]]:
    found, begin = [], 0
    for part in parts:
        offsets = [begin, begin + len(part.data)]
        found.append((part.name, Object([("dtype", part.dtype), ("shape", part.shape), ("data_offsets", offsets)])))
        begin = offsets[1]
    return found


def _opened(content: bytes) -> tuple[Object, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length], object_pairs_hook=Object), content[8 + length :]


def _closed(header: Any, data: bytes) -> bytes:
    text = written(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _span(content: bytearray, rng: Random) -> slice:
    at = rng.randrange(len(content) + 1)
    return slice(at, at + rng.choice((1, 2, 4, 8, 16, 64, 512, 4096)))


def _flip(content: bytearray, rng: Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _overwrite(content: bytearray, rng: Random) -> bytes:
    span = _span(content, rng)
    length = len(content[span])
    content[span] = rng.randbytes(length) if rng.random() < 0.5 else (rng.choice(PATTERNS) * length)[:length]
    return bytes(content)


def _truncate(content: bytearray, rng: Random) -> bytes:
    return bytes(content[: rng.randrange(len(content) + 1)])


def _remove(content: bytearray, rng: Random) -> bytes:
    del content[_span(content, rng)]
    return bytes(content)


def _insert(content: bytearray, rng: Random) -> bytes:
    span = _span(content, rng)
    content[span.start : span.start] = rng.randbytes(span.stop - span.start)
    return bytes(content)


def _double(content: bytearray, rng: Random) -> bytes:
    block = content[_span(content, rng)]
    at = rng.randrange(len(content) + 1)
    content[at:at] = block * rng.choice((1, 1, 2, 20))
    return bytes(content)


def _integer(content: bytearray, rng: Random) -> bytes:
    """Lengths, counts and offsets of binary formats are integers of 2, 4 or 8 bytes; the header's length of safetensors comes first."""
    width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    at = 0 if rng.random() < 0.2 else rng.randrange(max(1, len(content) - width))
    number = rng.choice(EDGES) % 2 ** (8 * width)
    content[at : at + width] = number.to_bytes(width, "little" if order == "little" else "big")
    return bytes(content)


_BYTES: tuple[Callable[[bytearray, Random], bytes], ...] = (_flip, _flip, _overwrite, _truncate, _remove, _insert, _double, _integer)


def _changed(document: Any, rng: Random) -> Any:
    root = Object([("", document)])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        containers = _containers(root)
        inner = rng.choice(containers)
        rng.choice(_ENTRIES)(inner, rng)
        if not root.pairs:
            return Raw("")
    return root.pairs[0][1]


def _containers(value: Any) -> list[Any]:
    """All objects and lists that hold something, from the outside in."""
    inner = [each for _, each in value.pairs] if isinstance(value, Object) else value if isinstance(value, list) else []
    return ([value] if inner else []) + [found for each in inner for found in _containers(each)]


def _entries(of: Any) -> list[Any]:
    entries: list[Any] = of.pairs if isinstance(of, Object) else of
    return entries


def _any_value(rng: Random) -> Any:
    chosen = rng.randrange(5)
    if chosen == 0:
        return rng.choice((None, True, False, [], [[]], Object(), [0, -3, 2**40], Object([("a", 1)])))
    if chosen == 1:
        return rng.choice(TEXTS)
    if chosen == 2:
        return Raw(rng.choice(("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "1e999", "-1e999", "1" * 5000, "'a'", "")))
    return rng.choice(NUMBERS)


def _replace(of: Any, rng: Random) -> None:
    entries = _entries(of)
    at = rng.randrange(len(entries))
    value = _any_value(rng)
    old = entries[at][1] if isinstance(of, Object) else entries[at]
    if rng.random() < 0.3:  # near misses of the right type
        value = _near(old, rng)
    entries[at] = (entries[at][0], value) if isinstance(of, Object) else value


def _near(old: Any, rng: Random) -> Any:
    if isinstance(old, bool) or old is None:
        return rng.choice((0, 1, not old))
    if isinstance(old, int):
        return rng.choice((old + 1, old - 1, -old, 2 * old, Raw(f"{old}.0"), f"{old}", [old], old * 2**40)) if old is not BIG else -1
    if isinstance(old, float):
        return rng.choice((-old, old * 1e300, round(old) if math.isfinite(old) else 0, str(old)))
    if isinstance(old, str):
        return rng.choice((old.upper(), old[1:], old + " ", old + "\0", [old], f"../{old}"))
    return rng.choice(([old], [old, old], Object([("a", old)])))


def _remove_entry(of: Any, rng: Random) -> None:
    entries = _entries(of)
    del entries[rng.randrange(len(entries))]


def _add_entry(of: Any, rng: Random) -> None:
    value = _any_value(rng)
    name = rng.choice((*TEXTS, "extra", "layers", "format", "weight"))
    _entries(of).append((name, value) if isinstance(of, Object) else value)


def _double_entry(of: Any, rng: Random) -> None:
    entries = _entries(of)
    entries.insert(rng.randrange(len(entries) + 1), rng.choice(entries))


def _rename(of: Any, rng: Random) -> None:
    if not isinstance(of, Object):
        return _replace(of, rng)
    at = rng.randrange(len(of.pairs))
    name, value = of.pairs[at]
    of.pairs[at] = (rng.choice((*TEXTS, name.upper(), f"{name}x", f"../{name}", f"{name}\0", rng.choice(of.pairs)[0])), value)


def _swap(of: Any, rng: Random) -> None:
    """The values of two entries change places."""
    entries = _entries(of)
    one, other = rng.randrange(len(entries)), rng.randrange(len(entries))
    if isinstance(of, Object):
        (first, a), (second, b) = of.pairs[one], of.pairs[other]
        of.pairs[one], of.pairs[other] = (first, b), (second, a)
    else:
        entries[one], entries[other] = entries[other], entries[one]


_REPLACE = (_replace, _replace, _replace)  # the most frequent
_ENTRIES: tuple[Callable[[Any, Random], None], ...] = (*_REPLACE, _remove_entry, _add_entry, _double_entry, _rename, _swap)


def _retype(parts: list[_Tensor], rng: Random) -> None:
    """Another type; half the time with as many bytes as it needs."""
    part = rng.choice(parts)
    part.dtype = rng.choice([dtype for dtype in DTYPES if dtype != part.dtype])
    length = math.prod(part.shape) * DTYPES[part.dtype]
    if rng.random() < 0.5 and length <= FITTED_BYTES:
        part.data = part.data[:1] * length


def _reshape(parts: list[_Tensor], rng: Random) -> None:
    part = rng.choice(parts)
    shapes = [part.shape[::-1], [math.prod(part.shape)], [*part.shape, 1], [1, *part.shape], [], [0], [-1], [2**40, 2**40], [2**63]]
    part.shape = rng.choice(shapes)


def _cut(parts: list[_Tensor], rng: Random) -> None:
    """One row less, or one more."""
    part = rng.choice(parts)
    if part.shape and part.shape[0]:
        row, more = len(part.data) // part.shape[0], rng.random() < 0.5
        part.data = part.data + part.data[:row] if more else part.data[row:]
        part.shape = [part.shape[0] + (1 if more else -1), *part.shape[1:]]


def _refill(parts: list[_Tensor], rng: Random) -> None:
    part = rng.choice(parts)
    length = len(part.data)
    part.data = rng.randbytes(length) if rng.random() < 0.4 else (rng.choice(PATTERNS) * length)[:length]


def _drop(parts: list[_Tensor], rng: Random) -> None:
    if len(parts) > 1:
        del parts[rng.randrange(len(parts))]


def _again(parts: list[_Tensor], rng: Random) -> None:
    part = rng.choice(parts)
    parts.append(_Tensor(rng.choice((*TEXTS, f"{part.name}x", part.name)), part.dtype, part.shape, part.data))


def _exchange(parts: list[_Tensor], rng: Random) -> None:
    one, other = rng.choice(parts), rng.choice(parts)
    one.name, other.name = other.name, one.name


_STRUCTURE: tuple[Callable[[list[_Tensor], Random], None], ...] = (_retype, _reshape, _cut, _drop, _again)
_VALUES: tuple[Callable[[list[_Tensor], Random], None], ...] = (_refill, _refill, _exchange)
