"""What the service manager hears from the engine."""

import asyncio
import os
import signal

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.notify import Notifier
from protos.lockstep.v1 import engine_pb2
from tests.helpers.engine_harness import LIMIT_S, make_submit
from tests.helpers.notify_socket import NotifySocket
from tests.helpers.whole_engine import running_engine


async def until_heard(manager: NotifySocket, beginning: str) -> None:
    """Waits until the service manager hears such a message that it has not heard yet."""
    async with asyncio.timeout(LIMIT_S):
        while not any(message.startswith(beginning) for message in manager.read()):
            await asyncio.sleep(0.002)


def test_the_watchdog_is_fed_only_while_steps_progress_and_again_after_a_stall() -> None:
    async def run() -> None:
        environ = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "200000"}  # a stall: 50 ms
        with Notifier(environ) as notifier:
            async with running_engine(notifier, step_timeout=60.0) as running:
                first = await running.frontend()
                await until_heard(manager, "STATUS=starting")
                assert "READY=1" not in manager.messages
                first.send(listening=engine_pb2.Listening(port=4711))
                await until_heard(manager, "READY=1")
                await until_heard(manager, "WATCHDOG=1")

                running.workers[1].settings.is_stalled = True
                first.send(submit=make_submit(1, [1], 20))
                async with asyncio.timeout(LIMIT_S):
                    while running.engine._status.stalled_s() < 0.1:
                        await asyncio.sleep(0.01)
                manager.read()
                async with asyncio.timeout(LIMIT_S):
                    while running.engine._status.stalled_s() < 0.5:
                        assert "WATCHDOG=1" not in manager.read()
                        await asyncio.sleep(0.01)

                running.workers[1].release_stall()
                await until_heard(manager, "WATCHDOG=1")
                os.kill(os.getpid(), signal.SIGTERM)
                await until_heard(manager, "STOPPING=1")
                assert any(m.startswith("STATUS=serving fake on 2 rank") for m in manager.messages)
                first.end(0)
                assert await running.result() == ExitCode.CLEAN

    with NotifySocket() as manager:
        asyncio.run(run())


def test_the_service_manager_is_told_why_the_group_cannot_answer() -> None:
    async def run() -> None:
        environ = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "200000"}
        with Notifier(environ) as notifier:
            async with running_engine(notifier) as running:
                first = await running.ready()
                first.send(submit=make_submit(1, [1], 2))
                await running.workers[1].stop()
                async with asyncio.timeout(LIMIT_S):
                    while not any("rank 1 lost" in message for message in manager.messages):
                        manager.read()
                        await asyncio.sleep(0.002)
                # A group that starts again owes nothing: its start has limits of its own.
                await until_heard(manager, "WATCHDOG=1")

    with NotifySocket() as manager:
        asyncio.run(run())
