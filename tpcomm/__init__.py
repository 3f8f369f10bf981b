"""Collectives for tensor parallelism: NCCL by ctypes, shared memory and gloo on CPU."""

from tpcomm.communicator import (
    DEFAULT_STAGING_BYTES,
    CommStats,
    Communicator,
    OpStats,
    ReduceOp,
)
from tpcomm.errors import (
    CommAborted,
    CommError,
    CommTimeout,
    CudaDriverError,
    NcclError,
    NcclNotFound,
)
from tpcomm.factory import BACKENDS, create_communicator, create_group_id
from tpcomm.paths import HasTable
from tpcomm.preflight import PathReport, preflight
from tpcomm.records import CollectiveRecord, Recorded

__all__ = [
    "BACKENDS",
    "DEFAULT_STAGING_BYTES",
    "CollectiveRecord",
    "CommAborted",
    "CommError",
    "CommStats",
    "CommTimeout",
    "Communicator",
    "CudaDriverError",
    "HasTable",
    "NcclError",
    "NcclNotFound",
    "OpStats",
    "PathReport",
    "Recorded",
    "ReduceOp",
    "create_communicator",
    "create_group_id",
    "preflight",
]
