"""A frontend process and the socket to it.

What is sent are frames (coordinator/frames.py) of a FrontendMessage or an EngineMessage.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from coordinator.config import CoordinatorConfig
from coordinator.errors import FrontendLost
from coordinator.frames import framed, take_frames
from protos.lockstep.v1 import engine_pb2

_READ_BYTES = 1 << 18
_MAX_UNSENT_BYTES = 256 << 20
_SILENCE_MARGIN_S = 2.0
_EXIT_TIMEOUT_S = 5.0


class FrontendLink:
    """Frames to and from one frontend. `take_message` is called for each as it comes."""

    def __init__(
        self,
        index: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        take_message: Callable[[int, engine_pb2.FrontendMessage], None],
    ) -> None:
        self.index = index
        self._reader = reader
        self._writer = writer
        self._take_message = take_message

    def send(self, *messages: engine_pb2.EngineMessage) -> None:
        """Sends without blocking. A frontend that stops reading is dropped, not waited for.

        What is sent together is one write: each is a call to the kernel and wakes the frontend.
        """
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self._writer.transport.abort()
            return
        self._writer.write(b"".join(framed(message) for message in messages))

    async def read_all(self) -> None:
        """Reads until the frontend closes its end."""
        buffer = bytearray()
        try:
            while received := await self._reader.read(_READ_BYTES):
                buffer += received
                for frame in take_frames(buffer):
                    self._take_message(self.index, engine_pb2.FrontendMessage.FromString(frame))
        except ConnectionError:
            return

    def close(self) -> None:
        self._writer.close()


async def open_link(
    index: int,
    sock: socket.socket,
    take_message: Callable[[int, engine_pb2.FrontendMessage], None],
) -> FrontendLink:
    """A link over one end of a socket pair, which it owns from now on."""
    reader, writer = await asyncio.open_connection(sock=sock)
    return FrontendLink(index, reader, writer, take_message)


class Process(Protocol):
    """What is needed of a child process."""

    async def wait(self) -> int: ...

    def kill(self) -> None: ...


class ChildProcess:
    """A child of this process, to be awaited on the event loop.

    The event loop's own way to start one forks, beside threads of gRPC, and the copy may crash
    before it becomes another program; subprocess.Popen does not fork.
    """

    def __init__(self, words: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        self._process = subprocess.Popen(words, pass_fds=pass_fds)

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        if self._process.poll() is None:
            has_ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            pid_fd = os.pidfd_open(self._process.pid)
            loop.add_reader(pid_fd, has_ended.set)
            try:
                await has_ended.wait()
            finally:
                loop.remove_reader(pid_fd)
                os.close(pid_fd)
        return self._process.wait()

    def kill(self) -> None:
        """Does nothing to one that has ended."""
        self._process.kill()


class FrontendProcess:
    """A frontend that this engine has started."""

    def __init__(self, link: FrontendLink, process: Process) -> None:
        self.link = link
        self._process = process
        self.is_draining = False

    async def run(self) -> None:
        """Reads until the frontend ends; raises FrontendLost unless it was told to."""
        await self.link.read_all()
        try:
            return_code = await asyncio.wait_for(self._process.wait(), _EXIT_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()  # it has let go of its socket and hangs
            return_code = await self._process.wait()
        if not self.is_draining or return_code != 0:
            raise FrontendLost(self.link.index, return_code)

    def drain(self, pause_s: float, budget_s: float) -> None:
        """Tells it to refuse new calls after a pause, and to end with its last stream."""
        self.is_draining = True
        drain = engine_pb2.Drain(budget_seconds=budget_s, pause_seconds=pause_s)
        self.link.send(engine_pb2.EngineMessage(drain=drain))

    async def kill(self) -> None:
        """Ends it now."""
        self.link.close()
        self._process.kill()
        await self._process.wait()


StartFrontend = Callable[
    [int, CoordinatorConfig, int, Callable[[int, engine_pb2.FrontendMessage], None]],
    Awaitable[FrontendProcess],
]


async def start_frontend(
    index: int,
    config: CoordinatorConfig,
    port: int,
    take_message: Callable[[int, engine_pb2.FrontendMessage], None],
) -> FrontendProcess:
    """Starts `python -m coordinator.frontend` at the other end of a socket pair."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        command = frontend_command(config, theirs.fileno(), port)
        process = ChildProcess(command, (theirs.fileno(),))
    return FrontendProcess(await open_link(index, ours, take_message), process)


def frontend_command(config: CoordinatorConfig, engine_fd: int, port: int) -> Sequence[str]:
    """The command line of a frontend that is to serve on `port`."""
    flags: dict[str, object] = {
        "engine-fd": engine_fd,
        "engine-pid": os.getpid(),
        "model": config.model,
        "served-model-name": config.served_model_name,
        "host": config.host,
        "port": port,
        "silence-timeout": config.step_timeout + _SILENCE_MARGIN_S,
        "num-frontends": config.num_frontends,
        "slow-client-seconds": config.slow_client_seconds,
        "tls-cert": config.tls_cert,
        "tls-key": config.tls_key,
        "tls-client-ca": config.tls_client_ca,
        "api-keys": config.api_keys,
        "max-connections": config.max_connections,
        "max-concurrent-streams": config.max_concurrent_streams,
        "log-format": config.log_format,
        "otlp-endpoint": config.otlp_endpoint,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "coordinator.frontend", *words]
