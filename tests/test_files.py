import errno
import hashlib
import json
import os
import socket
import struct

import pytest

from bitscape.files import (
    MOST_HEADER_BYTES,
    MOST_JSON_BYTES,
    UNSEALED,
    check_safetensors_header,
    check_seal,
    json_text,
    parse_json,
    read_limited,
    sealed,
    write_atomic,
)


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


def test_a_link_stays_and_the_file_it_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("there/policy.json")
    for content in ("new", "newer"):  # the first through a link to nothing
        write_atomic(link, content)
        assert os.readlink(link) == "there/policy.json"
        assert (tmp_path / "there" / "policy.json").read_text() == content
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["policy.json"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_of_a_file_stays(tmp_path, mode):
    path = tmp_path / "policy.json"
    write_atomic(path, "old")
    path.chmod(mode)
    write_atomic(path, "new")
    assert path.stat().st_mode & 0o7777 == mode
    assert path.read_text() == "new"


def test_a_new_file_has_the_usual_mode(tmp_path):
    write_atomic(tmp_path / "ours", "")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_read_only_file_is_refused_and_stays(tmp_path):
    path = tmp_path / "policy.json"
    write_atomic(path, "old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="is read-only; make it writable, or give another path") as error:
        write_atomic(path, "new")
    assert error.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_devices_pipes_sockets_and_folders_are_refused_and_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        kinds = {"/dev/null": "device", "pipe": "pipe", "folder": "folder", "link": "device", "socket": "socket"}
        for name, kind in kinds.items():
            before = os.stat(tmp_path / name)
            with pytest.raises(OSError, match=f"is a {kind}; give the path of a file") as error:
                write_atomic(tmp_path / name, "new")
            assert error.value.filename == str(tmp_path / name)
            assert os.path.samestat(os.stat(tmp_path / name), before)


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "private").write_text("private")
    (tmp_path / f".policy.json.{os.getpid()}.tmp").symlink_to("private")
    write_atomic(tmp_path / "policy.json", "new")
    assert (tmp_path / "private").read_text() == "private"
    assert not (tmp_path / "policy.json").is_symlink() and (tmp_path / "policy.json").read_text() == "new"


def test_whole_numbers_of_64_bits_are_the_largest():
    assert parse_json(b"[9223372036854775807, -9223372036854775807, 1e308]") == [2**63 - 1, -(2**63 - 1), 1e308]
    for number in (b"9223372036854775808", b"-9223372036854775809", b"1" + b"0" * 309, b"1e999", b"-1e999"):
        with pytest.raises(ValueError, match=f"{number.decode()[:40]}.* is no allowed number"):
            parse_json(b'{"cost": ' + number + b"}")


def test_no_more_is_read_than_is_allowed(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    assert read_limited(tmp_path / "a", 100) == bytes(100)
    for path in (tmp_path / "a", "/dev/zero"):
        with pytest.raises(ValueError, match="has more than 99 bytes"):
            read_limited(path, 99)
    with pytest.raises(ValueError, match=f"its JSON has {MOST_JSON_BYTES + 1:,} bytes"):
        parse_json(b" " * (MOST_JSON_BYTES + 1))


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", MOST_HEADER_BYTES) + b"{}")
    check_safetensors_header(path)
    path.write_bytes(struct.pack("<Q", MOST_HEADER_BYTES + 1) + b"{}")
    with pytest.raises(ValueError, match="its header claims 16,777,217 bytes; allowed are 16,777,216"):
        check_safetensors_header(path)
