"""One fixed staging buffer per rank, mapped by every rank of the host.

Made once, before any graph is captured, and never grown. The memory comes from cuMemCreate and
travels as a file descriptor, so that a survivor can exchange buffers with a new peer later, which
CUDA's older IPC and torch's symmetric memory do not allow. Small tensors are combined through it
by kernels of our own (allreduce_kernels).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from tpcomm.allreduce_kernels import (
    CHUNK_BYTES,
    StagingTables,
    compile_all_reduce,
    one_shot_all_reduce,
)
from tpcomm.communicator import ReduceOp
from tpcomm.cuda_driver import CudaDriver
from tpcomm.cuda_vmm import SharedAllocation, tensor_at
from tpcomm.errors import CommError
from tpcomm.fd_exchange import exchange_fds
from tpcomm.triton_language import require_triton

_FLAG_BYTES = 8
_ALIGNMENT = 4096


class Staging:
    """This rank's buffer and, after `connect`, its view of the peers'.

    `limit_bytes` is the largest message it takes. One stream issues collectives; `abort` may come
    from any thread.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        staging_bytes: int,
        driver: CudaDriver,
    ) -> None:
        """Allocate; nothing is shared yet.

        Raises:
            CommError: Triton is missing, or the size holds no chunk.
            CudaDriverError: the device cannot make memory that can be exported.
        """
        require_triton()
        self.limit_bytes = staging_bytes // CHUNK_BYTES * CHUNK_BYTES
        if self.limit_bytes == 0:
            raise CommError(f"staging_bytes {staging_bytes} is below one chunk of {CHUNK_BYTES}")
        self._world_size = world_size
        self._device = device
        self._driver = driver
        num_chunks = self.limit_bytes // CHUNK_BYTES
        flag_bytes = _round_up(world_size * num_chunks * _FLAG_BYTES, _ALIGNMENT)
        size = flag_bytes + 2 * self.limit_bytes
        self._own = SharedAllocation(
            _round_up(size, driver.granularity(device.index, exportable=True)), device, driver
        )
        self._peers: list[SharedAllocation] = []
        tensor_at(self._own.address, flag_bytes, device).zero_()
        self._abort_stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._raised = torch.ones(1, dtype=torch.int32).pin_memory()
        self.tables = StagingTables(
            bases=torch.zeros(world_size, dtype=torch.int64, device=device),
            epochs=torch.zeros(num_chunks, dtype=torch.int64, device=device),
            abort_word=torch.zeros(1, dtype=torch.int32, device=device),
            rank=rank,
            slots_offset=flag_bytes,
            slot_bytes=self.limit_bytes,
        )
        torch.cuda.synchronize(device)  # the flags are zero before any peer can raise one

    def connect(self, name: str, timeout_s: float) -> None:
        """Exchange descriptors with the other ranks and map their buffers. Collective.

        Raises:
            CommTimeout, CommError: a rank did not come.
            CudaDriverError: this device cannot reach a peer's memory.
        """
        rank = self.tables.rank
        own_fd = self._own.export_fd()
        try:
            table = exchange_fds(name, rank, self._world_size, own_fd, timeout_s)
        finally:
            os.close(own_fd)
        try:
            addresses = [self._map_peer(peer, table[peer]) for peer in range(self._world_size)]
        finally:
            for fd in table.values():
                os.close(fd)
        self.tables.bases.copy_(torch.tensor(addresses, dtype=torch.int64))
        torch.cuda.synchronize(self._device)

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        """Combine at most `limit_bytes` IN PLACE on the current stream."""
        with torch.cuda.device(self._device):  # Triton launches on the current device
            return one_shot_all_reduce(tensor, op, self.tables)

    def compile(self, tensor: Tensor, op: ReduceOp) -> None:
        """Compile what `all_reduce(tensor, op)` will launch."""
        with torch.cuda.device(self._device):
            compile_all_reduce(tensor, op, self.tables)

    def abort(self) -> None:
        """Make every waiting and future kernel of this rank give up."""
        with torch.cuda.stream(self._abort_stream):
            self.tables.abort_word.copy_(self._raised, non_blocking=True)

    def close(self) -> None:
        """Unmap. No kernel of any rank may still use this rank's buffer."""
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        self._own.close()

    def _map_peer(self, peer: int, fd: int) -> int:
        if peer == self.tables.rank:
            return self._own.address
        allocation = SharedAllocation(self._own.num_bytes, self._device, self._driver, fd)
        self._peers.append(allocation)
        return allocation.address


def host_identity() -> int:
    """A number that ranks share exactly if they can reach each other's abstract sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/net").st_ino
    digest = hashlib.sha256(f"{boot}:{namespace}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
