"""Making groups: `create_group_id` on one rank, `create_communicator` on all."""

from __future__ import annotations

import torch

from tpcomm.communicator import DEFAULT_STAGING_BYTES, Communicator
from tpcomm.group_id import GroupId, new_name, parse_group_id
from tpcomm.local import LocalCommunicator

BACKENDS = ("nccl", "shm", "gloo")


def create_group_id(
    backend: str, *, host: str = "127.0.0.1", nccl_path: str | None = None
) -> bytes:
    """Name a new group; the bytes go to every rank, unread.

    Call it in a process that outlives the group's creation: for nccl this process listens for
    the others until they have met. `host` (gloo only) is the address of rank 0 as the others
    reach it; `nccl_path` names the libnccl to use.
    """
    _check_backend(backend)
    if backend == "nccl":
        from tpcomm.nccl_loader import load_nccl

        nccl_id = load_nccl(nccl_path).get_unique_id()
        return GroupId("nccl", new_name(), nccl_id=nccl_id.hex()).to_bytes()
    if backend == "gloo":
        from tpcomm.gloo import free_port

        return GroupId("gloo", new_name(), host=host, port=free_port(host)).to_bytes()
    return GroupId("shm", new_name()).to_bytes()


def create_communicator(
    backend: str,
    group_id: bytes,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    *,
    nccl_path: str | None = None,
) -> Communicator:
    """Join the group as `rank` of `world_size`; returns when all ranks have joined.

    `timeout_s` bounds joining, closing, and, on CPU, every collective. A group of one rank needs
    no backend: `group_id` is not read.

    Raises:
        CommTimeout: not all ranks came in time.
        CommError: the id belongs to another backend, or a resource is missing (NcclNotFound,
            NcclError, CudaDriverError say which).
        ValueError: an argument that no group could have.
    """
    _check_backend(backend)
    _check_arguments(backend, rank, world_size, device, timeout_s)
    if world_size == 1:
        return LocalCommunicator(device)
    group = parse_group_id(group_id, backend)
    if backend == "shm":
        from tpcomm.cpu import ShmCommunicator

        return ShmCommunicator(group.name, rank, world_size, timeout_s, staging_bytes)
    if backend == "gloo":
        from tpcomm.gloo import GlooCommunicator

        return GlooCommunicator(group, rank, world_size, timeout_s)
    from tpcomm.nccl_loader import load_nccl
    from tpcomm.staged import StagedCommunicator

    return StagedCommunicator(
        load_nccl(nccl_path),
        bytes.fromhex(group.nccl_id),
        rank,
        world_size,
        device,
        timeout_s,
        staging_bytes,
        group.name,
    )


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")


def _check_arguments(
    backend: str, rank: int, world_size: int, device: torch.device, timeout_s: float
) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside 0..{world_size - 1} (world_size {world_size})")
    if not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s {timeout_s} is not a positive, finite number of seconds")
    needed = "cuda" if backend == "nccl" else "cpu"
    if world_size > 1 and device.type != needed:
        raise ValueError(f"backend {backend} works on {needed} tensors, device is {device}")
