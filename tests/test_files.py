import errno
import hashlib
import json
import os

import pytest

from bitscape.files import UNSEALED, check_seal, json_text, parse_json, sealed, write_atomic


def test_the_content_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "policy.json"
    write_atomic(path, "old")
    write_atomic(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named_itself(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "policy.json", tmp_path / "absent" / "policy.json"):
        with pytest.raises(OSError) as error:
            write_atomic(path, "new")
        assert error.value.filename == str(path)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_limit_on_the_size_of_files_keeps_the_old_file_and_names_it(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "policy.json"
    write_atomic(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            write_atomic(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.value.filename, error.value.errno) == (str(path), errno.EFBIG)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def unsealed() -> bytes:
    """The start of a safetensors file: a JSON text within a JSON text, then bytes."""
    text = json.dumps({"__metadata__": {"bitscape": json.dumps({"format": 1, "checksum": UNSEALED, "layers": {}})}})
    return text.encode() + bytes(range(64))


def test_a_seal_is_broken_by_every_single_bit():
    whole = sealed(unsealed())
    check_seal(whole)
    assert len(whole) == len(unsealed()) and UNSEALED.encode() not in whole
    for at in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"it has no checksum|damaged: its checksum is"):
            check_seal(bytes(changed))


def test_a_seal_is_the_sha256_of_the_file_with_zeros_in_its_place():
    checksum = hashlib.sha256(unsealed()).hexdigest()[:16]
    assert sealed(unsealed()) == unsealed().replace(b"0" * 16, checksum.encode())
    with pytest.raises(ValueError, match="no checksum"):
        check_seal(b"{}")


def test_json_reads_back_and_has_an_entry_a_line():
    document = {"format": 1, "sizes": [1, 2], "layers": {"größer": {"a": 1}, "b": None}, "empty": {}}
    text = json_text(document)
    assert text.splitlines() == [
        "{",
        '  "format": 1,',
        '  "sizes": [1, 2],',
        '  "layers": {',
        f'    {json.dumps("größer")}: {{"a": 1}},',
        '    "b": null',
        "  },",
        '  "empty": {}',
        "}",
    ]
    assert parse_json(text.encode()) == document
    assert parse_json(b"\xef\xbb\xbf" + text.encode()) == document


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "not readable as JSON .*; is the file complete"),
        (b"\x80", "not readable"),
        (b"[" * 100_000, "not readable"),
        (b'{"b": {"a": 1, "a": 1}}', "'a' stands twice"),
        (b'{"a": NaN}', "NaN is no allowed number"),
        (b'{"a": "\\ud83d"}', "not readable as JSON .*surrogates not allowed"),
        (b"1" * 5000, "1{40}.* is no allowed number; allowed are finite numbers, whole ones of up to 64 bits"),
        (b"[-Infinity]", "-Infinity is no allowed number"),
    ],
)
def test_json_is_read_strictly(content, message):
    with pytest.raises(ValueError, match=message):
        parse_json(content)
