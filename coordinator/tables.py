"""The host mirror of the tables that live on every worker's device."""

import hashlib
import heapq
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from coordinator.request import Request

IntArray = npt.NDArray[np.int64]


class RowTable:
    """The decode batch: rows 0..num_rows-1, kept without holes.

    A row that leaves is replaced by the last one, so a change costs two entries and never a
    rewrite. The columns are numpy so that planning looks at all rows at once.
    """

    def __init__(self, max_num_rows: int) -> None:
        self.requests: list[Request] = []
        self._columns = np.zeros((5, max_num_rows), dtype=np.int64)
        self._touched: set[int] = set()

    @property
    def num_rows(self) -> int:
        return len(self.requests)

    @property
    def orders(self) -> IntArray:
        return self._columns[0, : self.num_rows]

    @property
    def next_positions(self) -> IntArray:
        """Upper bounds of the positions that the next step computes."""
        return self._columns[1, : self.num_rows]

    @property
    def limits(self) -> IntArray:
        """Positions that may be granted lie below: all that are needed, or that have a mask."""
        return self._columns[2, : self.num_rows]

    @property
    def num_blocks(self) -> IntArray:
        return self._columns[3, : self.num_rows]

    @property
    def final_limits(self) -> IntArray:
        return self._columns[4, : self.num_rows]

    @property
    def is_any_active(self) -> bool:
        """Some row has a position that may be granted."""
        return bool((self.next_positions < self.limits).any())

    def append(self, request: Request) -> None:
        """Puts a request that has been prefilled into the batch, as the last row."""
        row = self.num_rows
        self.requests.append(request)
        self._columns[:, row] = (
            request.order,
            request.prefill_len,
            request.top_limit,
            len(request.block_ids),
            request.final_limit,
        )
        self._touched.add(row)
        request.start_decoding(row)

    def remove(self, request: Request) -> None:
        """Takes a request out; the last row moves into its place."""
        row = request.row
        assert self.requests[row] is request
        last = self.requests.pop()
        last_row = len(self.requests)
        if last is not request:
            self.requests[row] = last
            self._columns[:, row] = self._columns[:, last_row]
            last.row = row
            self._touched.add(row)
        self._touched.add(last_row)
        request.row = -1

    def completed(self) -> list[Request]:
        """The rows whose every position has been granted."""
        if not self.requests:
            return []
        is_complete = self.next_positions >= self.final_limits
        return [self.requests[row] for row in np.flatnonzero(is_complete)]

    def raise_limit(self, request: Request) -> None:
        """A row has got a mask: one more position may be granted."""
        request.num_masked += 1
        self.limits[request.row] = request.top_limit

    def advance(self, num_steps: int) -> None:
        """Raises the upper bounds after that many steps have been granted."""
        advanced = self.next_positions + num_steps
        np.minimum(advanced, self.limits, out=self.next_positions)

    def take_changes(self) -> list[tuple[int, int]]:
        """Changed (row, slot) pairs since the last call; slot 0 for rows no longer in use."""
        changes = [
            (row, self.requests[row].slot if row < self.num_rows else 0)
            for row in sorted(self._touched)
        ]
        self._touched.clear()
        return changes


class SlotTable:
    """Which slots are free and what the open ones hold. Slot 0 is the dummy."""

    def __init__(self, max_num_seqs: int) -> None:
        self.open: dict[int, Request] = {}
        self._free = list(range(1, max_num_seqs + 1))
        self._closed: list[int] = []
        self.num_constrained = 0
        """Open slots whose request needs a mask for each of its tokens."""

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """The lowest free slot."""
        return heapq.heappop(self._free)

    def put(self, request: Request) -> None:
        """A request opens the slot that it has taken."""
        self.open[request.slot] = request
        self.num_constrained += request.constraint is not None

    def close(self, slot: int) -> None:
        """Frees a slot. It may be taken at once: a command closes slots before it opens any."""
        self.num_constrained -= self.open.pop(slot).constraint is not None
        heapq.heappush(self._free, slot)
        self._closed.append(slot)

    def check(self) -> None:
        """AssertionError if what is counted is not what there is."""
        constrained = [r for r in self.open.values() if r.constraint is not None]
        assert self.num_constrained == len(constrained)

    def take_closed(self) -> list[int]:
        """Slots closed since the last call."""
        closed, self._closed = self._closed, []
        return closed


def table_digest(row_slots: Iterable[int], open_requests: Iterable[Request]) -> bytes:
    """Digest of the whole tables, 8 bytes, as docs/protocol.md defines it.

    `row_slots` are the slots of rows 0, 1, ...; `open_requests` are in rising order of slot.
    """
    slots = list(row_slots)
    words = [len(slots), *slots]
    for request in open_requests:
        words += (
            request.slot,
            request.prompt_len,
            request.prefill_len,
            request.limit,
            len(request.block_ids),
        )
        words += request.block_ids
    return hashlib.blake2b(np.array(words, dtype="<i4").tobytes(), digest_size=32).digest()[:8]
