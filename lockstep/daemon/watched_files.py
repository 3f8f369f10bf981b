"""Notices that files have changed, by looking: no thread, no inotify, symlinks followed."""

import os
from collections.abc import Iterable
from pathlib import Path


class WatchedFiles:
    """Some files, as they were when last looked at. One look costs a stat a file."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._seen = self._look()

    def have_changed(self) -> bool:
        """True once after a file was written, replaced, removed or made."""
        now = self._look()
        has_changed, self._seen = now != self._seen, now
        return has_changed

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_identity(path) for path in self._paths)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
