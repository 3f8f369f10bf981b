"""API keys from a file: whose they are, known by their hashes, read again when the file changes.

A line is `<tenant> sha256:<hexadecimal SHA-256 of the key>`; blank lines and those that begin with
# are skipped. Hashes, so that whoever reads the file can use no key. Keys are random and long, so a
plain hash is enough: there is no dictionary to try. A tenant may have several keys.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.errors import CoordinatorError
from coordinator.sampling_limits import MAX_TENANT_CHARS
from lockstep.daemon.watched_files import WatchedFiles

_LOG = logging.getLogger(__name__)
_LINE = re.compile(r"(\S+)\s+sha256:([0-9a-f]{64})")
_LOOK_PERIOD_S = 1.0


class ApiKeysError(CoordinatorError):
    """The file is missing or a line of it does not parse; names file and line, never a key."""


def read_api_keys(path: Path) -> dict[bytes, str]:
    """SHA-256 of each key -> tenant. Raises ApiKeysError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ApiKeysError(f"--api-keys {path}: {_reason(error)}") from None
    keys: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        where = f"--api-keys {path}, line {number}"
        if match is None:
            raise ApiKeysError(f"{where}: want `<tenant> sha256:<64 hexadecimal digits>`")
        tenant, digest = match[1], bytes.fromhex(match[2])
        if len(tenant) > MAX_TENANT_CHARS:
            raise ApiKeysError(f"{where}: the tenant is over {MAX_TENANT_CHARS} characters long")
        if digest in keys:
            raise ApiKeysError(f"{where}: the key stands there twice")
        keys[digest] = tenant
    if not keys:
        raise ApiKeysError(f"--api-keys {path}: there is no key in it")
    return keys


class ApiKeys:
    """The keys as the file has them now, at most a second late. For one thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ApiKeysError."""
        self._path = path
        self._clock = clock
        self._watched = WatchedFiles([path])
        self._keys = read_api_keys(path)
        self._looked_at = clock()

    def tenant_of(self, key: str) -> str | None:
        """Whose key it is; None: nobody's.

        How long it takes may tell of the hash that was asked for, and nothing of a key: nobody can
        choose a key by its hash.
        """
        self._look()
        return self._keys.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LOOK_PERIOD_S:
            return
        self._looked_at = now
        if not self._watched.have_changed():
            return
        try:
            self._keys = read_api_keys(self._path)
        except ApiKeysError as error:
            _LOG.error("the keys of before stay in use: %s", error)
        else:
            _LOG.info("took %d API key(s) from %s", len(self._keys), self._path)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8"
