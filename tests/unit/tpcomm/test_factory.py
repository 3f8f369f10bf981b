"""Group ids, and the arguments that no group could have."""

from __future__ import annotations

import math

import pytest
import torch

from tpcomm import CommError, create_communicator, create_group_id
from tpcomm.group_id import GroupId, parse_group_id

CPU = torch.device("cpu")


def test_group_ids_are_unique_and_survive_the_wire() -> None:
    first, second = create_group_id("shm"), create_group_id("shm")
    assert first != second
    parsed = parse_group_id(first, "shm")
    assert parsed.to_bytes() == first
    assert len(parsed.name) == 32


def test_gloo_id_names_where_rank_0_serves() -> None:
    parsed = parse_group_id(create_group_id("gloo", host="127.0.0.1"), "gloo")
    assert parsed.host == "127.0.0.1"
    assert 0 < parsed.port < 65536


@pytest.mark.parametrize("raw", [b"", b"junk", b"\xff\xfe", b"[]", b'{"backend":"shm","other":1}'])
def test_foreign_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(CommError, match="not one of ours"):
        parse_group_id(raw, "shm")


def test_id_of_another_backend_is_refused() -> None:
    raw = GroupId("gloo", "name").to_bytes()
    with pytest.raises(CommError, match="'gloo', not 'shm'"):
        create_communicator("shm", raw, 0, 2, CPU, 1.0)


@pytest.mark.parametrize(
    ("backend", "rank", "world_size", "timeout_s", "message"),
    [
        ("mpi", 0, 2, 1.0, "'mpi' is none of nccl, shm, gloo"),
        ("shm", 2, 2, 1.0, "rank 2 is outside 0..1"),
        ("shm", -1, 2, 1.0, "rank -1"),
        ("shm", 0, 2, 0.0, "timeout_s"),
        ("shm", 0, 2, math.inf, "timeout_s"),
        ("shm", 0, 2, math.nan, "timeout_s"),
        ("nccl", 0, 2, 1.0, "works on cuda tensors, device is cpu"),
    ],
)
def test_impossible_arguments_are_named(
    backend: str, rank: int, world_size: int, timeout_s: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_communicator(backend, b"", rank, world_size, CPU, timeout_s)
