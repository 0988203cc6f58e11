import json
import os

import pytest

from bitscape.files import json_text, parse_json, write_atomic


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
        (b"1" * 5000, "Exceeds the limit"),
        (b"[-Infinity]", "-Infinity is no allowed number"),
    ],
)
def test_json_is_read_strictly(content, message):
    with pytest.raises(ValueError, match=message):
        parse_json(content)
