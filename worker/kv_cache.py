"""The paged KV cache: one range of memory that grows behind fixed addresses.

A block holds `block_size` tokens of all layers, K and V: [num_layers, 2, block_size, heads, dim].
Blocks are the outermost dimension, so no stride depends on their number: graphs captured while a
few blocks are mapped read the others later behind the same addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.errors import DeviceError
from worker.models.spec import ModelSpec
from worker.sharding import ShardSpec

if TYPE_CHECKING:
    from tpcomm.cuda_vmm import VirtualRange


@dataclass(frozen=True)
class KvLayout:
    """Sizes of this rank's cache."""

    num_layers: int
    block_size: int
    num_local_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, ...]:
        return (self.num_layers, 2, self.block_size, self.num_local_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return math.prod(self.block_shape) * self.dtype.itemsize


def kv_layout(spec: ModelSpec, shard: ShardSpec, block_size: int, dtype: torch.dtype) -> KvLayout:
    """The cache layout of one rank."""
    return KvLayout(spec.num_layers, block_size, shard.num_local_kv_heads, spec.head_dim, dtype)


class KvCache:
    """This rank's blocks. Used by the device thread alone.

    On CUDA, `max_blocks` blocks of addresses are reserved and memory is mapped by `grow`; on CPU
    `grow` allocates afresh (the kernel commits pages when they are first written) and drops what
    was there. Fresh memory is not cleared: attention never multiplies what it masks.
    """

    def __init__(self, layout: KvLayout, device: torch.device, max_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = 0
        self._max_blocks = max_blocks
        self._device = device
        self._blocks = torch.empty(0)
        self._range: VirtualRange | None = None
        if device.type == "cuda":
            from tpcomm.cuda_vmm import VirtualRange

            self._range = VirtualRange(max_blocks * layout.block_bytes, device)

    def grow(self, num_blocks: int) -> None:
        """Makes blocks 0..num_blocks-1 usable; raises DeviceError when memory is short."""
        assert self.num_blocks <= num_blocks <= self._max_blocks
        shape = (num_blocks, *self.layout.block_shape)
        if self._range is None:
            self._blocks = torch.empty(shape, dtype=self.layout.dtype)
        else:
            missing = num_blocks * self.layout.block_bytes - self._range.mapped_bytes
            if missing > 0:
                self._range.map_more(missing)
            self._blocks = self._range.as_tensor(shape, self.layout.dtype)
        self.num_blocks = num_blocks

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(k, v), each [num_blocks, block_size, num_local_kv_heads, head_dim], strided views."""
        return self._blocks[:, index, 0], self._blocks[:, index, 1]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes

    def close(self) -> None:
        """Frees the memory; nothing may use it afterwards."""
        self._blocks = torch.empty(0)
        if self._range is not None:
            torch.cuda.synchronize(self._device)
            self._range.close()


def fitting_blocks(free_bytes: int, reserve_bytes: int, layout: KvLayout) -> int:
    """How many blocks, the dummy included, fit; raises DeviceError when not even two do."""
    num_blocks = (free_bytes - reserve_bytes) // layout.block_bytes
    if num_blocks < 2:
        raise DeviceError(
            f"{free_bytes} bytes are free, {reserve_bytes} are kept back, a KV block takes"
            f" {layout.block_bytes}: no room for a KV cache; raise --kv-cache-bytes where it is"
            f" given, or --gpu-memory-fraction, or use a larger device or more ranks"
        )
    return num_blocks
