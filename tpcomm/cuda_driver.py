"""The virtual memory part of the CUDA driver API by ctypes, prototypes from cuda.h beside it.

Calls raise CudaDriverError unless they return CUDA_SUCCESS. Handles and device addresses are
plain integers here.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

from tpcomm.errors import CommError, CudaDriverError

_SONAME = "libcuda.so.1"
_LOCATION_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_ALLOCATION_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_HANDLE_NONE = 0  # CU_MEM_HANDLE_TYPE_NONE
_HANDLE_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ACCESS_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_GRANULARITY_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM


class MemLocation(ctypes.Structure):
    """`CUmemLocation`."""

    _fields_ = [("type", c_int), ("id", c_int)]


class _AllocFlags(ctypes.Structure):
    """`CUmemAllocationProp::allocFlags`."""

    _fields_ = [
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class MemAllocationProp(ctypes.Structure):
    """`CUmemAllocationProp`."""

    _fields_ = [
        ("type", c_int),
        ("requestedHandleTypes", c_int),
        ("location", MemLocation),
        ("win32HandleMetaData", c_void_p),
        ("allocFlags", _AllocFlags),
    ]


class MemAccessDesc(ctypes.Structure):
    """`CUmemAccessDesc`."""

    _fields_ = [("location", MemLocation), ("flags", c_int)]


_PROP_P, _ACCESS_P = POINTER(MemAllocationProp), POINTER(MemAccessDesc)
_U64_P, _SIZE_P = POINTER(c_uint64), POINTER(c_size_t)
FUNCTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # CUresult cuInit(unsigned int Flags)
    ("cuInit", (ctypes.c_uint,)),
    # CUresult cuGetErrorString(CUresult error, const char** pStr)
    ("cuGetErrorString", (c_int, POINTER(c_char_p))),
    # CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* prop,
    #     CUmemAllocationGranularity_flags option)
    ("cuMemGetAllocationGranularity", (_SIZE_P, _PROP_P, c_int)),
    # CUresult cuMemAddressReserve(CUdeviceptr* ptr, size_t size, size_t alignment,
    #     CUdeviceptr addr, unsigned long long flags)
    ("cuMemAddressReserve", (_U64_P, c_size_t, c_size_t, c_uint64, c_uint64)),
    # CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size)
    ("cuMemAddressFree", (c_uint64, c_size_t)),
    # CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
    #     const CUmemAllocationProp* prop, unsigned long long flags)
    ("cuMemCreate", (_U64_P, c_size_t, _PROP_P, c_uint64)),
    # CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
    ("cuMemRelease", (c_uint64,)),
    # CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset,
    #     CUmemGenericAllocationHandle handle, unsigned long long flags)
    ("cuMemMap", (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64)),
    # CUresult cuMemUnmap(CUdeviceptr ptr, size_t size)
    ("cuMemUnmap", (c_uint64, c_size_t)),
    # CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* desc,
    #     size_t count)
    ("cuMemSetAccess", (c_uint64, c_size_t, _ACCESS_P, c_size_t)),
    # CUresult cuMemExportToShareableHandle(void* shareableHandle,
    #     CUmemGenericAllocationHandle handle, CUmemAllocationHandleType handleType,
    #     unsigned long long flags)
    ("cuMemExportToShareableHandle", (c_void_p, c_uint64, c_int, c_uint64)),
    # CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle,
    #     void* osHandle, CUmemAllocationHandleType shHandleType)
    ("cuMemImportFromShareableHandle", (_U64_P, c_void_p, c_int)),
)


class CudaDriver:
    """The functions above on one loaded libcuda, as methods over plain integers.

    The calling process must have a CUDA context on the device (any torch allocation makes one).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {name: _bind(library, name, argtypes) for name, argtypes in FUNCTIONS}
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the table; CudaDriverError unless it succeeds."""
        code = self._functions[name](*arguments)
        if code != 0:
            raise CudaDriverError(code, self._error_text(code), name)

    def granularity(self, device: int, *, exportable: bool) -> int:
        """Bytes that sizes and addresses on `device` must be multiples of."""
        size = c_size_t()
        prop = allocation_prop(device, exportable=exportable)
        self.call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(size),
            ctypes.byref(prop),
            _GRANULARITY_MINIMUM,
        )
        return size.value

    def reserve(self, num_bytes: int, alignment: int) -> int:
        """Reserve addresses without memory behind them."""
        address = c_uint64()
        self.call("cuMemAddressReserve", ctypes.byref(address), num_bytes, alignment, 0, 0)
        return address.value

    def create(self, num_bytes: int, device: int, *, exportable: bool) -> int:
        """Allocate device memory that is mapped nowhere yet; returns its handle."""
        handle = c_uint64()
        prop = allocation_prop(device, exportable=exportable)
        self.call("cuMemCreate", ctypes.byref(handle), num_bytes, ctypes.byref(prop), 0)
        return handle.value

    def map(self, address: int, num_bytes: int, handle: int, device: int) -> None:
        """Put an allocation behind reserved addresses, readable and writable by `device`.

        The mapping keeps the memory alive, so the handle may be released afterwards.
        """
        self.call("cuMemMap", address, num_bytes, 0, handle, 0)
        access = MemAccessDesc(MemLocation(_LOCATION_DEVICE, device), _ACCESS_READ_WRITE)
        try:
            self.call("cuMemSetAccess", address, num_bytes, ctypes.byref(access), 1)
        except CudaDriverError:
            self.call("cuMemUnmap", address, num_bytes)
            raise

    def export_fd(self, handle: int) -> int:
        """A file descriptor for the allocation, to be sent to another process."""
        fd = c_int(-1)
        self.call("cuMemExportToShareableHandle", ctypes.byref(fd), handle, _HANDLE_POSIX_FD, 0)
        return fd.value

    def import_fd(self, fd: int) -> int:
        """A handle for the allocation behind another process's descriptor."""
        handle = c_uint64()
        self.call(
            "cuMemImportFromShareableHandle", ctypes.byref(handle), c_void_p(fd), _HANDLE_POSIX_FD
        )
        return handle.value

    def _error_text(self, code: int) -> str:
        text = c_char_p()
        self._functions["cuGetErrorString"](code, ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else "unknown error"


def allocation_prop(device: int, *, exportable: bool) -> MemAllocationProp:
    """Pinned memory of `device`; zero in every other field."""
    prop = MemAllocationProp()
    prop.type = _ALLOCATION_PINNED
    prop.requestedHandleTypes = _HANDLE_POSIX_FD if exportable else _HANDLE_NONE
    prop.location = MemLocation(_LOCATION_DEVICE, device)
    return prop


def load_cuda_driver() -> CudaDriver:
    """Load libcuda, which comes with the NVIDIA driver.

    Raises:
        CommError: this machine has no libcuda.
    """
    try:
        return CudaDriver(ctypes.CDLL(_SONAME))
    except OSError as error:
        raise CommError(f"cannot load {_SONAME} ({error}); install the NVIDIA driver") from error


def _bind(library: ctypes.CDLL, name: str, argtypes: tuple[Any, ...]) -> Any:
    function = getattr(library, name)
    function.argtypes = list(argtypes)
    function.restype = c_int
    return function
