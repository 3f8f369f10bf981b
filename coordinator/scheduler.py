"""Who runs in the next step. A pure function over plain data: no clock, no I/O, no state.

Every decoding sequence gets its token in every step; what is left of the token budget goes to
prompts, oldest first, in chunks. So a prompt of any length never stops the running streams, and at
most one prompt is partly prefilled at a time: a chunk either ends its prompt or uses up the budget.

Blocks are taken when positions need them, for upper bounds of the positions. When none is left the
youngest sequence loses its place and is computed again later. The oldest always goes on, and since
a request that could not fit alone is refused on arrival, it always can.

Tokens that the prefix cache holds cost nothing of the token budget, and of the blocks only those
that had no owner: they counted as free until somebody took them over.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.tables import IntArray


@dataclass(frozen=True)
class Rows:
    """The decode batch, one entry a row; int64 `[num_rows]` each, read only.

    `next_positions` are upper bounds, at most `limits`: where they are equal the row waits for its
    next mask and takes no part. `orders` names the requests: smaller is older. Age is that of
    precedence.py everywhere here, where urgency counts like an earlier arrival.
    """

    orders: IntArray
    next_positions: IntArray
    limits: IntArray
    num_blocks: IntArray


@dataclass(frozen=True)
class Prefill:
    """A sequence whose prompt is partly prefilled."""

    order: int
    num_prefilled: int
    prefill_len: int
    num_blocks: int


@dataclass(frozen=True)
class Victim:
    """A sequence with blocks, and how many become free if it leaves after all younger ones."""

    order: int
    num_freed: int


@dataclass(frozen=True)
class Waiting:
    """A request in the queue; `is_ready` is False while results of a preempted one are awaited.

    `cached_blocks` hold its first tokens, fewer than `prefill_len`; those that nobody owns are in
    `unowned_blocks` too.
    """

    order: int
    prefill_len: int
    is_ready: bool = True
    cached_blocks: Sequence[int] = ()
    unowned_blocks: Sequence[int] = ()


@dataclass(frozen=True)
class Capacity:
    """What there is to give; `num_steps` is the most that a command may grant."""

    num_free_blocks: int
    num_free_slots: int
    block_size: int
    max_batch_tokens: int
    watermark_blocks: int  # kept free on admission while others run, so that they can grow
    num_steps: int = 1


@dataclass(frozen=True)
class Chunk:
    """Tokens start..start+length-1 of a sequence, and how many new blocks it needs before.

    An admission takes over `cached_blocks` and starts behind them.
    """

    order: int
    start: int
    length: int
    num_new_blocks: int
    is_admission: bool = False
    cached_blocks: Sequence[int] = ()


@dataclass(frozen=True)
class StepPlan:
    """What the next command does. Requests are named by their order.

    The counts add up if the preempted leave first, then cached blocks are taken over, then new
    blocks given.
    """

    preempted: list[int] = field(default_factory=list)  # youngest first
    row_blocks: list[tuple[int, int]] = field(default_factory=list)  # (order, new blocks)
    chunks: list[Chunk] = field(default_factory=list)
    num_rows: int = 0
    num_steps: int = 1
    num_active: int = 0  # rows that have a position to compute
    ends_prompts: bool = True  # nobody is left with a part of its prompt to prefill

    @property
    def is_empty(self) -> bool:
        """No token would be computed."""
        return self.num_active == 0 and not self.chunks


def plan_step(
    rows: Rows,
    prefills: Sequence[Prefill],
    victims: Iterable[Victim],
    waiting: Iterable[Waiting],
    capacity: Capacity,
) -> StepPlan:
    """Decides the next command.

    `prefills` and `waiting` are oldest first, `victims` (all that hold blocks) youngest first; the
    last two are read no further than needed. The caller guarantees that any one request fits the
    cache alone and that rows fit the token budget.
    """
    num_steps = _useful_steps(rows, capacity.num_steps)
    needs = _row_needs(rows, num_steps, capacity.block_size)
    num_free = capacity.num_free_blocks - sum(count for _, count in needs)
    if num_free < 0 and num_steps > 1:  # nobody loses its place for steps granted ahead
        num_steps = 1
        needs = _row_needs(rows, num_steps, capacity.block_size)
        num_free = capacity.num_free_blocks - sum(count for _, count in needs)
    preempted: list[int] = []
    if num_free < 0:
        oldest = min([*rows.orders.tolist(), *(prefill.order for prefill in prefills)])
        needs, preempted, num_free = _share_blocks(needs, victims, oldest, capacity.num_free_blocks)
    gone = set(preempted)
    going_on = [prefill for prefill in prefills if prefill.order not in gone]
    num_rows = len(rows.orders) - (len(preempted) - (len(prefills) - len(going_on)))
    room = _Room(
        num_free,
        capacity.num_free_slots + len(preempted),
        capacity.max_batch_tokens - num_rows,
    )
    chunks, all_end = _continue_prefills(going_on, room, capacity.block_size)
    if all_end and not preempted:
        admitted, all_end = _admit(waiting, num_rows + len(going_on), room, capacity)
        chunks += admitted
    num_active = _num_active(rows, gone)
    return StepPlan(preempted, needs, chunks, num_rows, num_steps, num_active, all_end)


@dataclass
class _Room:
    """What is left for prompts while a plan is made."""

    num_free_blocks: int
    num_free_slots: int
    token_budget: int
    claimed: set[int] = field(default_factory=set)  # cached blocks that are free no more

    def admits(self) -> bool:
        """A further request may get a slot and a token."""
        return self.token_budget > 0 and self.num_free_slots > 0

    def take(self, chunk: Chunk) -> None:
        """A chunk is planned."""
        self.num_free_blocks -= chunk.num_new_blocks
        self.token_budget -= chunk.length
        self.num_free_slots -= chunk.is_admission

    def claim(self, block_ids: Sequence[int]) -> None:
        """Cached blocks without an owner get one."""
        self.claimed.update(block_ids)
        self.num_free_blocks -= len(block_ids)


def _useful_steps(rows: Rows, most: int) -> int:
    """Steps that some row has a position for, at least 1."""
    if most == 1 or not len(rows.orders):
        return 1
    return max(1, min(most, int((rows.limits - rows.next_positions).max())))


def _num_active(rows: Rows, gone: set[int]) -> int:
    """Rows that have a position to compute and are not among the preempted."""
    is_active = rows.next_positions < rows.limits
    if not gone:  # as nearly always: nothing is listed
        return int(np.count_nonzero(is_active))
    return sum(order not in gone for order in rows.orders[is_active].tolist())


def _row_needs(rows: Rows, num_steps: int, block_size: int) -> list[tuple[int, int]]:
    """(order, blocks missing for the granted positions) of the rows that lack some, by age."""
    ends = np.minimum(rows.next_positions + num_steps, rows.limits)
    missing = -(-ends // block_size) - rows.num_blocks
    lacking = np.flatnonzero(missing > 0)
    if not len(lacking):
        return []
    by_age = lacking[np.argsort(rows.orders[lacking])]
    return list(zip(rows.orders[by_age].tolist(), missing[by_age].tolist(), strict=True))


def _share_blocks(
    needs: list[tuple[int, int]], victims: Iterable[Victim], oldest: int, num_free: int
) -> tuple[list[tuple[int, int]], list[int], int]:
    """Serves needs from the oldest on, taking the place of the youngest when blocks run out.

    Returns (granted needs, preempted, blocks left). A sequence never takes the place of an older
    one: it gives up its own instead.
    """
    youngest_first = iter(victims)
    granted: list[tuple[int, int]] = []
    preempted: list[int] = []
    for order, count in needs:
        if order in preempted:
            continue
        while num_free < count:
            victim = next(youngest_first)
            assert victim.order != oldest, "a request that does not fit alone was admitted"
            preempted.append(victim.order)
            num_free += victim.num_freed
            if victim.order == order:
                break
        else:
            granted.append((order, count))
            num_free -= count
    return granted, preempted, num_free


def _continue_prefills(
    prefills: Sequence[Prefill], room: _Room, block_size: int
) -> tuple[list[Chunk], bool]:
    """Chunks of the prompts that have begun, and whether all of them end with these."""
    chunks: list[Chunk] = []
    for prefill in prefills:
        reach = (prefill.num_blocks + room.num_free_blocks) * block_size
        end = min(prefill.prefill_len, prefill.num_prefilled + room.token_budget, reach)
        length = end - prefill.num_prefilled
        if length > 0:
            num_new = max(-(-end // block_size) - prefill.num_blocks, 0)
            chunks.append(Chunk(prefill.order, prefill.num_prefilled, length, num_new))
            room.take(chunks[-1])
        if end < prefill.prefill_len:
            return chunks, False  # nobody younger goes first
    return chunks, True


def _admit(
    waiting: Iterable[Waiting], num_active: int, room: _Room, capacity: Capacity
) -> tuple[list[Chunk], bool]:
    """First chunks of waiting requests, first come first served, and whether their prompts end."""
    chunks: list[Chunk] = []
    if not room.admits():
        return chunks, True
    for request in waiting:
        # The whole prompt must have room, though blocks are taken chunk by chunk: a prompt that
        # begins without would be preempted half-way by the rows it runs beside.
        num_cached = len(request.cached_blocks)
        claims = [block for block in request.unowned_blocks if block not in room.claimed]
        num_needed = -(-request.prefill_len // capacity.block_size) - num_cached + len(claims)
        reserve = capacity.watermark_blocks if num_active or chunks else 0
        if not request.is_ready or num_needed + reserve > room.num_free_blocks:
            break
        start = num_cached * capacity.block_size
        length = min(request.prefill_len - start, room.token_budget)
        num_new = -(-(start + length) // capacity.block_size) - num_cached
        chunks.append(
            Chunk(
                request.order,
                start,
                length,
                num_new,
                is_admission=True,
                cached_blocks=request.cached_blocks,
            )
        )
        room.claim(claims)
        room.take(chunks[-1])
        if start + length < request.prefill_len:
            return chunks, False
        if not room.admits():
            break
    return chunks, True
