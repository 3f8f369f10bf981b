"""When the RPC of a call hears what its samples have got."""

import asyncio
from collections.abc import Callable

from coordinator.frontend.stream import CallStreams, StreamUpdate


class Pace:
    """Holds wake-ups back until it is told to give them."""

    def __init__(self) -> None:
        self._held: list[Callable[[], None]] = []
        self.streams = CallStreams([2, 4], self._held.append)

    def wake_all(self) -> None:
        held = self._held.copy()
        self._held.clear()
        for wake in held:
            wake()

    async def taken(self) -> list[StreamUpdate] | None:
        """What `take` returns at once; None if it would wait."""
        taking = asyncio.create_task(self.streams.take())
        for _ in range(3):
            await asyncio.sleep(0)
        if taking.done():
            return taking.result()
        taking.cancel()
        return None


def test_first_tokens_are_taken_at_once_and_later_ones_in_their_turn() -> None:
    async def main() -> None:
        pace = Pace()
        first, second = pace.streams.samples
        first.push([], [])  # accepted
        assert await pace.taken() is None
        first.push([7], [])
        updates = await pace.taken()
        assert updates is not None and [update.token_ids for update in updates] == [[7]]
        pace.wake_all()  # late: there is nothing any more
        assert await pace.taken() is None
        first.push([8], [])
        assert await pace.taken() is None
        second.push([9], [])  # its first one takes along what waits
        updates = await pace.taken()
        assert updates is not None and [update.token_ids for update in updates] == [[8], [9]]
        pace.wake_all()
        first.push([10], [])
        second.push([11], [])
        assert await pace.taken() is None
        pace.wake_all()
        updates = await pace.taken()
        assert updates is not None and [update.token_ids for update in updates] == [[10], [11]]

    asyncio.run(main())
