"""How the end of a grammar process is told."""

import asyncio
import socket
import sys
from collections.abc import Callable, Sequence

import pytest

from coordinator.grammar.process import GrammarProcess
from protos.lockstep.v1 import grammar_pb2

LIMIT_S = 60.0
SAYS_HELLO_AND_ENDS = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(bytes(4))"


async def loss_of(
    command: Callable[[int], Sequence[str]],
    meanwhile: Callable[[GrammarProcess], None] = lambda process: None,
) -> tuple[int, str]:
    """The key and the problem that are told; `meanwhile` is called while the process ends."""
    told: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
    to_thread = asyncio.to_thread

    async def observed(wait: Callable[[], int]) -> int:
        meanwhile(process)
        return await to_thread(wait)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", observed)
        process = GrammarProcess(
            command,
            lambda reply: None,
            lambda lost, key, problem: told.set_result((key, problem)),
            LIMIT_S,
            LIMIT_S,
        )
        async with asyncio.timeout(LIMIT_S):
            return await told


def test_a_request_that_is_sent_while_a_process_ends_is_not_blamed_for_the_end() -> None:
    def send(process: GrammarProcess) -> None:
        process.send(grammar_pb2.GrammarRequest(open=grammar_pb2.OpenGrammar(key=7)), 7)

    def command(fd: int) -> Sequence[str]:
        return [sys.executable, "-c", SAYS_HELLO_AND_ENDS, str(fd)]

    assert asyncio.run(loss_of(command, send)) == (0, "ended")


def test_a_process_that_cannot_be_started_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []

    def pair(*arguments: int) -> tuple[socket.socket, socket.socket]:
        pairs.append(make(*arguments))
        return pairs[-1]

    async def script() -> tuple[int, str]:
        monkeypatch.setattr(socket, "socketpair", pair)  # the event loop has its own by now
        return await loss_of(lambda fd: ["/nowhere"])

    make = socket.socketpair
    key, problem = asyncio.run(script())
    assert key == 0 and problem.startswith("could not be started")
    assert [end.fileno() for end in pairs[0]] == [-1, -1]
