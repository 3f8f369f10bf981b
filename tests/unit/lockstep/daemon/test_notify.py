"""The service manager hears when a daemon is ready, how it is, and that it progresses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.daemon.flags import FlagError
from lockstep.daemon.notify import Notifier
from tests.helpers.notify_socket import NotifySocket

LIMIT_S = 10.0
WATCHDOG_USEC = "40000"  # fed every 10 ms


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> NotifySocket:
    return NotifySocket(tmp_path if request.param == "path" else None)


def test_ready_status_and_stopping_are_one_datagram_each(manager: NotifySocket) -> None:
    with manager, Notifier({"NOTIFY_SOCKET": manager.name}) as notifier:
        notifier.status("starting,\n phase load")
        notifier.ready()
        notifier.stopping()
        assert manager.read() == ["STATUS=starting, phase load", "READY=1", "STOPPING=1"]


def test_the_same_status_is_not_sent_again(manager: NotifySocket) -> None:
    with manager, Notifier({"NOTIFY_SOCKET": manager.name}) as notifier:
        for text in ("a", "a", "b", "a"):
            notifier.status(text)
        assert manager.read() == ["STATUS=a", "STATUS=b", "STATUS=a"]


def test_without_a_service_manager_nothing_is_sent_and_nothing_fails() -> None:
    with Notifier({"WATCHDOG_USEC": WATCHDOG_USEC}) as notifier:
        notifier.ready()
        assert notifier.watchdog_s == 0


def run_until(
    notifier: Notifier, stalled_s: Callable[[], float], is_done: Callable[[], bool]
) -> None:
    async def run() -> None:
        running = asyncio.create_task(notifier.run(lambda: "fine", stalled_s))
        async with asyncio.timeout(LIMIT_S):
            while not is_done():
                await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_the_watchdog_is_fed_while_work_progresses_and_not_while_it_stalls() -> None:
    manager = NotifySocket()
    asked = []

    def stalled_s() -> float:
        asked.append(len(manager.read()))
        return 1.0 if len(asked) > 5 else 0.0

    environ = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": WATCHDOG_USEC}
    with manager, Notifier(environ) as notifier:
        run_until(notifier, stalled_s, lambda: len(asked) > 12)
        manager.read()
        # A look that found progress is followed by one WATCHDOG, one that found none by nothing.
        assert manager.messages.count("WATCHDOG=1") == 5


def test_without_a_watchdog_only_the_status_is_told(manager: NotifySocket) -> None:
    with manager, Notifier({"NOTIFY_SOCKET": manager.name}) as notifier:
        run_until(notifier, lambda: 0.0, lambda: bool(manager.read()))
        manager.read()
        assert manager.messages == ["STATUS=fine"]


def test_a_watchdog_of_another_process_is_not_ours(manager: NotifySocket) -> None:
    environ = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": WATCHDOG_USEC}
    with manager:
        with Notifier({**environ, "WATCHDOG_PID": str(os.getpid())}) as ours:
            assert ours.watchdog_s == 0.04
        with Notifier({**environ, "WATCHDOG_PID": "1"}) as theirs:
            assert theirs.watchdog_s == 0


@pytest.mark.parametrize(
    "environ",
    [
        {"NOTIFY_SOCKET": "vsock:2:1"},
        {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "30s"},
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(environ: dict[str, str]) -> None:
    bad = list(environ)[-1]
    with pytest.raises(FlagError, match=f"{bad} is {environ[bad]!r}"):
        Notifier(environ)


def test_a_message_that_nobody_takes_is_logged_and_harms_nothing(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as notifier:
        notifier.ready()
    assert "READY was not sent" in caplog.text
