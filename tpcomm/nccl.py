"""Collectives over NCCL, on the current CUDA stream.

The communicator is blocking: a non-blocking one answers "in progress" to every collective and
starts a thread for each. So nothing here waits inside NCCL without a limit of ours: joining and
destroying run in threads that are left behind when they hang, and hung kernels are waited for by
event. An abort is seen by the caller even while the abort call itself does not return, as it does
not while a captured graph still holds the communicator.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_void_p

import torch
from torch import Tensor

from tpcomm import norm_kernel
from tpcomm.communicator import (
    AddRmsNorm,
    CommStats,
    ReduceOp,
    as_bytes,
    check_layout,
    check_reducible,
    check_root,
    gather_output,
)
from tpcomm.errors import CommAborted, CommError, CommTimeout
from tpcomm.graph_timer import measure_in_graph
from tpcomm.nccl_api import DATA_TYPES, DataType, Nccl, RedOp
from tpcomm.paths import CommPath
from tpcomm.record_kernels import begin_stamp, end_stamp
from tpcomm.records import ALL_REDUCE_MAX, BARRIER, BROADCAST, Recorded
from tpcomm.ring_reader import RingReader
from tpcomm.size_table import ALL_GATHER, ALL_REDUCE
from tpcomm.staging_tables import make_ring
from tpcomm.triton_language import HAS_TRITON

_RED_OPS = {ReduceOp.SUM: RedOp.SUM, ReduceOp.MAX: RedOp.MAX}
_REDUCTIONS = {ReduceOp.SUM: ALL_REDUCE, ReduceOp.MAX: ALL_REDUCE_MAX}
_POLL_SECONDS = 0.0001


class NcclCommunicator:
    """One NCCL communicator. Collectives are enqueued and return at once; safe in graph capture.

    Shapes that a graph captures should have been used once before capture, since NCCL connects
    and allocates at first use. Without Triton nothing is recorded; `is_recording` switches it off
    to measure what it costs.
    """

    def __init__(
        self,
        nccl: Nccl,
        unique_id: bytes,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.nccl = nccl
        self.timeout_s = timeout_s
        self.stats = CommStats()
        self._aborted = threading.Event()
        self._failed = False
        self._lock = threading.Lock()
        self._all_reduce = nccl.function("ncclAllReduce")
        self._token = torch.ones(1, dtype=torch.float32, device=device)
        self.is_recording = HAS_TRITON
        self._state = torch.zeros(1, dtype=torch.int64, device=device)
        self._ring = make_ring(device)
        # The handle is taken by whoever destroys or aborts it, so that this happens once.
        self._handle: c_void_p | None = self._join_group(unique_id)
        self._reader = RingReader(device) if HAS_TRITON else None
        self._warm_up()

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        check_layout(tensor, self.device)
        check_reducible(tensor)
        self._usable()
        self.stats.all_reduce.add(tensor.nbytes)
        if tensor.numel():
            self._recorded_all_reduce(tensor, op)
        return tensor

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        check_layout(tensor, self.device)
        self._usable()
        out = gather_output(tensor, out, self.world_size)
        self.stats.all_gather.add(tensor.nbytes)
        if tensor.numel():
            with self._stamped(ALL_GATHER, tensor.nbytes):
                self._enqueue_all_gather(tensor, out)
        return out

    def all_reduce_add_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        add_rms_norm: AddRmsNorm = norm_kernel.add_rms_norm_reference,
    ) -> Tensor:
        # Our own norm has the same bits alone as fused: which of the two is faster must not show.
        if HAS_TRITON and not norm_kernel.fused_refusal(tensor, residual, weight):
            add_rms_norm = norm_kernel.add_rms_norm
        return add_rms_norm(self.all_reduce(tensor), residual, weight, eps)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        check_layout(tensor, self.device)
        check_root(root, self.world_size)
        handle = self._usable()
        self.stats.broadcast.add(tensor.nbytes)
        if tensor.numel():
            raw = as_bytes(tensor)
            pointer, count = raw.data_ptr(), raw.numel()
            with self._stamped(BROADCAST, count):
                self.nccl.function("ncclBroadcast")(
                    pointer, pointer, count, DataType.UINT8, root, handle, self._stream()
                )
        return tensor

    def barrier(self, timeout_s: float) -> None:
        """Wait on the host until every rank's current stream has reached this point."""
        self._usable()
        self.stats.barrier.add(0)
        with self._stamped(BARRIER, 0):
            self._enqueue_all_reduce(self._token, ReduceOp.MAX)
        self.wait_stream(timeout_s, "barrier")

    def wait_stream(self, timeout_s: float, what: str) -> None:
        """Wait until the current stream is idle.

        Raises:
            CommTimeout: the stream is still busy after `timeout_s` seconds.
            CommAborted: `abort` was called meanwhile.
        """
        try:
            self._wait_idle(timeout_s, what)
        except CommTimeout:
            self._failed = True
            raise
        self._usable()

    def paths(self) -> list[CommPath]:
        """NCCL alone."""
        return [
            CommPath(
                "nccl",
                self.device,
                self._recorded_all_reduce,
                wait=lambda timeout_s: self.wait_stream(timeout_s, "NCCL"),
                measure=measure_in_graph,
            )
        ]

    def recorded(self) -> Recorded:
        return Recorded() if self._reader is None else self._reader.read(self._record_tables()[1])

    def abort(self) -> None:
        """Free kernels that hang, in a thread of its own.

        Watch an event of the stuck stream rather than that thread: ncclCommAbort does not return
        while a captured graph that used the communicator still exists.
        """
        self._aborted.set()
        handle = self._take_handle()
        if handle is not None:
            self._in_thread("ncclCommAbort", lambda: self.nccl.function("ncclCommAbort")(handle))

    def close(self) -> None:
        """Barrier, then destroy. After a failure nothing is destroyed: peers may never answer.

        Drop graphs that captured this communicator first, or CommTimeout says so.
        """
        if self._handle is None or self._aborted.is_set():
            return
        if self._failed:
            self._take_handle()
            return
        self.barrier(self.timeout_s)
        handle = self._take_handle()
        destroy = self._in_thread(
            "ncclCommDestroy", lambda: self.nccl.function("ncclCommDestroy")(handle)
        )
        destroy.join(self.timeout_s)
        if destroy.is_alive():
            raise CommTimeout(
                f"ncclCommDestroy did not return within {self.timeout_s:g} s; drop the graphs "
                "that captured this communicator before closing it"
            )

    def _join_group(self, unique_id: bytes) -> c_void_p:
        outcome: list[c_void_p | RuntimeError] = []

        def join() -> None:
            try:
                with torch.cuda.device(self.device):  # the current device is a thread's own
                    handle = self.nccl.init_rank(unique_id, self.rank, self.world_size)
                outcome.append(handle)
            except RuntimeError as error:  # NcclError, or CUDA's own
                outcome.append(error)

        thread = self._in_thread("ncclCommInitRank", join)
        thread.join(self.timeout_s)
        if thread.is_alive():
            raise CommTimeout(
                f"rank {self.rank}: the {self.world_size} ranks did not all join NCCL within "
                f"{self.timeout_s:g} s"
            )
        result = outcome[0]
        if isinstance(result, RuntimeError):
            raise result
        return result

    def _warm_up(self) -> None:
        """One small sum, so that a group that cannot talk fails here and not in the first step."""
        self._recorded_all_reduce(self._token, ReduceOp.SUM)
        self.wait_stream(self.timeout_s, "the first all-reduce")
        total = self._token.item()
        if total != self.world_size:
            raise CommError(f"the first all-reduce gave {total}, not {self.world_size}")

    def _recorded_all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        with self._stamped(_REDUCTIONS[op], tensor.nbytes):
            return self._enqueue_all_reduce(tensor, op)

    def _record_tables(self) -> tuple[Tensor, Tensor]:
        """State, which counts calls, and ring."""
        return self._state, self._ring

    @contextmanager
    def _stamped(self, operation: str, num_bytes: int) -> Iterator[None]:
        """Around NCCL's call, in stream order. One that raises stays without end."""
        if not self.is_recording:
            yield
            return
        tables = self._record_tables()
        with torch.cuda.device(self.device):  # Triton launches on the current device
            begin_stamp(*tables, operation, num_bytes).run()
            yield
            end_stamp(*tables).run()

    def _enqueue_all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        pointer = tensor.data_ptr()
        dtype, count = DATA_TYPES[tensor.dtype], tensor.numel()
        handle, stream = self._usable(), self._stream()
        self._all_reduce(pointer, pointer, count, dtype, _RED_OPS[op], handle, stream)
        return tensor

    def _enqueue_all_gather(self, tensor: Tensor, out: Tensor) -> None:
        source, target, count = tensor.data_ptr(), out.data_ptr(), tensor.nbytes
        handle, stream = self._usable(), self._stream()
        gather = self.nccl.function("ncclAllGather")
        gather(source, target, count, DataType.UINT8, handle, stream)

    def _wait_idle(self, timeout_s: float, what: str) -> None:
        if not self._stream_is_idle(timeout_s):
            raise CommTimeout(f"{what} did not complete within {timeout_s:g} s on {self.device}")

    def _stream_is_idle(self, timeout_s: float) -> bool:
        """Wait for the current stream; False after `timeout_s`, CommAborted on abort."""
        event = torch.cuda.current_stream(self.device).record_event()
        deadline = time.monotonic() + timeout_s
        while not event.query():
            if self._aborted.is_set():
                raise CommAborted("aborted while waiting for the device")
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _usable(self) -> c_void_p:
        if self._aborted.is_set():
            raise CommAborted("the communicator was aborted")
        handle = self._handle
        if handle is None:
            raise CommError("the communicator is closed")
        if self._failed:
            raise CommError("the communicator timed out before and is void")
        return handle

    def _take_handle(self) -> c_void_p | None:
        with self._lock:
            handle, self._handle = self._handle, None
            return handle

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _in_thread(self, name: str, call: Callable[[], None]) -> threading.Thread:
        """A daemon thread: it is left behind if NCCL never returns."""
        thread = threading.Thread(target=call, name=name, daemon=True)
        thread.start()
        return thread
