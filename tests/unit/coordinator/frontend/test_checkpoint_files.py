"""Reading small JSON files."""

from pathlib import Path

import pytest

from coordinator.errors import BadCheckpoint
from coordinator.frontend.checkpoint_files import read_json_object


def test_missing_file_is_an_empty_object(tmp_path: Path) -> None:
    assert read_json_object(tmp_path / "none.json") == {}


def test_object_is_read_as_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes('{"é": 1}'.encode())
    assert read_json_object(file) == {"é": 1}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b"[1]", "holds a list, not an object"),
    ],
)
def test_file_that_is_no_object_is_refused_by_name(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=f"{file}: {problem}"):
        read_json_object(file)
