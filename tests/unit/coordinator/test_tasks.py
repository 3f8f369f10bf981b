"""The first to end decides, and nobody is left behind."""

import asyncio

import pytest

from coordinator.tasks import run_until_first_ends


def test_the_first_to_return_ends_the_others() -> None:
    ended: list[str] = []

    async def short() -> None:
        await asyncio.sleep(0)

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("long")

    asyncio.run(run_until_first_ends(long(), short()))
    assert ended == ["long"]


def test_the_first_error_is_raised() -> None:
    async def fail(message: str, delay: float) -> None:
        await asyncio.sleep(delay)
        raise ValueError(message)

    with pytest.raises(ValueError, match="first"):
        asyncio.run(run_until_first_ends(fail("second", 30), fail("first", 0)))


def test_an_error_on_the_way_out_is_not_lost() -> None:
    async def short() -> None:
        await asyncio.sleep(0)

    async def clumsy() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("broke while leaving")

    with pytest.raises(ValueError, match="broke while leaving"):
        asyncio.run(run_until_first_ends(clumsy(), short()))


def test_cancelling_it_cancels_all() -> None:
    ended: list[int] = []

    async def long(number: int) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(number)

    async def run() -> None:
        task = asyncio.create_task(run_until_first_ends(long(1), long(2)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert sorted(ended) == [1, 2]
