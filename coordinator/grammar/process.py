"""One grammar process and the socket to it."""

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence

from coordinator.frames import framed, take_frames
from protos.lockstep.v1 import grammar_pb2

_READ_BYTES = 1 << 18
_HELLO = 0


class GrammarProcess:
    """Starts at once, in the background; requests sent before it is up wait. On the event loop.

    `take_reply` gets each answer. `take_loss` is told once if the process ends, or keeps silent
    longer than an answer may take: it gets the key whose turn it was (0: it never came up, or
    nobody's) and what happened. No answers follow.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        take_reply: Callable[[grammar_pb2.GrammarReply], None],
        take_loss: Callable[["GrammarProcess", int, str], None],
        start_limit_s: float,
        answer_limit_s: float,
    ) -> None:
        """`command` is the command line for the number of an inherited socket."""
        self._take_reply = take_reply
        self._take_loss = take_loss
        self._start_limit_s = start_limit_s
        self._answer_limit_s = answer_limit_s
        self._unanswered = deque([_HELLO])
        self._unsent: list[bytes] = []
        self._writer: asyncio.StreamWriter | None = None
        self._limit: asyncio.Timeout | None = None
        self.is_up = False
        self._task = asyncio.get_running_loop().create_task(self._run(command))

    @property
    def num_unanswered(self) -> int:
        return len(self._unanswered)

    def send(self, request: grammar_pb2.GrammarRequest, key: int) -> None:
        """Sends without blocking; `key` says whose answer is awaited, 0 that none is."""
        if key:
            self._unanswered.append(key)
            if len(self._unanswered) == 1:
                self._rearm(self._answer_limit_s)
        frame = framed(request)
        if self._writer is None:
            self._unsent.append(frame)
        elif not self._writer.is_closing():
            self._writer.write(frame)

    async def stop(self) -> None:
        """Kills it and waits for its end. Tells nobody."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self, command: Callable[[int], Sequence[str]]) -> None:
        problem = "ended"
        process = None
        try:
            async with asyncio.timeout(self._start_limit_s) as self._limit:
                process, ours = _start(command)
                reader, self._writer = await asyncio.open_connection(sock=ours)
                self._writer.write(b"".join(self._unsent))
                await self._read(reader)
        except TimeoutError:
            limit_s = self._answer_limit_s if self.is_up else self._start_limit_s
            problem = f"did not answer within {limit_s:g} s"
        except ConnectionError:
            pass
        except OSError as error:
            problem = f"could not be started: {error}"
        finally:
            # Whose turn it was is told as of now: requests may be sent while the process ends.
            key = self._unanswered[0] if self._unanswered else 0
            self._limit = None
            if self._writer is not None:
                self._writer.close()
            if process is not None:
                process.kill()
                await asyncio.to_thread(process.wait)
        self._take_loss(self, key, problem)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Until its end is closed."""
        buffer = bytearray()
        while received := await reader.read(_READ_BYTES):
            buffer += received
            for frame in take_frames(buffer):
                self._take(grammar_pb2.GrammarReply.FromString(frame))

    def _take(self, reply: grammar_pb2.GrammarReply) -> None:
        key = self._unanswered.popleft()
        assert key == reply.key, f"an answer for {reply.key}, awaited {key}"
        self._rearm(self._answer_limit_s if self._unanswered else None)
        if key == _HELLO:
            self.is_up = True
        else:
            self._take_reply(reply)

    def _rearm(self, limit_s: float | None) -> None:
        if self._limit is not None:
            now = asyncio.get_running_loop().time()
            self._limit.reschedule(None if limit_s is None else now + limit_s)


def _start(
    command: Callable[[int], Sequence[str]],
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process and our end of the socket to it. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        try:
            # Not the event loop's way to start one: that forks, beside threads of gRPC.
            fd = theirs.fileno()
            return subprocess.Popen(command(fd), pass_fds=(fd,)), ours
        except OSError:
            ours.close()
            raise


def grammar_command(model: os.PathLike[str], vocab_size: int, engine_fd: int) -> Sequence[str]:
    """The command line of a grammar process."""
    words = (engine_fd, os.getpid(), os.fspath(model), vocab_size)
    return [sys.executable, "-m", "coordinator.grammar", *map(str, words)]
