"""Streams are woken at once while the loop has room, and in cycles when it has not."""

import asyncio

from coordinator.frontend.pacer import Pacer


class CpuClock:
    """CPU time as a test says it went by."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_idle_loop_wakes_at_once() -> None:
    async def main() -> None:
        woken: list[int] = []
        pacer = Pacer(CpuClock())
        for number in range(3):
            pacer.add(lambda number=number: woken.append(number))  # type: ignore[misc]
            pacer.settle()
            assert woken == list(range(number + 1))

    asyncio.run(main())


def test_work_before_a_cycle_delays_nobody_in_it() -> None:
    async def main() -> None:
        cpu, woken = CpuClock(), list[int]()
        pacer = Pacer(cpu)
        cpu.seconds = 3600.0  # a long prompt was read, say
        for number in range(2):
            pacer.add(lambda number=number: woken.append(number))  # type: ignore[misc]
            pacer.settle()
            assert woken == list(range(number + 1))

    asyncio.run(main())


def test_busy_loop_wakes_once_a_cycle_and_forgets_nobody() -> None:
    async def main() -> None:
        cpu, woken = CpuClock(), asyncio.Queue[int]()
        pacer = Pacer(cpu)
        pacer.add(lambda: woken.put_nowait(0))
        pacer.settle()
        woke_at = asyncio.get_running_loop().time()
        assert woken.get_nowait() == 0
        cpu.seconds = 0.004
        for number in (1, 2):
            pacer.add(lambda number=number: woken.put_nowait(number))  # type: ignore[misc]
            pacer.settle()
        assert woken.empty()
        cpu.seconds = 0.005  # it goes on working before the cycle is over
        async with asyncio.timeout(20.0):
            assert [await woken.get(), await woken.get()] == [1, 2]
        assert asyncio.get_running_loop().time() - woke_at >= 0.010

    asyncio.run(main())


def test_cycle_is_bounded_whatever_the_work() -> None:
    async def main() -> None:
        cpu, woken = CpuClock(), asyncio.Event()
        pacer = Pacer(cpu)
        pacer.add(lambda: None)
        pacer.settle()
        cpu.seconds = 3600.0
        pacer.add(woken.set)
        pacer.settle()
        assert not woken.is_set()
        async with asyncio.timeout(20.0):
            await woken.wait()

    asyncio.run(main())
