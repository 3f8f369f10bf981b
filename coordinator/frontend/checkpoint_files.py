"""Reads the small JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from coordinator.errors import BadCheckpoint


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; {} if there is no such file.

    Raises BadCheckpoint if the file is unreadable, is not JSON, or holds something else.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(file, f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(file, f"holds a {type(content).__name__}, not an object")
    return content
