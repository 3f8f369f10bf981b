"""libcuda's memory calls on host memory: allocations are memfds, mappings are mmap(2).

With it and Triton's interpreter the staging path runs whole, between processes, without a GPU.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import torch
from torch import Tensor

_GRANULARITY = 1 << 16
_PROT_NONE = 0
_MAP_FIXED = 0x10


class HostDriver:
    """The methods of CudaDriver that staging uses; a handle is a file descriptor."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap, self._munmap = libc.mmap, libc.munmap
        size, number = ctypes.c_size_t, ctypes.c_int
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
        self._munmap.argtypes = [ctypes.c_void_p, size]

    def granularity(self, device: int, *, exportable: bool) -> int:
        return _GRANULARITY

    def reserve(self, num_bytes: int, alignment: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return self._checked(self._mmap(None, num_bytes, _PROT_NONE, flags, -1, 0))

    def create(self, num_bytes: int, device: int, *, exportable: bool) -> int:
        fd = os.memfd_create("device-memory")
        os.ftruncate(fd, num_bytes)
        return fd

    def map(self, address: int, num_bytes: int, handle: int, device: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | _MAP_FIXED
        mapped = self._mmap(address, num_bytes, protection, flags, handle, 0)
        assert self._checked(mapped) == address

    def export_fd(self, handle: int) -> int:
        return os.dup(handle)

    def import_fd(self, fd: int) -> int:
        return os.dup(fd)

    def call(self, name: str, *arguments: Any) -> None:
        if name == "cuMemRelease":
            os.close(arguments[0])
        elif name == "cuMemAddressFree":
            assert self._munmap(*arguments) == 0
        else:
            assert name == "cuMemUnmap"

    def _checked(self, address: int) -> int:
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        return address


def tensor_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """`[num_bytes]` uint8 over mapped host memory."""
    return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype=torch.uint8)
