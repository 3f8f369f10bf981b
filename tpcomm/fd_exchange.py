"""File descriptors between the ranks of one host, over an abstract Unix socket.

Abstract names (unix(7)) live in the network namespace and vanish with the process, so nothing is
left on disk whichever way a rank ends. Descriptors travel as SCM_RIGHTS. The name carries 128
random bits and the far side must run under our user id.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Mapping

from tpcomm.communicator import describe_ranks
from tpcomm.errors import CommError, CommTimeout

_RANK = struct.Struct("<iI")  # rank, whether a descriptor follows
_COUNT = struct.Struct("<I")  # of the ranks in a table: they follow as int32, with descriptors
_ABSENT = 0xFFFFFFFF  # in place of the count: the ranks that follow did not come
_CONNECT_RETRY_S = 0.002
_MAX_FDS = 253  # SCM_MAX_FD in the kernel


def exchange_fds(
    name: str, rank: int, world_size: int, fd: int | None, timeout_s: float
) -> dict[int, int]:
    """Give `fd` (or nothing) to every rank and get theirs: rank -> descriptor, our own included.

    Rank 0 collects and hands out. The returned descriptors are fresh ones, owned by the caller;
    `fd` stays the caller's too.

    Raises:
        CommTimeout: a rank did not come within `timeout_s` seconds.
        CommError: a peer went away, or runs under another user id.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        return _serve(name, world_size, fd, deadline, timeout_s)
    with _connect(name, deadline, timeout_s) as sock:
        _send_rank(sock, rank, fd)
        return _receive_table(sock, deadline, timeout_s)


def _serve(
    name: str, world_size: int, fd: int | None, deadline: float, timeout_s: float
) -> dict[int, int]:
    table = {} if fd is None else {0: os.dup(fd)}
    peers: dict[int, socket.socket] = {}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(_address(name))
            listener.listen(world_size)
            while len(peers) < world_size - 1:
                _accept_one(listener, world_size, peers, table, deadline)
        for peer in peers.values():
            _send_table(peer, table)
    except TimeoutError:
        _close_fds(table)
        missing = [r for r in range(1, world_size) if r not in peers]
        for peer in peers.values():
            _send_absent(peer, missing)
        raise _absent(missing, timeout_s) from None
    except (OSError, CommError):
        _close_fds(table)
        raise
    finally:
        for peer in peers.values():
            peer.close()
    return table


def _accept_one(
    listener: socket.socket,
    world_size: int,
    peers: dict[int, socket.socket],
    table: dict[int, int],
    deadline: float,
) -> None:
    listener.settimeout(_remaining(deadline))
    sock, _ = listener.accept()
    if _peer_uid(sock) != os.getuid():
        sock.close()
        return
    sock.settimeout(_remaining(deadline))
    message, fds = _receive(sock, _RANK.size)
    peer_rank = _RANK.unpack(message)[0] if len(message) == _RANK.size else -1
    if not 0 < peer_rank < world_size or peer_rank in peers:
        for received in fds:
            os.close(received)
        sock.close()
        raise CommError(f"a peer joined as rank {peer_rank}: taken, or outside 1..{world_size - 1}")
    peers[peer_rank] = sock
    if fds:
        table[peer_rank] = fds[0]


def _connect(name: str, deadline: float, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while True:
        try:
            sock.settimeout(_remaining(deadline))
            sock.connect(_address(name))
        except TimeoutError:
            sock.close()
            raise CommTimeout(
                f"rank 0 did not open the group within {timeout_s:g} s", [0]
            ) from None
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.EAGAIN):
                sock.close()
                raise
            time.sleep(_CONNECT_RETRY_S)  # rank 0 has not bound the name yet
            continue
        if _peer_uid(sock) != os.getuid():
            sock.close()
            raise CommError(f"the socket of group {name} belongs to another user")
        return sock


def _send_rank(sock: socket.socket, rank: int, fd: int | None) -> None:
    fds = [] if fd is None else [fd]
    socket.send_fds(sock, [_RANK.pack(rank, len(fds))], fds)


def _send_table(sock: socket.socket, table: Mapping[int, int]) -> None:
    ranks = array.array("i", table)
    socket.send_fds(sock, [_COUNT.pack(len(ranks)) + ranks.tobytes()], list(table.values()))


def _send_absent(sock: socket.socket, missing: list[int]) -> None:
    # A peer may have run into its own limit a moment earlier, and be gone.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.send(_COUNT.pack(_ABSENT) + array.array("i", missing).tobytes())


def _absent(missing: list[int], timeout_s: float) -> CommTimeout:
    return CommTimeout(f"{describe_ranks(missing)} did not join within {timeout_s:g} s", missing)


def _receive_table(sock: socket.socket, deadline: float, timeout_s: float) -> dict[int, int]:
    try:
        sock.settimeout(_remaining(deadline))
        message, fds = _receive(sock, 4 + 4 * _MAX_FDS)
    except TimeoutError:
        raise CommTimeout(f"the group was not complete within {timeout_s:g} s") from None
    ranks = array.array("i", message[_COUNT.size :])
    if message[: _COUNT.size] == _COUNT.pack(_ABSENT):
        raise _absent(list(ranks), timeout_s)
    if not message or len(ranks) != len(fds):
        for received in fds:
            os.close(received)
        raise CommError("rank 0 left before the group was complete")
    return dict(zip(ranks, fds, strict=True))


def _receive(sock: socket.socket, num_bytes: int) -> tuple[bytes, list[int]]:
    message, fds, _, _ = socket.recv_fds(sock, num_bytes, _MAX_FDS)
    for received in fds:
        os.set_inheritable(received, False)
    return message, fds


def _close_fds(table: Mapping[int, int]) -> None:
    for fd in table.values():
        os.close(fd)


def _address(name: str) -> str:
    return f"\0tpcomm-{name}"


def _peer_uid(sock: socket.socket) -> int:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("iII", raw)
    return int(uid)


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining
