"""Waiting for several coroutines of which the first to end decides."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def run_until_first_ends(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Runs all; when one returns or raises the others are cancelled and awaited.

    Raises what the first raised. Errors of those that were cancelled are not lost: if the first
    returned without error, theirs is raised.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in [*ended, *tasks]:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
