"""One fixed staging buffer per rank, mapped by every rank of the host.

Made once, before any graph is captured, and never grown. The memory comes from cuMemCreate and
travels as a file descriptor, so that a survivor can exchange buffers with a new peer later, which
CUDA's older IPC and torch's symmetric memory do not allow. Small tensors are combined through it
by kernels of our own; staging_tables has their protocol.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from tpcomm.allreduce_kernels import (
    fits_one_shot,
    fits_two_shot,
    one_shot_all_reduce,
    two_shot_all_reduce,
)
from tpcomm.communicator import ReduceOp
from tpcomm.cuda_driver import CudaDriver
from tpcomm.cuda_vmm import SharedAllocation, tensor_at
from tpcomm.errors import CommError
from tpcomm.fd_exchange import exchange_fds
from tpcomm.gather_kernel import fits_gather, small_all_gather
from tpcomm.norm_kernel import all_reduce_add_rms_norm, fits_add_rms_norm, fused_refusal
from tpcomm.staging_tables import (
    CHUNK_BYTES,
    WARPS_PER_MULTIPROCESSOR,
    make_tables,
    staging_size,
)
from tpcomm.triton_language import require_triton

_FREE = 0xFF  # every byte of a word that nothing was sent to


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
        self.device = device
        self._driver = driver
        size = staging_size(world_size, self.limit_bytes)
        self._own = SharedAllocation(
            _round_up(size, driver.granularity(device.index, exportable=True)), device, driver
        )
        self._peers: list[SharedAllocation] = []
        self._abort_stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._raised = torch.ones(1, dtype=torch.int32).pin_memory()
        self.tables = make_tables(world_size, rank, self.limit_bytes, device, _max_warps(device))

    def connect(self, name: str, timeout_s: float) -> None:
        """Exchange descriptors with the other ranks and map their buffers. Collective.

        After an abort it may be called again, under another name, with any of the other ranks in
        new processes: all state begins anew at the addresses that captured graphs hold. No kernel
        of any rank may still run then.

        Raises:
            CommTimeout, CommError: a rank did not come.
            CudaDriverError: this device cannot reach a peer's memory.
        """
        self._reset()
        rank = self.tables.rank
        own_fd = self._own.export_fd()
        try:
            table = exchange_fds(name, rank, self._world_size, own_fd, timeout_s)
        finally:
            os.close(own_fd)
        lost, self._peers = self._peers, []
        try:
            addresses = [self._map_peer(peer, table[peer]) for peer in range(self._world_size)]
        finally:
            for fd in table.values():
                os.close(fd)
        self.tables.bases.copy_(torch.tensor(addresses, dtype=torch.int64))
        torch.cuda.synchronize(self.device)
        for allocation in lost:
            allocation.close()

    def takes_one_shot(self, tensor: Tensor) -> bool:
        """Whether `one_shot` may be called with this tensor."""
        return fits_one_shot(tensor, self.tables)

    def takes_two_shot(self, tensor: Tensor) -> bool:
        """Whether `two_shot` may be called with this tensor."""
        return fits_two_shot(tensor, self.tables)

    def takes_all_gather(self, tensor: Tensor) -> bool:
        """Whether `all_gather` may be called with this tensor."""
        return fits_gather(tensor, self.tables)

    def takes_add_rms_norm(self, tensor: Tensor, residual: Tensor, weight: Tensor) -> bool:
        """Whether `all_reduce_add_rms_norm` may be called with these tensors."""
        return not fused_refusal(tensor, residual, weight) and fits_add_rms_norm(
            tensor, self.tables
        )

    def one_shot(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        """Combine IN PLACE on the current stream."""
        with torch.cuda.device(self.device):  # Triton launches on the current device
            return one_shot_all_reduce(tensor, op, self.tables)

    def two_shot(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        """Combine IN PLACE on the current stream."""
        with torch.cuda.device(self.device):
            return two_shot_all_reduce(tensor, op, self.tables)

    def all_gather(self, tensor: Tensor, out: Tensor) -> Tensor:
        """Fill `out`, [world_size, *tensor.shape], on the current stream."""
        with torch.cuda.device(self.device):
            return small_all_gather(tensor, out, self.tables)

    def all_reduce_add_rms_norm(
        self, tensor: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """Sum, add to `residual` IN PLACE and return the norm of that, on the current stream."""
        with torch.cuda.device(self.device):
            return all_reduce_add_rms_norm(tensor, residual, weight, eps, self.tables)

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

    def _reset(self) -> None:
        """As before the first call, and ready before a peer that gets our descriptor can write."""
        tensor_at(self._own.address, self._own.num_bytes, self.device).fill_(_FREE)
        self.tables.state.zero_()
        self.tables.abort_word.zero_()
        self.tables.ring.zero_()
        torch.cuda.synchronize(self.device)

    def _map_peer(self, peer: int, fd: int) -> int:
        if peer == self.tables.rank:
            return self._own.address
        allocation = SharedAllocation(self._own.num_bytes, self.device, self._driver, fd)
        self._peers.append(allocation)
        return allocation.address


def host_identity() -> int:
    """A number that ranks share exactly if they can reach each other's abstract sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/net").st_ino
    digest = hashlib.sha256(f"{boot}:{namespace}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _max_warps(device: torch.device) -> int:
    """Of one call; interpreted programs run one after another, whatever their number."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return int(WARPS_PER_MULTIPROCESSOR * properties.multi_processor_count)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
