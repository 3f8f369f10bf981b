"""The secret that the daemons of a group share, and the token by which a call shows it.

A token is `<epoch>.<HMAC-SHA256 of the epoch under the secret>`: whoever has seen one can neither
make that of a later epoch nor find the secret. A worker takes no token of an epoch before its own.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from lockstep.daemon.flags import FlagError

TOKEN_KEY = "lockstep-join-token"
_MIN_BYTES = 16
_PURPOSE = b"lockstep join "


def read_group_secret(path: str) -> bytes | None:
    """The secret in the file, whitespace at its ends removed; None without a path.

    Raises FlagError.
    """
    if not path:
        return None
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise FlagError(f"--group-secret {path}: {error.strerror}") from None
    if len(secret) < _MIN_BYTES:
        raise FlagError(
            f"--group-secret {path}: it holds {len(secret)} bytes; it must hold at least "
            f"{_MIN_BYTES}, for example those of `openssl rand -hex 32`"
        )
    return secret


def hold_new_secret() -> str:
    """Makes a secret that lives as long as this process; returns the path to read it at.

    The file has no name on any disk, so that nothing is left however the process ends. It can be
    opened by processes of this user.
    """
    handle = os.memfd_create("lockstep-group-secret")
    os.write(handle, secrets.token_hex(32).encode())
    return f"/proc/{os.getpid()}/fd/{handle}"


def join_token(secret: bytes, epoch: int) -> str:
    """What the coordinator of that epoch shows to every worker."""
    return f"{epoch}.{_code(secret, epoch)}"


def token_epoch(secret: bytes, token: str) -> int | None:
    """The epoch that a token was made for; None if it was not made with this secret."""
    text, _, code = token.partition(".")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and code.isascii()):
        return None
    epoch = int(text)
    return epoch if hmac.compare_digest(code, _code(secret, epoch)) else None


def _code(secret: bytes, epoch: int) -> str:
    return hmac.new(secret, _PURPOSE + str(epoch).encode(), hashlib.sha256).hexdigest()
