"""Device memory that grows behind fixed addresses (CUDA driver API, virtual memory management).

A captured graph holds addresses. Reserving a range large enough for the most memory there could
be, and mapping memory behind it later, lets a graph captured over a small cache use a large one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpcomm.cuda_driver import CudaDriver, load_cuda_driver
from tpcomm.errors import CommError, CudaDriverError


class VirtualRange:
    """`reserve_bytes` of addresses on one CUDA device, mapped from the front as asked.

    Not thread-safe. Tensors from `as_tensor` do not keep the memory: close only when no kernel
    and no graph uses them.
    """

    def __init__(
        self, reserve_bytes: int, device: torch.device, *, driver: CudaDriver | None = None
    ) -> None:
        if device.type != "cuda" or device.index is None:
            raise ValueError(f"device {device}: name one CUDA device, such as cuda:0")
        if reserve_bytes <= 0:
            raise ValueError(f"reserve_bytes {reserve_bytes} is not positive")
        self._device = device
        self._driver = driver if driver is not None else load_cuda_driver()
        self.granularity = self._driver.granularity(device.index, exportable=False)
        self.reserve_bytes = _round_up(reserve_bytes, self.granularity)
        self.mapped_bytes = 0
        self._segments: list[tuple[int, int]] = []
        self.address = self._driver.reserve(self.reserve_bytes, self.granularity)

    def map_more(self, num_bytes: int) -> int:
        """Map at least `num_bytes` more (rounded up to `granularity`); returns `mapped_bytes`.

        New memory holds whatever was there before.

        Raises:
            CommError: more than was reserved.
            CudaDriverError: code 2 when the device is out of memory; nothing is mapped then.
        """
        size = _round_up(num_bytes, self.granularity)
        if num_bytes <= 0 or self.mapped_bytes + size > self.reserve_bytes:
            raise CommError(
                f"cannot map {num_bytes} bytes more: {self.mapped_bytes} of "
                f"{self.reserve_bytes} reserved bytes are mapped"
            )
        begin = self.address + self.mapped_bytes
        index = self._device.index
        handle = self._driver.create(size, index, exportable=False)
        try:
            self._driver.map(begin, size, handle, index)
        finally:
            self._driver.call("cuMemRelease", handle)  # the mapping holds the memory
        self._segments.append((begin, size))
        self.mapped_bytes += size
        return self.mapped_bytes

    def as_tensor(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """A contiguous tensor over the range, `offset` bytes in.

        Its first byte must be mapped. Its end may lie in the part that is reserved only, so that
        its address and strides hold for every amount that is mapped later; touching elements
        there before they are mapped is a fault.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if not 0 <= offset < self.mapped_bytes or offset % dtype.itemsize:
            raise ValueError(
                f"offset {offset} is not an aligned offset into {self.mapped_bytes} mapped bytes"
            )
        if num_bytes <= 0 or offset + num_bytes > self.reserve_bytes:
            raise ValueError(
                f"{num_bytes} bytes at offset {offset} do not fit {self.reserve_bytes} reserved"
            )
        raw = tensor_at(self.address + offset, num_bytes, self._device)
        return raw.view(dtype).view(shape)

    def close(self) -> None:
        """Unmap and give the addresses back. Idempotent."""
        if not self.address:
            return
        for begin, size in self._segments:
            self._driver.call("cuMemUnmap", begin, size)
        self._segments.clear()
        self._driver.call("cuMemAddressFree", self.address, self.reserve_bytes)
        self.address = self.mapped_bytes = 0


class SharedAllocation:
    """One allocation that other processes map too: ours, or a peer's by its descriptor.

    `fd` of a peer stays the caller's to close.
    """

    def __init__(
        self, num_bytes: int, device: torch.device, driver: CudaDriver, fd: int | None = None
    ) -> None:
        """`num_bytes` is a multiple of the granularity; `device` is the one that will access it."""
        self._driver = driver
        self.num_bytes = num_bytes
        self._handle = (
            driver.create(num_bytes, device.index, exportable=True)
            if fd is None
            else driver.import_fd(fd)
        )
        self.address = 0
        try:
            address = driver.reserve(num_bytes, 0)
            try:
                driver.map(address, num_bytes, self._handle, device.index)
            except CudaDriverError:
                driver.call("cuMemAddressFree", address, num_bytes)
                raise
        except CudaDriverError:
            driver.call("cuMemRelease", self._handle)
            raise
        self.address = address

    def export_fd(self) -> int:
        """A new descriptor, the caller's to close."""
        return self._driver.export_fd(self._handle)

    def close(self) -> None:
        """Unmap, release and give the addresses back. Idempotent."""
        if not self.address:
            return
        self._driver.call("cuMemUnmap", self.address, self.num_bytes)
        self._driver.call("cuMemAddressFree", self.address, self.num_bytes)
        self._driver.call("cuMemRelease", self._handle)
        self.address = 0


class _CudaArray:
    """Bytes at a device address, for torch.as_tensor.

    `__cuda_array_interface__`, version 3:
    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def tensor_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """`[num_bytes]` uint8 over device memory that the caller keeps mapped."""
    tensor = torch.as_tensor(_CudaArray(address, num_bytes), device=device)
    assert tensor.data_ptr() == address, "torch copied the memory instead of wrapping it"
    return tensor


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
