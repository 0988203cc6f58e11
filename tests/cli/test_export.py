from pathlib import Path

import pytest

from bitscape.errors import BitscapeError
from bitscape.folders import replaced_if_good


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    out = tmp_path / "net.xml"
    out.write_text("old")
    out.with_suffix(".bin").write_bytes(b"old weights")
    return out, out.with_suffix(".bin")


def test_a_draft_that_fails_leaves_the_old_files(files: tuple[Path, Path]) -> None:
    with pytest.raises(BitscapeError, match="differ"), replaced_if_good(*files) as draft:
        draft.write_text("new")
        draft.with_suffix(".bin").write_bytes(b"new weights")
        raise BitscapeError("codes differ")
    assert (files[0].read_text(), files[1].read_bytes()) == ("old", b"old weights")
    assert not draft.parent.exists()


def test_a_good_draft_replaces_them(files: tuple[Path, Path]) -> None:
    with replaced_if_good(*files) as draft:
        assert (draft.name, draft.parent == files[0].parent) == ("net.xml", False)
        draft.write_text("new")
        draft.with_suffix(".bin").write_bytes(b"new weights")
        assert files[0].read_text() == "old"
    assert (files[0].read_text(), files[1].read_bytes()) == ("new", b"new weights")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["net.bin", "net.xml"]
    assert not draft.parent.exists()
