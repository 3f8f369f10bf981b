"""The bytes that name a group: made by one rank, handed to all, opaque to whoever carries them."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass

from tpcomm.errors import CommError


@dataclass(frozen=True)
class GroupId:
    """Where the ranks of a group meet.

    `name` is random and unique to the group. `nccl_id` is an ncclUniqueId in hexadecimal (nccl
    only); `host` and `port` are where rank 0 serves the store (gloo only).
    """

    backend: str
    name: str
    nccl_id: str = ""
    host: str = ""
    port: int = 0

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()


def new_name() -> str:
    """A name no other group has: 128 random bits."""
    return secrets.token_hex(16)


def parse_group_id(raw: bytes, backend: str) -> GroupId:
    """Read a group id, refusing one that was made for another backend."""
    try:
        parsed = GroupId(**json.loads(raw))
    except (ValueError, TypeError) as error:
        raise CommError(f"group id of {len(raw)} bytes is not one of ours: {error}") from error
    if parsed.backend != backend:
        raise CommError(f"group id was made for backend {parsed.backend!r}, not {backend!r}")
    return parsed
