"""Child processes that cannot outlive their parent, and a wait for whatever happens next."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from lockstep.daemon.parent_death import die_with_parent

# Ctrl-C, a service manager, a terminal that was closed.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class ChildExited:
    """A child ended; `code` is its exit code, or minus the number of the signal that ended it."""

    name: str
    pid: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            ending = f"was ended by {signal.Signals(-self.code).name}"
        else:
            ending = f"exited with {self.code}"
        return f"{self.name} (pid {self.pid}) {ending}"


@dataclass(frozen=True)
class SignalReceived:
    """SIGINT, SIGTERM or SIGHUP came to this process."""

    signum: int


Event = ChildExited | SignalReceived


class Processes:
    """The children of this process, by name. Used from its main thread only.

    Children run in process groups of their own, so that a terminal's Ctrl-C reaches only us, and
    get SIGKILL when we die. Made by `supervised_processes`.
    """

    def __init__(self, wakeup: socket.socket) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._events: deque[Event] = deque()
        self._wakeup = wakeup
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)

    def start(self, name: str, command: Sequence[str], environ: Mapping[str, str]) -> int:
        """Starts a child and returns its pid. `name` must be free."""
        assert name not in self._children
        parent = os.getpid()
        child = subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            process_group=0,
            # No thread of ours can hold a lock over this fork: this process has only the main one.
            preexec_fn=lambda: die_with_parent(parent),
        )
        self._children[name] = child
        return child.pid

    def is_running(self, name: str) -> bool:
        """True until the child's ChildExited has been returned."""
        return name in self._children

    def next_event(self, timeout_s: float) -> Event | None:
        """Waits for a child's end or a signal to us, at most `timeout_s`; None if neither came."""
        deadline = time.monotonic() + timeout_s
        while not self._events:
            self._collect_exits()
            remaining = deadline - time.monotonic()
            if self._events or remaining <= 0:
                break
            if self._selector.select(remaining):
                self._read_wakeup()
        return self._events.popleft() if self._events else None

    def signal(self, name: str, signum: int) -> None:
        """Sends a signal to a child, if it still runs."""
        child = self._children.get(name)
        if child is not None:
            child.send_signal(signum)  # nothing is sent once it has been waited for

    def stop_all(self, names: Sequence[str], grace_s: float) -> None:
        """SIGTERM to those children, SIGKILL after `grace_s`; returns when all are gone."""
        for name in names:
            self.signal(name, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for name in names:
            child = self._children.pop(name, None)
            if child is None:
                continue
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._events = deque(
            event
            for event in self._events
            if not (isinstance(event, ChildExited) and event.name in names)
        )

    def kill_all(self) -> None:
        """SIGKILL to every child; returns when all are gone."""
        self.stop_all(tuple(self._children), grace_s=0.0)

    def close(self) -> None:
        """Kills what still runs and frees the selector."""
        self.kill_all()
        self._selector.close()

    def _collect_exits(self) -> None:
        for name, child in list(self._children.items()):
            code = child.poll()
            if code is not None:
                del self._children[name]
                self._events.append(ChildExited(name, child.pid, code))

    def _read_wakeup(self) -> None:
        """Python writes the number of each signal that arrived into the wake-up socket."""
        for signum in self._wakeup.recv(4096):
            if signum in _STOP_SIGNALS:
                self._events.append(SignalReceived(signum))


@contextlib.contextmanager
def supervised_processes() -> Iterator[Processes]:
    """Takes over the stop signals and SIGCHLD of this process until the end of the block.

    Main thread only. On leaving, no child is left.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signums = (*_STOP_SIGNALS, signal.SIGCHLD)
    previous = {signum: signal.signal(signum, _only_wake) for signum in signums}
    previous_fd = signal.set_wakeup_fd(writer.fileno())
    processes = Processes(reader)
    try:
        yield processes
    finally:
        processes.close()
        signal.set_wakeup_fd(previous_fd)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        reader.close()
        writer.close()


def _only_wake(signum: int, frame: FrameType | None) -> None:
    """The wake-up socket carries the news; a handler must exist for it to be written."""
