"""Descriptors between ranks; here the ranks are threads of one process."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tpcomm import CommError, CommTimeout, fd_exchange
from tpcomm.fd_exchange import exchange_fds
from tpcomm.group_id import new_name


def _memfd(text: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


def _exchange_all(fds: list[int | None]) -> list[dict[int, int]]:
    name = new_name()
    with ThreadPoolExecutor(len(fds)) as threads:
        futures: list[Future[dict[int, int]]] = [
            threads.submit(exchange_fds, name, rank, len(fds), fd, 10.0)
            for rank, fd in enumerate(fds)
        ]
        return [future.result(20) for future in futures]


def test_every_rank_gets_every_descriptor_as_its_own() -> None:
    fds: list[int | None] = [_memfd(f"rank {rank}".encode()) for rank in range(4)]
    tables = _exchange_all(fds)
    for table in tables:
        assert sorted(table) == [0, 1, 2, 3]
        for rank, fd in table.items():
            assert os.pread(fd, 20, 0) == f"rank {rank}".encode()
            assert not os.get_inheritable(fd)
    every = [fd for table in tables for fd in table.values()] + [fd for fd in fds if fd is not None]
    assert len(set(every)) == len(every)
    for fd in every:
        os.close(fd)


def test_ranks_that_give_nothing_are_left_out() -> None:
    own = _memfd(b"only")
    for table in _exchange_all([own, None, None]):
        assert list(table) == [0]
        os.close(table[0])
    os.close(own)


def test_a_rank_that_came_is_told_which_did_not() -> None:
    name = new_name()
    with ThreadPoolExecutor(2) as threads:
        futures = [
            threads.submit(exchange_fds, name, rank, 3, None, limit_s)
            for rank, limit_s in ((0, 0.3), (2, 10.0))
        ]
        for future in futures:
            with pytest.raises(CommTimeout, match="rank 1 did not join") as caught:
                future.result(20)
            assert caught.value.missing_ranks == (1,)


def test_time_limit_names_the_ranks_that_did_not_come() -> None:
    with pytest.raises(CommTimeout, match="ranks 1, 2 did not join within 0.05 s") as caught:
        exchange_fds(new_name(), 0, 3, None, 0.05)
    assert caught.value.missing_ranks == (1, 2)
    with pytest.raises(CommTimeout, match="rank 0 did not open the group"):
        exchange_fds(new_name(), 1, 3, None, 0.05)


def test_timeout_leaves_no_descriptor_open() -> None:
    own = _memfd(b"x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CommTimeout):
        exchange_fds(new_name(), 0, 2, own, 0.05)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(own)


def test_rank_outside_the_group_is_refused() -> None:
    name = new_name()

    def stranger() -> None:
        with pytest.raises((CommError, OSError)):
            exchange_fds(name, 7, 2, None, 10.0)

    thread = threading.Thread(target=stranger)
    thread.start()
    with pytest.raises(CommError, match="joined as rank 7"):
        exchange_fds(name, 0, 2, None, 10.0)
    thread.join(20)
    assert not thread.is_alive()


def test_another_user_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    name = new_name()
    foreign = os.getuid() + 1

    def peer_uid(sock: socket.socket) -> int:
        return foreign

    monkeypatch.setattr(fd_exchange, "_peer_uid", peer_uid)
    with ThreadPoolExecutor(2) as threads:
        server = threads.submit(exchange_fds, name, 0, 2, None, 1.0)
        client = threads.submit(exchange_fds, name, 1, 2, None, 1.0)
        with pytest.raises(CommError, match="another user"):
            client.result(10)
        with pytest.raises(CommTimeout, match="rank 1"):
            server.result(10)
