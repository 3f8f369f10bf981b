"""The files of a step log: FILE.0, FILE.1, ... with rising numbers, the oldest deleted for room."""

import os
import re
from collections.abc import Sequence
from pathlib import Path


class SegmentRing:
    """Writes segments one after another and keeps all of them within `max_bytes`.

    Segments that earlier runs left count too, and go first. Used by one thread. Errors of the disk
    are OSError.
    """

    def __init__(self, path: Path, max_bytes: int, segment_bytes: int) -> None:
        """No segment will be larger than `segment_bytes`. OSError if the folder is not there."""
        self._path = path
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        segments = find_segments(path)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{path.parent} is not writable")
        self._next = segment_number(segments[-1]) + 1 if segments else 0
        self._fd = -1

    def write(self, items: Sequence[bytes | None]) -> None:
        """Writes records as they are; at None the next file begins."""
        run: list[bytes] = []
        for item in items:
            if item is not None:
                run.append(item)
                continue
            self._write(b"".join(run))
            run = []
            self._begin()
        self._write(b"".join(run))

    def close(self) -> None:
        """Ends the present segment."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self) -> None:
        self.close()
        old = find_segments(self._path)
        sizes = [segment.stat().st_size for segment in old]
        while old and sum(sizes) + self._segment_bytes > self._max_bytes:
            old.pop(0).unlink()
            sizes.pop(0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        # Token ids are what users wrote and were told: for the owner's eyes alone.
        self._fd = os.open(f"{self._path}.{self._next}", flags, 0o600)
        self._next += 1

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def find_segments(path: Path) -> list[Path]:
    """The segments of the log `path`, oldest first. OSError if its folder cannot be read."""
    pattern = re.compile(re.escape(path.name) + r"\.\d+")
    found = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
    return sorted(found, key=segment_number)


def segment_number(segment: Path) -> int:
    """N of FILE.N."""
    return int(segment.name.rpartition(".")[2])
