"""The engine's working state: queue, slots, rows and blocks, and the commands not yet reported.

It applies what the scheduler decides and turns it into bytes; it reads no clock and does no I/O.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from coordinator import scheduler
from coordinator.batch_limits import BatchLimits
from coordinator.block_allocator import BlockAllocator
from coordinator.outstanding import Outstanding, SentCommand
from coordinator.prefix_cache import PrefixCache
from coordinator.request import Request, RequestState
from coordinator.request_queue import RequestQueue
from coordinator.sample_groups import SampleGroups
from coordinator.scheduler import Chunk, Prefill, Rows, Victim, Waiting
from coordinator.step_command import CommandEncoder, DeltaBuilder
from coordinator.tables import RowTable, SlotTable, table_digest

_BUSY_STEPS = 16  # in which nobody may have begun for the next one to be alone


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
        self.prefix_cache = PrefixCache(self.allocator, limits.block_size, limits.use_prefix_cache)
        self._groups = SampleGroups()
        self._num_preemptions = 0
        self._active: dict[int, Request] = {}  # by order: those that hold a slot
        self._prefilling: list[Request] = []
        self._maskless: set[Request] = set()  # without a slot and without a mask to begin with
        self._masked: list[Request] = []  # whose mask has come since the last command
        self.outstanding = Outstanding()
        self._prompt_tokens = Counter[int]()  # in chunks, by step
        self._encoder = CommandEncoder(epoch)
        self._last_opening = -_BUSY_STEPS  # step of the last command that opened a slot
        self.epoch = epoch

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self.queue) + len(self._groups) + len(self._maskless)

    @property
    def num_unreported(self) -> int:
        """Commands with steps whose results have not all come."""
        return len(self.outstanding)

    @property
    def last_command_id(self) -> int:
        return self._encoder.last_command_id

    @property
    def last_step(self) -> int:
        """Last step granted."""
        return self._encoder.last_step

    @property
    def last_reported_step(self) -> int:
        """Last step whose results have come."""
        return self.outstanding.last_reported_step

    @property
    def kv_usage(self) -> float:
        """Share of the usable blocks that sequences own, 0 to 1."""
        usable = self.allocator.num_usable_blocks
        return 1.0 - self.allocator.num_free_blocks / usable

    @property
    def num_tokens_to_prefill(self) -> int:
        """Of requests that hold a slot: tokens whose chunks are not sent yet."""
        return sum(request.prefill_len - request.num_prefilled for request in self._prefilling)

    def nth_to_begin(self, place: int) -> Request | None:
        """Of the requests that hold a slot: the first (0) got it before all others."""
        return next(islice(self._active.values(), place, None), None)

    @property
    def num_prompt_tokens_sent(self) -> int:
        """In chunks whose steps are not reported yet."""
        return self._prompt_tokens.total()

    def await_mask(self, request: Request) -> None:
        """Keeps a new constrained request out of the queue until `mask_came`."""
        self._maskless.add(request)

    def mask_came(self, request: Request) -> bool:
        """A request has got its next mask; True if it was the first, and the request is queued."""
        is_first = self.is_awaiting_first_mask(request)
        if request in self._maskless:
            self._maskless.remove(request)
            if is_first:
                self.enqueue(request)
            else:
                self.queue.put_back(request)
        elif request.slot and request.num_prefilled == request.prefill_len:
            self._masked.append(request)  # a row, or about to be one
        return is_first

    def is_awaiting_first_mask(self, request: Request) -> bool:
        """Not in the queue yet."""
        return request in self._maskless and request.state is RequestState.WAITING

    def enqueue(self, request: Request) -> None:
        """Puts a new request into the queue; a sample once it can share its leader's blocks."""
        self.prefix_cache.enrol(request)
        if not self._groups.try_hold(request):
            self.queue.append(request)

    def finish(self, request: Request) -> None:
        """Ends a request wherever it is. Its slot closes and its blocks are free with the next
        command; results that still come for it are to be dropped."""
        if request in self._maskless:
            self._maskless.remove(request)
        elif request.state in (RequestState.WAITING, RequestState.PREEMPTED):
            if not self._groups.remove(request):
                self.queue.remove(request)
        elif request.slot:
            self._leave_slot(request)
        request.finish()
        self._queue_samples([request])

    def next_command(self, with_table_digest: bool = False, max_steps: int = 1) -> bytes | None:
        """Plans, books and serialises the next command; None if no token would be computed.

        It grants up to `max_steps` steps, and one where a request should decode soon.
        """
        self._promote()
        self._complete_rows()
        masked = self._take_masked()
        if not (self._prefilling or len(self.queue) or self.rows.is_any_active):
            return None
        plan = self._plan(1 if self._prefilling or self._is_quick_to_begin else max_steps)
        if plan.num_steps > 1 and not plan.ends_prompts:
            plan = self._plan(1)  # what is left of a prompt goes on with the next step
        delta = DeltaBuilder()
        self._preempt(plan.preempted)
        # Before new blocks are given out, which may be cached ones that nobody owns.
        for chunk in plan.chunks:
            if chunk.is_admission:
                self._open_slot(chunk)
        self._give_row_blocks(plan.row_blocks, delta)
        for request in masked:
            if request.row >= 0:
                delta.grant_masked(request, self.limits.block_size)
        added = [self._add_chunk(chunk, delta) for chunk in plan.chunks]
        if plan.is_empty:
            return None
        decoding = self.rows.requests.copy()
        assert len(decoding) == plan.num_rows
        self.rows.advance(plan.num_steps)
        command = self._encode(delta, plan.num_steps, with_table_digest)
        self.outstanding.add(
            SentCommand(
                self.last_command_id,
                self.last_step - plan.num_steps + 1,
                plan.num_steps,
                decoding,
                [request for request in added if request.num_prefilled == request.prefill_len],
                bool(added),
                delta.scored,
            )
        )
        self._queue_samples(added)
        return command

    def heartbeat_command(self) -> bytes:
        """A command without steps that carries what has been closed, and the table digest."""
        return self._encode(DeltaBuilder(), 0, with_table_digest=True)

    def resolve(self, command_id: int, step: int) -> Sequence[Request]:
        """As `Outstanding.resolve`."""
        return self.outstanding.resolve(command_id, step)

    def pop_prompt_tokens(self, step: int) -> int:
        """How many tokens the chunks of a step held; asked once when it is reported."""
        return self._prompt_tokens.pop(step, 0)

    def take_num_preemptions(self) -> int:
        """Preemptions since the last call."""
        taken, self._num_preemptions = self._num_preemptions, 0
        return taken

    def check(self) -> None:
        """Audits blocks, slots and rows against each other; AssertionError says what is wrong."""
        self.allocator.check(request.block_ids for request in self._active.values())
        assert sorted(self.slots.open) == sorted(r.slot for r in self._active.values())
        assert all(self.slots.open[r.slot] is r for r in self._active.values())
        self.slots.check()
        assert len(self.slots.open) + self.slots.num_free_slots == self.limits.max_num_seqs
        assert all(r.row == row for row, r in enumerate(self.rows.requests))
        assert [len(r.block_ids) for r in self.rows.requests] == self.rows.num_blocks.tolist()

    @property
    def _is_quick_to_begin(self) -> bool:
        """Somebody could begin, and is to decode from the very next step on.

        Not if others have begun just before: under load, where somebody comes with nearly every
        step, there is no time for commands of one step. Who begins then waits for its second token.
        """
        may_begin = bool(len(self.queue)) and self.slots.num_free_slots > 0
        return may_begin and self.last_step - self._last_opening >= _BUSY_STEPS

    def _plan(self, num_steps: int) -> scheduler.StepPlan:
        return scheduler.plan_step(
            self._rows_view(),
            self._prefill_views(),
            self._victims(),
            self._waiting_views(),
            self.limits.capacity(
                self.allocator.num_free_blocks, self.slots.num_free_slots, num_steps
            ),
        )

    def _promote(self) -> None:
        """Sequences whose final chunk has been sent join the decode batch."""
        for request in self._prefilling:
            if request.num_prefilled == request.prefill_len:
                self.rows.append(request)
        self._prefilling = [r for r in self._prefilling if r.state is RequestState.PREFILLING]

    def _complete_rows(self) -> None:
        for request in self.rows.completed():
            self._leave_slot(request)
            request.complete()

    def _take_masked(self) -> list[Request]:
        """Rows that have got a mask since the last command; they may take one position more."""
        masked = [request for request in self._masked if request.row >= 0]
        self._masked = []
        for request in masked:
            self.rows.raise_limit(request)
        return masked

    def _rows_view(self) -> Rows:
        rows = self.rows
        return Rows(rows.orders, rows.next_positions, rows.limits, rows.num_blocks)

    def _prefill_views(self) -> list[Prefill]:
        return [
            Prefill(r.order, r.num_prefilled, r.prefill_len, len(r.block_ids))
            for r in self._prefilling
        ]

    def _victims(self) -> Iterator[Victim]:
        num_left = Counter[int]()  # owners that have left, by block
        for order in sorted(self._active, reverse=True):
            num_freed = 0
            for block_id in self._active[order].block_ids:
                num_left[block_id] += 1
                num_freed += num_left[block_id] == self.allocator.num_owners(block_id)
            yield Victim(order, num_freed)

    def _waiting_views(self) -> Iterator[Waiting]:
        for request in self.queue:
            if request.ready_after_step > self.last_reported_step:
                yield Waiting(request.order, request.num_to_prefill, is_ready=False)
                continue
            cached = self.prefix_cache.find(request)
            unowned = [block for block in cached if not self.allocator.num_owners(block)]
            yield Waiting(request.order, request.num_to_prefill, True, cached, unowned)

    def _preempt(self, orders: Sequence[int]) -> None:
        for order in orders:
            request = self._active[order]
            self._leave_slot(request)
            request.preempt(self.last_step)
            if request.constraint is not None and request.next_mask is None:
                self._maskless.add(request)  # nobody else waits for a grammar process with it
            else:
                self.queue.put_back(request)
            self._num_preemptions += 1

    def _open_slot(self, chunk: Chunk) -> None:
        self._last_opening = self.last_step
        request = self.queue.take(chunk.order)
        request.open_slot(self.slots.take(), chunk.start)
        self.prefix_cache.take(request, chunk.cached_blocks)
        self.slots.put(request)
        self._active[request.order] = request
        self._prefilling.append(request)

    def _add_chunk(self, chunk: Chunk, delta: DeltaBuilder) -> Request:
        request = self._active[chunk.order]
        if chunk.is_admission:
            delta.open(request, self._take_blocks(chunk.num_new_blocks), self.limits.block_size)
        else:
            self._give_blocks(request, chunk.num_new_blocks, delta)
        self._prompt_tokens[self.last_step + 1] += chunk.length
        delta.add_chunk(request, chunk.start, chunk.length)
        request.num_prefilled += chunk.length
        self.prefix_cache.chunk_sent(request)
        request.num_partial_chunks += request.num_prefilled < request.prefill_len
        return request

    def _queue_samples(self, leaders: Sequence[Request]) -> None:
        for sample in self._groups.take_ready(leaders):
            self.queue.append(sample)

    def _give_row_blocks(self, needs: Sequence[tuple[int, int]], delta: DeltaBuilder) -> None:
        block_ids = iter(self._take_blocks(sum(count for _, count in needs)))
        num_blocks = self.rows.num_blocks
        for order, count in needs:
            request = self._active[order]
            delta.append_blocks(request, list(islice(block_ids, count)), self.limits.block_size)
            num_blocks[request.row] += count

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
        self.prefix_cache.leave(request)
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
