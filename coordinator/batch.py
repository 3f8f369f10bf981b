"""The engine's working state: queue, slots, rows and blocks, and the commands not yet reported.

It applies what the scheduler decides and turns it into bytes; it reads no clock and does no I/O.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordinator.block_allocator import BlockAllocator
from coordinator.errors import ProtocolBroken
from coordinator.request import Request, RequestState
from coordinator.request_queue import RequestQueue
from coordinator.scheduler import Capacity, Chunk, Prefill, Rows, StepPlan, Waiting, plan_step
from coordinator.step_command import CommandEncoder, DeltaBuilder, SentStep
from coordinator.tables import RowTable, SlotTable, table_digest

_STEPS_PER_COMMAND = 1
_WATERMARK_SHARE = 100  # one block in a hundred stays free on admission


@dataclass(frozen=True)
class BatchLimits:
    """Sizes that hold for an epoch; `num_blocks` counts the dummy."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int


class Batch:
    """Requests of one epoch from the queue to their last result. Owned by the event loop."""

    def __init__(
        self, epoch: int, limits: BatchLimits, block_order: Sequence[int] | None = None
    ) -> None:
        self.limits = limits
        self.allocator = BlockAllocator(limits.num_blocks, block_order)
        self.rows = RowTable(limits.max_num_seqs)
        self.slots = SlotTable(limits.max_num_seqs)
        self.queue = RequestQueue()
        self._num_preemptions = 0
        self.last_reported_step = 0
        self._active: dict[int, Request] = {}  # by order: those that hold a slot
        self._prefilling: list[Request] = []
        self._sent: deque[SentStep] = deque()
        self._encoder = CommandEncoder(epoch)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._active)

    @property
    def num_unreported(self) -> int:
        """Commands with steps whose results have not all come."""
        return len(self._sent)

    @property
    def last_command_id(self) -> int:
        return self._encoder.last_command_id

    @property
    def last_step(self) -> int:
        """Last step granted."""
        return self._encoder.last_step

    @property
    def kv_usage(self) -> float:
        """Share of the usable blocks that are taken, 0 to 1."""
        usable = self.allocator.num_usable_blocks
        return 1.0 - self.allocator.num_free_blocks / usable

    def enqueue(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        self.queue.append(request)

    def finish(self, request: Request) -> None:
        """Ends a request wherever it is. Its slot closes and its blocks are free with the next
        command; results that still come for it are to be dropped."""
        if request.state in (RequestState.WAITING, RequestState.PREEMPTED):
            self.queue.remove(request)
        elif request.slot:
            self._leave_slot(request)
        request.finish()

    def next_command(self, with_table_digest: bool = False) -> bytes | None:
        """Plans, books and serialises the next command; None if no token would be computed."""
        self._promote()
        plan = plan_step(
            self._rows_view(), self._prefill_views(), self._waiting_views(), self._capacity()
        )
        delta = DeltaBuilder()
        self._make_room(plan)
        for order, count in plan.row_blocks:
            request = self._active[order]
            self._give_blocks(request, count, delta)
            self.rows.num_blocks[request.row] += count
        added = [self._add_chunk(chunk, delta) for chunk in plan.chunks]
        if plan.is_empty:
            return None
        rows = self.rows.requests.copy()
        assert len(rows) == plan.num_rows
        self.rows.advance(_STEPS_PER_COMMAND)
        command = self._encode(delta, _STEPS_PER_COMMAND, with_table_digest)
        self._sent.append(
            SentStep(
                self.last_command_id,
                self.last_step - _STEPS_PER_COMMAND + 1,
                _STEPS_PER_COMMAND,
                rows,
                [request for request in added if request.num_prefilled == request.prefill_len],
            )
        )
        return command

    def heartbeat_command(self) -> bytes:
        """A command without steps that carries what has been closed, and the table digest."""
        return self._encode(DeltaBuilder(), 0, with_table_digest=True)

    def resolve(self, command_id: int, step: int) -> Sequence[Request]:
        """The requests that a result speaks of, in the order of its entries.

        Results come once each and in order; ProtocolBroken otherwise.
        """
        expected = self.last_reported_step + 1
        if not self._sent or self._sent[0].command_id != command_id or step != expected:
            awaited = self._sent[0].command_id if self._sent else "none"
            raise ProtocolBroken(
                f"result of command {command_id} step {step}; awaited: command {awaited} "
                f"step {expected}"
            )
        sent = self._sent[0]
        self.last_reported_step = step
        if step == sent.last_step:
            self._sent.popleft()
        return sent.entries(step)

    def take_num_preemptions(self) -> int:
        """Preemptions since the last call."""
        taken, self._num_preemptions = self._num_preemptions, 0
        return taken

    def check(self) -> None:
        """Audits blocks, slots and rows against each other; AssertionError says what is wrong."""
        self.allocator.check(request.block_ids for request in self._active.values())
        assert sorted(self.slots.open) == sorted(r.slot for r in self._active.values())
        assert all(self.slots.open[r.slot] is r for r in self._active.values())
        assert len(self.slots.open) + self.slots.num_free_slots == self.limits.max_num_seqs
        assert all(r.row == row for row, r in enumerate(self.rows.requests))
        assert [len(r.block_ids) for r in self.rows.requests] == self.rows.num_blocks.tolist()

    def _promote(self) -> None:
        """Sequences whose final chunk has been sent join the decode batch."""
        for request in self._prefilling:
            if request.num_prefilled == request.prefill_len:
                self.rows.append(request)
        self._prefilling = [r for r in self._prefilling if r.state is RequestState.PREFILLING]

    def _rows_view(self) -> Rows:
        rows = self.rows
        return Rows(rows.orders, rows.next_positions, rows.final_limits, rows.num_blocks)

    def _prefill_views(self) -> list[Prefill]:
        return [
            Prefill(r.order, r.num_prefilled, r.prefill_len, len(r.block_ids))
            for r in self._prefilling
        ]

    def _waiting_views(self) -> Iterator[Waiting]:
        for request in self.queue:
            is_ready = request.ready_after_step <= self.last_reported_step
            yield Waiting(request.order, request.num_to_prefill, is_ready)

    def _capacity(self) -> Capacity:
        return Capacity(
            num_free_blocks=self.allocator.num_free_blocks,
            num_free_slots=self.slots.num_free_slots,
            block_size=self.limits.block_size,
            max_batch_tokens=self.limits.max_batch_tokens,
            watermark_blocks=max(1, self.limits.num_blocks // _WATERMARK_SHARE),
            num_steps=_STEPS_PER_COMMAND,
        )

    def _make_room(self, plan: StepPlan) -> None:
        for order in plan.completed:
            request = self._active[order]
            self._leave_slot(request)
            request.complete()
        for order in plan.preempted:
            request = self._active[order]
            self._leave_slot(request)
            request.preempt(self.last_step)
            self.queue.put_back(request)
            self._num_preemptions += 1

    def _add_chunk(self, chunk: Chunk, delta: DeltaBuilder) -> Request:
        if chunk.is_admission:
            request = self.queue.take(chunk.order)
            request.open_slot(self.slots.take())
            self.slots.open[request.slot] = request
            self._active[request.order] = request
            self._prefilling.append(request)
            delta.open(request, self._take_blocks(chunk.num_new_blocks), self.limits.block_size)
        else:
            request = self._active[chunk.order]
            self._give_blocks(request, chunk.num_new_blocks, delta)
        delta.add_chunk(request, chunk.start, chunk.length)
        request.num_prefilled += chunk.length
        return request

    def _give_blocks(self, request: Request, count: int, delta: DeltaBuilder) -> None:
        if count:
            delta.append_blocks(request, self._take_blocks(count), self.limits.block_size)

    def _take_blocks(self, count: int) -> list[int]:
        block_ids = self.allocator.try_allocate(count)
        assert block_ids is not None, "the scheduler gave away more blocks than there are"
        return block_ids

    def _leave_slot(self, request: Request) -> None:
        if request.row >= 0:
            self.rows.remove(request)
        else:
            self._prefilling.remove(request)
        self.slots.close(request.slot)
        del self._active[request.order]
        self.allocator.release(request.block_ids)
        request.block_ids = []

    def _encode(self, delta: DeltaBuilder, num_steps: int, with_table_digest: bool) -> bytes:
        packed = delta.build(self.slots.take_closed(), self.rows.take_changes(), self.rows.num_rows)
        digest = b""
        if with_table_digest:
            row_slots = (request.slot for request in self.rows.requests)
            open_requests = [self.slots.open[slot] for slot in sorted(self.slots.open)]
            digest = table_digest(row_slots, open_requests)
        return self._encoder.encode(packed, num_steps, digest)
