"""Collectives over shared memory, for ranks of one host that compute on the CPU.

Every collective is a sequence of *rounds*. In round n a rank copies its part to its slot n % 2,
publishes n, waits until every rank has published n, and reads the others' slots. Two slots make
one wait a round enough: a rank that writes slot n % 2 has seen everybody publish n - 1, and
whoever published n - 1 had finished reading round n - 2.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tpcomm.call_log import CallLog, logged
from tpcomm.communicator import (
    AddRmsNorm,
    ReduceOp,
    as_bytes,
    check_layout,
    check_reducible,
    check_root,
    describe_ranks,
    gather_output,
)
from tpcomm.errors import CommAborted, CommError, CommTimeout
from tpcomm.norm_kernel import add_rms_norm_reference
from tpcomm.paths import CommPath
from tpcomm.records import ALL_REDUCE_MAX, BARRIER, BROADCAST, Recorded
from tpcomm.shm_segment import ABORT_WORD, ShmSegment, sequence_word, signature_word
from tpcomm.size_table import ALL_GATHER, ALL_REDUCE

_CPU = torch.device("cpu")
_REDUCTIONS = (ALL_REDUCE, ALL_REDUCE_MAX)  # by ReduceOp
_TWO_SHOT_BYTES = 384 << 10  # below it the second round costs more than it saves
_SPIN_POLLS = 100
_YIELD_SECONDS = 0.002
_SLEEP_SECONDS = 0.0001
_ABORT_CALLED = 1
_TIMED_OUT = 2  # plus the rank that gave up
_KINDS = ("barrier", "all_reduce sum", "all_reduce max", "all_gather", "broadcast")
_BARRIER, _REDUCE, _GATHER, _BROADCAST = 0, 1, 3, 4


class ShmCommunicator:
    """Ranks of one host, one segment. Summation runs in rank order, 16-bit floats in float32."""

    def __init__(
        self, name: str, rank: int, world_size: int, timeout_s: float, staging_bytes: int
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.log = CallLog("shm")
        self.stats = self.log.stats
        self._timeout_s = timeout_s
        self._segment = ShmSegment(name, rank, world_size, timeout_s, staging_bytes)
        self._words = self._segment.words
        self._num_rounds = 0
        self._closed = False
        self._lock = threading.Lock()  # abort comes from any thread, also while closing
        self._own_sequence = sequence_word(rank)
        self._peers = [r for r in range(world_size) if r != rank]
        # Polling pays while the peer runs on another core; on the same one it only delays it.
        fits = world_size <= len(os.sched_getaffinity(0))
        self._spin_polls = _SPIN_POLLS if fits else 1
        self.barrier(timeout_s)

    @logged
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        check_layout(tensor, _CPU)
        check_reducible(tensor)
        num_bytes = tensor.nbytes
        self.log.begin(_REDUCTIONS[op], self.stats.all_reduce, num_bytes)
        if num_bytes <= self._segment.slot_bytes:
            self._reduce_chunk(tensor, op)
            return tensor
        for chunk in _chunks(tensor.view(-1), self._segment.slot_bytes):
            self._reduce_chunk(chunk, op)
        return tensor

    @logged
    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        check_layout(tensor, _CPU)
        out = gather_output(tensor, out, self.world_size)
        self.log.begin(ALL_GATHER, self.stats.all_gather, tensor.nbytes)
        if tensor.numel() == 0:
            return out
        source, target = as_bytes(tensor), out.view(self.world_size, -1).view(torch.uint8)
        step = self._segment.slot_bytes
        for begin in range(0, tensor.nbytes, step):
            chunk = source[begin : begin + step]
            slots = self._exchange(chunk, _GATHER)
            for row, slot in zip(target, slots, strict=True):
                row[begin : begin + step].copy_(slot)
        return out

    def all_reduce_add_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        add_rms_norm: AddRmsNorm = add_rms_norm_reference,
    ) -> Tensor:
        return add_rms_norm(self.all_reduce(tensor), residual, weight, eps)

    @logged
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        check_layout(tensor, _CPU)
        check_root(root, self.world_size)
        self.log.begin(BROADCAST, self.stats.broadcast, tensor.nbytes)
        if tensor.numel() == 0:
            return tensor
        for chunk in _chunks(as_bytes(tensor), self._segment.slot_bytes):
            if self.rank == root:
                self._exchange(chunk, _BROADCAST + root)
                continue
            slots = self._exchange(None, _BROADCAST + root, chunk)
            chunk.copy_(slots[root])
        return tensor

    @logged
    def barrier(self, timeout_s: float) -> None:
        self._check_usable()
        self.log.begin(BARRIER, self.stats.barrier, 0)
        self._begin_round(_BARRIER)
        self._end_round(timeout_s)

    def paths(self) -> list[CommPath]:
        """This backend's only way."""
        return [CommPath("shm", _CPU, self.all_reduce)]

    def recorded(self) -> Recorded:
        return self.log.recorded()

    def abort(self) -> None:
        with self._lock:
            if not self._closed:
                self._words[ABORT_WORD] = _ABORT_CALLED

    def close(self) -> None:
        if self._closed:
            return
        try:
            if not self._words[ABORT_WORD]:
                self.barrier(self._timeout_s)
        finally:
            with self._lock:
                self._closed = True
                self._segment.close()

    def _reduce_chunk(self, chunk: Tensor, op: ReduceOp) -> None:
        if self.world_size > 2 and chunk.nbytes > _TWO_SHOT_BYTES:
            self._reduce_two_shot(chunk.view(-1), op)
        elif chunk.numel():
            _combine(self._exchange(chunk, _REDUCE + op), chunk, op)

    def _reduce_two_shot(self, chunk: Tensor, op: ReduceOp) -> None:
        """Each rank combines one part of all slots; a second round gathers the parts."""
        part = -(-chunk.numel() // self.world_size)
        slots = self._exchange(chunk, _REDUCE + op)
        mine = slice(self.rank * part, (self.rank + 1) * part)
        _combine([slot[mine] for slot in slots], chunk[mine], op)
        parts = self._exchange(chunk[mine], _REDUCE + op, chunk[:part])
        for peer in self._peers:
            theirs = chunk[peer * part : (peer + 1) * part]
            theirs.copy_(parts[peer][: theirs.numel()])

    def _exchange(
        self, source: Tensor | None, kind: int, like: Tensor | None = None
    ) -> list[Tensor]:
        """One round: put `source` in our slot and return every rank's, shaped as `like`.

        The views are valid until the next round begins.
        """
        self._check_usable()
        shape_of = like if like is not None else source
        assert shape_of is not None
        parity = (self._num_rounds + 1) & 1
        slots = self._segment.slots(shape_of.shape, shape_of.dtype, parity)
        own = slots[self.rank]
        signature = shape_of.nbytes << 8 | kind
        if source is not None:
            (own if source.shape == own.shape else own[: source.numel()]).copy_(source)
        self._begin_round(signature)
        self._end_round(self._timeout_s)
        return slots

    def _check_usable(self) -> None:
        if self._closed:
            raise CommError("the communicator is closed")
        if self._words[ABORT_WORD]:
            raise self._failure([], self._timeout_s)

    def _begin_round(self, signature: int) -> None:
        self._num_rounds += 1
        self._words[signature_word(self.rank, self._num_rounds & 1)] = signature
        self._words[self._own_sequence] = self._num_rounds  # publishes all stores above

    def _end_round(self, timeout_s: float) -> None:
        words, target = self._words, self._num_rounds
        parity = target & 1
        signature = words[signature_word(self.rank, parity)]
        for peer in self._peers:
            index = sequence_word(peer)
            if words[index] < target:
                self._wait(index, target, timeout_s)
            if words[signature_word(peer, parity)] != signature:
                self._refuse_mismatch(peer, parity)

    def _wait(self, index: int, target: int, timeout_s: float) -> None:
        """Spin, then yield the core, then sleep: a long wait must leave the core and the GIL."""
        words = self._words
        for _ in range(self._spin_polls):
            if words[index] >= target:
                return
        begin = time.monotonic()
        while words[index] < target:
            waited = time.monotonic() - begin
            if words[ABORT_WORD] or waited > timeout_s:
                raise self._failure(self._missing(target), timeout_s)
            if waited < _YIELD_SECONDS:
                os.sched_yield()
            else:
                time.sleep(_SLEEP_SECONDS)

    def _missing(self, target: int) -> list[int]:
        return [r for r in self._peers if self._words[sequence_word(r)] < target]

    def _failure(self, missing: Sequence[int], timeout_s: float) -> CommError:
        """Why this call cannot go on. A time-out is told to the peers by the abort word."""
        code = self._words[ABORT_WORD]
        if code == _ABORT_CALLED:
            return CommAborted(f"the group was aborted in call {self._num_rounds}")
        if code and not missing:
            return CommAborted(f"rank {code - _TIMED_OUT} gave up waiting; the group is void")
        if not code:
            self._words[ABORT_WORD] = _TIMED_OUT + self.rank
        return CommTimeout(
            f"{describe_ranks(missing)} did not arrive in call {self._num_rounds} within "
            f"{timeout_s:g} s",
            missing,
        )

    def _refuse_mismatch(self, peer: int, parity: int) -> None:
        ours = _describe_call(self._words[signature_word(self.rank, parity)])
        theirs = _describe_call(self._words[signature_word(peer, parity)])
        self.abort()
        raise CommError(
            f"ranks disagree in call {self._num_rounds}: rank {self.rank} issued {ours}, "
            f"rank {peer} {theirs}"
        )


def _chunks(flat: Tensor, num_bytes: int) -> list[Tensor]:
    step = num_bytes // flat.element_size()
    return [flat[begin : begin + step] for begin in range(0, flat.numel(), step)]


def _describe_call(signature: int) -> str:
    kind = signature & 0xFF
    name = _KINDS[min(kind, _BROADCAST)]
    root = f" from rank {kind - _BROADCAST}" if kind >= _BROADCAST else ""
    return f"{name}{root} of {signature >> 8} bytes"


def _combine(parts: Sequence[Tensor], out: Tensor, op: ReduceOp) -> None:
    """Combine `parts` in rank order into `out`; 16-bit floats sum in float32 and round once."""
    if op == ReduceOp.MAX:
        torch.maximum(parts[0], parts[1], out=out)
        for part in parts[2:]:
            torch.maximum(out, part, out=out)
    elif len(parts) == 2 or out.dtype.itemsize > 2:
        torch.add(parts[0], parts[1], out=out)  # one addition rounds once in any dtype
        for part in parts[2:]:
            out.add_(part)
    else:
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)
