"""libnccl by ctypes: one row a C function, its prototype (nccl.h, 2.28) beside it.

Calls release the GIL. Every function that returns an ncclResult_t raises NcclError unless it
returns ncclSuccess. Functions that only newer releases have are bound where they exist; asking
for a missing one raises NcclError naming the release in use.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import torch

from tpcomm.errors import NcclError

UNIQUE_ID_BYTES = 128
UNDEFINED_INT = -(2**31)  # NCCL_CONFIG_UNDEF_INT
# Window collectives of 2.28.3 to 2.30.4 start before the previous kernel's writes are visible:
# https://github.com/NVIDIA/nccl commit 2948185, first released in 2.30.7.
FIRST_SOUND_WINDOW_VERSION = 23007


class NcclUniqueId(ctypes.Structure):
    """`typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;` passed by value."""

    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


class NcclConfig(ctypes.Structure):
    """`ncclConfig_t` as release 2.28 lays it out.

    NCCL copies min(size, its own size) and resets every field newer than `version`, so this one
    layout serves older and newer releases.
    """

    _fields_ = [
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cgaClusterSize", c_int),
        ("minCTAs", c_int),
        ("maxCTAs", c_int),
        ("netName", c_char_p),
        ("splitShare", c_int),
        ("trafficClass", c_int),
        ("commName", c_char_p),
        ("collnetEnable", c_int),
        ("CTAPolicy", c_int),
        ("shrinkShare", c_int),
        ("nvlsCTAs", c_int),
        ("nChannelsPerNetPeer", c_int),
        ("nvlinkCentricSched", c_int),
    ]


class DataType(enum.IntEnum):
    """`ncclDataType_t`."""

    INT8 = 0
    UINT8 = 1
    INT32 = 2
    UINT32 = 3
    INT64 = 4
    UINT64 = 5
    FLOAT16 = 6
    FLOAT32 = 7
    FLOAT64 = 8
    BFLOAT16 = 9
    FLOAT8_E4M3 = 10
    FLOAT8_E5M2 = 11


class RedOp(enum.IntEnum):
    """`ncclRedOp_t`."""

    SUM = 0
    PROD = 1
    MAX = 2
    MIN = 3
    AVG = 4


class WindowFlag(enum.IntFlag):
    """`NCCL_WIN_*` of ncclCommWindowRegister."""

    DEFAULT = 0
    COLL_SYMMETRIC = 1


DATA_TYPES: Mapping[torch.dtype, DataType] = {
    torch.int8: DataType.INT8,
    torch.uint8: DataType.UINT8,
    torch.int32: DataType.INT32,
    torch.uint32: DataType.UINT32,
    torch.int64: DataType.INT64,
    torch.uint64: DataType.UINT64,
    torch.float16: DataType.FLOAT16,
    torch.float32: DataType.FLOAT32,
    torch.float64: DataType.FLOAT64,
    torch.bfloat16: DataType.BFLOAT16,
    torch.float8_e4m3fn: DataType.FLOAT8_E4M3,
    torch.float8_e5m2: DataType.FLOAT8_E5M2,
}

# ncclComm_t, ncclWindow_t and cudaStream_t are opaque pointers; enums are int.
_INT_P, _PTR_P = POINTER(c_int), POINTER(c_void_p)
_ID_P, _CONFIG_P = POINTER(NcclUniqueId), POINTER(NcclConfig)
FUNCTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # ncclResult_t ncclGetVersion(int* version)
    ("ncclGetVersion", (_INT_P,)),
    # ncclResult_t ncclGetUniqueId(ncclUniqueId* uniqueId)
    ("ncclGetUniqueId", (_ID_P,)),
    # const char* ncclGetErrorString(ncclResult_t result)
    ("ncclGetErrorString", (c_int,)),
    # const char* ncclGetLastError(ncclComm_t comm)
    ("ncclGetLastError", (c_void_p,)),
    # ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId commId, int rank)
    ("ncclCommInitRank", (_PTR_P, c_int, NcclUniqueId, c_int)),
    # ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int nranks, ncclUniqueId commId,
    #     int rank, ncclConfig_t* config)
    ("ncclCommInitRankConfig", (_PTR_P, c_int, NcclUniqueId, c_int, _CONFIG_P)),
    # ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm,
    #     ncclConfig_t* config)
    ("ncclCommSplit", (c_void_p, c_int, c_int, _PTR_P, _CONFIG_P)),
    # ncclResult_t ncclCommFinalize(ncclComm_t comm)
    ("ncclCommFinalize", (c_void_p,)),
    # ncclResult_t ncclCommDestroy(ncclComm_t comm)
    ("ncclCommDestroy", (c_void_p,)),
    # ncclResult_t ncclCommAbort(ncclComm_t comm)
    ("ncclCommAbort", (c_void_p,)),
    # ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* asyncError)
    ("ncclCommGetAsyncError", (c_void_p, _INT_P)),
    # ncclResult_t ncclCommCount(const ncclComm_t comm, int* count)
    ("ncclCommCount", (c_void_p, _INT_P)),
    # ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device)
    ("ncclCommCuDevice", (c_void_p, _INT_P)),
    # ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank)
    ("ncclCommUserRank", (c_void_p, _INT_P)),
    # ncclResult_t ncclMemAlloc(void** ptr, size_t size)
    ("ncclMemAlloc", (_PTR_P, c_size_t)),
    # ncclResult_t ncclMemFree(void* ptr)
    ("ncclMemFree", (c_void_p,)),
    # ncclResult_t ncclCommRegister(const ncclComm_t comm, void* buff, size_t size, void** handle)
    ("ncclCommRegister", (c_void_p, c_void_p, c_size_t, _PTR_P)),
    # ncclResult_t ncclCommDeregister(const ncclComm_t comm, void* handle)
    ("ncclCommDeregister", (c_void_p, c_void_p)),
    # ncclResult_t ncclAllReduce(const void* sendbuff, void* recvbuff, size_t count,
    #     ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
    ("ncclAllReduce", (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)),
    # ncclResult_t ncclReduce(const void* sendbuff, void* recvbuff, size_t count,
    #     ncclDataType_t datatype, ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream)
    ("ncclReduce", (c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_void_p, c_void_p)),
    # ncclResult_t ncclReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount,
    #     ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
    ("ncclReduceScatter", (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)),
    # ncclResult_t ncclAllGather(const void* sendbuff, void* recvbuff, size_t sendcount,
    #     ncclDataType_t datatype, ncclComm_t comm, cudaStream_t stream)
    ("ncclAllGather", (c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p)),
    # ncclResult_t ncclBroadcast(const void* sendbuff, void* recvbuff, size_t count,
    #     ncclDataType_t datatype, int root, ncclComm_t comm, cudaStream_t stream)
    ("ncclBroadcast", (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)),
    # ncclResult_t ncclSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int peer,
    #     ncclComm_t comm, cudaStream_t stream)
    ("ncclSend", (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)),
    # ncclResult_t ncclRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int peer,
    #     ncclComm_t comm, cudaStream_t stream)
    ("ncclRecv", (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)),
    # ncclResult_t ncclGroupStart()
    ("ncclGroupStart", ()),
    # ncclResult_t ncclGroupEnd()
    ("ncclGroupEnd", ()),
)
OPTIONAL_FUNCTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # ncclResult_t ncclCommInitRankScalable(ncclComm_t* newcomm, int nranks, int myrank, int nId,
    #     ncclUniqueId* commIds, ncclConfig_t* config)
    ("ncclCommInitRankScalable", (_PTR_P, c_int, c_int, c_int, _ID_P, _CONFIG_P)),
    # ncclResult_t ncclCommShrink(ncclComm_t comm, int* excludeRanksList, int excludeRanksCount,
    #     ncclComm_t* newcomm, ncclConfig_t* config, int shrinkFlags)
    ("ncclCommShrink", (c_void_p, _INT_P, c_int, _PTR_P, _CONFIG_P, c_int)),
    # ncclResult_t ncclCommRevoke(ncclComm_t comm, int revokeFlags)
    ("ncclCommRevoke", (c_void_p, c_int)),
    # ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void* buff, size_t size,
    #     ncclWindow_t* win, int winFlags)
    ("ncclCommWindowRegister", (c_void_p, c_void_p, c_size_t, _PTR_P, c_int)),
    # ncclResult_t ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t win)
    ("ncclCommWindowDeregister", (c_void_p, c_void_p)),
    # ncclResult_t ncclWinGetUserPtr(ncclComm_t comm, ncclWindow_t win, void** outUserPtr)
    ("ncclWinGetUserPtr", (c_void_p, c_void_p, _PTR_P)),
    # ncclResult_t ncclGetPeerDevicePointer(ncclWindow_t window, size_t offset, int peer,
    #     void** outPtr)
    ("ncclGetPeerDevicePointer", (c_void_p, c_size_t, c_int, _PTR_P)),
    # ncclResult_t ncclAlltoAll(const void* sendbuff, void* recvbuff, size_t count,
    #     ncclDataType_t datatype, ncclComm_t comm, cudaStream_t stream)
    ("ncclAlltoAll", (c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p)),
)
_TEXT_FUNCTIONS = ("ncclGetErrorString", "ncclGetLastError")


class Nccl:
    """One loaded libnccl. `version` is major * 10000 + minor * 100 + patch; `path` the file."""

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self.path = path
        self._functions: dict[str, Any] = {}
        for name, argtypes in FUNCTIONS:
            self._functions[name] = self._bind(library, name, argtypes)
        for name, argtypes in OPTIONAL_FUNCTIONS:
            if hasattr(library, name):
                self._functions[name] = self._bind(library, name, argtypes)
        version = c_int()
        self.function("ncclGetVersion")(ctypes.byref(version))
        self.version = version.value

    def function(self, name: str) -> Any:
        """The bound C function, for callers on a hot path.

        Raises:
            NcclError: this release does not have it.
        """
        found = self._functions.get(name)
        if found is None:
            raise NcclError(5, f"NCCL {self.version} ({self.path}) does not have it", name)
        return found

    def has(self, name: str) -> bool:
        return name in self._functions

    def get_unique_id(self) -> bytes:
        """A new ncclUniqueId. This process listens for the group until it has formed."""
        unique_id = NcclUniqueId()
        self.function("ncclGetUniqueId")(ctypes.byref(unique_id))
        return bytes(unique_id)

    def init_rank(self, unique_id: bytes, rank: int, world_size: int) -> c_void_p:
        """Make a blocking communicator on the calling thread's CUDA device.

        Blocks until every rank has called, with no limit of its own.
        """
        comm = c_void_p()
        config = default_config()
        self.function("ncclCommInitRankConfig")(
            ctypes.byref(comm),
            world_size,
            NcclUniqueId.from_buffer_copy(unique_id),
            rank,
            ctypes.byref(config),
        )
        return comm

    def error_text(self, code: int) -> str:
        """NCCL's name for the code, and the last error it noted in this process."""
        text = self._functions["ncclGetErrorString"](code).decode(errors="replace")
        last = self._functions["ncclGetLastError"](None).decode(errors="replace").strip()
        return f"{text} ({last})" if last else text

    def _bind(self, library: ctypes.CDLL, name: str, argtypes: tuple[Any, ...]) -> Any:
        function = getattr(library, name)
        function.argtypes = list(argtypes)
        if name in _TEXT_FUNCTIONS:
            function.restype = c_char_p
            return function

        def check(code: int, _: Any, __: Any) -> int:
            if code != 0:
                raise NcclError(code, self.error_text(code), name)
            return code

        function.restype = c_int
        function.errcheck = check
        return function


def default_config() -> NcclConfig:
    """NCCL_CONFIG_INITIALIZER of release 2.28, blocking."""
    config = NcclConfig()
    for field in NcclConfig._fields_:
        if field[1] is c_int:
            setattr(config, field[0], UNDEFINED_INT)
    config.size = ctypes.sizeof(NcclConfig)
    config.magic = 0xCAFEBEEF
    config.version = 22809
    config.blocking = 1
    return config
