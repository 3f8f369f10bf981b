"""Real grammar processes: answers, and one bad constraint that harms no other."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.grammar.pool import GrammarPool
from protos.lockstep.v1 import generate_pb2, grammar_pb2
from tests.helpers.fake_tables import allowed_ids
from tests.unit.coordinator.frontend.small_tokenizers import STREAMING_KINDS, write_checkpoint
from tests.unit.coordinator.grammar.small_grammar import (
    EOS,
    VOCAB_SIZE,
    read_tokenizer,
    write_model,
)

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


class Answers:
    """A pool and what it has answered."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self._replies: asyncio.Queue[grammar_pb2.GrammarReply] = asyncio.Queue()
        settings = {"num_processes": 1} | settings
        self.pool = GrammarPool(model, take_reply=self._replies.put_nowait, **settings)

    def open(self, key: int, regex: str, output_ids: Sequence[int] = ()) -> None:
        self.pool.open(key, generate_pb2.SamplingParams(regex=regex), output_ids, VOCAB_SIZE)

    async def next(self) -> grammar_pb2.GrammarReply:
        async with asyncio.timeout(LIMIT_S):
            return await self._replies.get()

    async def refusal(self) -> tuple[int, int, str]:
        reply = await self.next()
        return reply.key, reply.status_code, reply.status_message

    async def allowed(self, key: int) -> set[int]:
        reply = await self.next()
        assert reply.key == key and not reply.status_code, reply
        return allowed_ids(reply.mask)

    def assert_no_more(self) -> None:
        assert self._replies.empty()


@asynccontextmanager
async def answers(model: Path, **settings: Any) -> AsyncIterator[Answers]:
    """Stops the pool at the end, and sees that no process of it is left."""
    before = set(psutil.Process().children())
    made = Answers(model, **settings)
    try:
        yield made
    finally:
        await made.pool.stop()
    assert set(psutil.Process().children()) <= before


def run(script: Coroutine[Any, Any, None]) -> None:
    asyncio.run(script)


def faulty(model: Path, vocab_size: int, engine_fd: int) -> Sequence[str]:
    words = (engine_fd, os.getpid(), model, vocab_size)
    module = "tests.unit.coordinator.grammar.faulty_process"
    return [sys.executable, "-m", module, *map(str, words)]


def test_masks_come_for_opens_and_advances_and_processes_share_the_work(model: Path) -> None:
    [a, b] = read_tokenizer(model).tokenize_str("ab")

    async def script() -> None:
        async with answers(model, num_processes=2) as made:
            made.open(1, "ab")
            made.open(2, "ba", [b])
            replies = {reply.key: reply for reply in (await made.next(), await made.next())}
            assert allowed_ids(replies[1].mask) == {a} == allowed_ids(replies[2].mask)
            assert len(made.pool._processes) == 2
            made.pool.advance(1, a)
            assert await made.allowed(1) == {b}
            made.pool.advance(1, b)
            assert await made.allowed(1) == {EOS}
            made.pool.close(1)
            made.open(3, "a(b")
            key, status, problem = await made.refusal()
            assert (key, status) == (3, 3) and "unclosed" in problem
            made.pool.advance(3, a)  # crossed its end
            made.pool.close(3)
            made.pool.close(2)

    run(script())


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("hang", "did not answer within 3 s"), ("end", "ended"), ("grow", "ended")],
)
def test_a_constraint_that_brings_its_process_down_ends_alone(
    model: Path, fault: str, problem: str
) -> None:
    [a, b, c] = read_tokenizer(model).tokenize_str("abc")

    async def script() -> None:
        async with answers(model, command=faulty, answer_limit_s=3.0) as made:
            made.open(1, "abc")
            assert await made.allowed(1) == {a}
            made.open(2, "abc")
            assert await made.allowed(2) == {a}
            made.pool.advance(2, a)
            assert await made.allowed(2) == {b}
            made.open(3, fault)
            made.pool.advance(1, a)
            made.open(4, "c")
            key, status, message = await made.refusal()
            assert (key, status) == (3, 3) and problem in message
            # Whoever waited is answered by the new process; 2, whose token is on its way, is not.
            assert await made.allowed(1) == {b}
            assert await made.allowed(4) == {c}
            made.pool.advance(2, b)
            assert await made.allowed(2) == {c}
            made.assert_no_more()

    run(script())


def test_a_definition_that_hangs_is_waited_for_once_whatever_the_number_of_samples(
    model: Path,
) -> None:
    [a, b] = read_tokenizer(model).tokenize_str("ab")
    starts: list[int] = []

    def counted(model: Path, vocab_size: int, engine_fd: int) -> Sequence[str]:
        starts.append(engine_fd)
        return faulty(model, vocab_size, engine_fd)

    async def script() -> None:
        async with answers(model, command=counted, answer_limit_s=3.0) as made:
            made.open(1, "ab")
            assert await made.allowed(1) == {a}
            for key in (2, 3, 4):
                made.open(key, "hang")
            made.pool.advance(1, a)
            refusals = [await made.refusal() for _ in range(3)]
            assert [refusal[:2] for refusal in refusals] == [(2, 3), (3, 3), (4, 3)]
            assert await made.allowed(1) == {b}
            assert len(starts) == 2
            made.assert_no_more()

    run(script())


def test_a_grammar_from_which_the_compiler_does_not_come_back_ends_its_request(model: Path) -> None:
    async def script() -> None:
        async with answers(model, answer_limit_s=3.0) as made:
            params = generate_pb2.SamplingParams(lark_grammar="start: /a+/ /a+/")
            made.pool.open(1, params, [], VOCAB_SIZE)
            key, status, message = await made.refusal()
            assert (key, status) == (1, 3) and "did not answer within 3 s" in message

    run(script())


def test_a_process_that_does_not_come_up_ends_its_requests_as_unavailable(model: Path) -> None:
    def broken(model: Path, vocab_size: int, engine_fd: int) -> Sequence[str]:
        return [sys.executable, "-c", "raise SystemExit(1)"]

    async def script() -> None:
        async with answers(model, command=broken) as made:
            made.open(1, "a")
            made.open(2, "a")
            refusals = [await made.refusal(), await made.refusal()]
            assert [refusal[:2] for refusal in refusals] == [(1, 14), (2, 14)]

    run(script())


def _without_end(folder: Path) -> Path:
    write_model(folder)
    (folder / "config.json").write_text('{"vocab_size": 300}', encoding="utf-8")
    return folder


def _without_bytes(folder: Path) -> Path:
    write_model(folder)
    write_checkpoint(folder, STREAMING_KINDS["metaspace_first"]())
    return folder


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (_without_end, "names no end-of-sequence id"),
        (_without_bytes, "cannot be used with this checkpoint's tokenizer"),
    ],
)
def test_a_checkpoint_that_allows_no_constraints_says_so(
    tmp_path: Path, write: Callable[[Path], Path], words: str
) -> None:
    async def script() -> None:
        async with answers(write(tmp_path / "model")) as made:
            made.open(1, "a")
            key, status, message = await made.refusal()
            assert (key, status) == (1, 9) and words in message

    run(script())
