"""Constrained requests from their Submit to their end, with masks that the test makes."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from coordinator.constraints import Constraints
from protos.lockstep.v1 import generate_pb2, grammar_pb2, worker_pb2
from tests.helpers.engine_harness import LIMIT_S, Harness, running_group

INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]


class Masks:
    """A MaskSource that answers when told to."""

    def __init__(self) -> None:
        self.opened: dict[int, tuple[generate_pb2.SamplingParams, list[int]]] = {}
        self.tokens: list[tuple[int, int]] = []
        self.closed: list[int] = []
        self.changed = asyncio.Event()
        self.group: Harness

    def open(
        self,
        key: int,
        params: generate_pb2.SamplingParams,
        output_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        assert vocab_size == 1000
        self.opened[key] = (params, list(output_ids))
        self.changed.set()

    def advance(self, key: int, token_id: int) -> None:
        self.tokens.append((key, token_id))
        self.changed.set()

    def close(self, key: int) -> None:
        self.closed.append(key)
        self.changed.set()

    async def until(self, is_met: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not is_met():
                self.changed.clear()
                await self.changed.wait()

    async def got_tokens(self, count: int) -> None:
        await self.until(lambda: len(self.tokens) == count)

    def allow(self, key: int, *token_ids: int) -> None:
        """The next mask of an output comes."""
        mask = worker_pb2.SlotMask(ids=struct.pack(f"<{len(token_ids)}i", *token_ids))
        self._answer(grammar_pb2.GrammarReply(key=key, mask=mask))

    def refuse(
        self, key: int, problem: str, status: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    ) -> None:
        """There is none."""
        code = status.value[0]
        self._answer(grammar_pb2.GrammarReply(key=key, status_code=code, status_message=problem))

    def _answer(self, reply: grammar_pb2.GrammarReply) -> None:
        self.group.book.take_mask(reply)
        self.group.leader.wake()


@asynccontextmanager
async def running(**config: Any) -> AsyncIterator[tuple[Harness, Masks]]:
    masks = Masks()
    async with running_group(constraints=Constraints(masks), **config) as group:
        masks.group = group
        yield group, masks


def run(script: Callable[[Harness, Masks], Coroutine[Any, Any, None]], **config: Any) -> None:
    async def main() -> None:
        async with running(**config) as (group, masks):
            await script(group, masks)
            await group.settled()
            assert sorted(masks.closed) == sorted(masks.opened)

    asyncio.run(main())


def test_a_request_is_accepted_with_its_first_mask_and_takes_a_token_a_mask() -> None:
    async def script(group: Harness, masks: Masks) -> None:
        group.submit(1, [4, 5], 3, regex="a", min_tokens=2, stop_ids=[9])
        await masks.until(lambda: bool(masks.opened))
        params, output_ids = masks.opened[1]
        assert params == generate_pb2.SamplingParams(regex="a", min_tokens=2, stop_token_ids=[9])
        assert output_ids == [] and group.book.batch is not None
        assert 1 not in group.heard.tokens and group.book.batch.num_waiting == 1
        for number, token in enumerate((7, 8), start=1):
            masks.allow(1, token)
            await masks.got_tokens(number)
            assert masks.tokens[-1] == (1, token)
        masks.allow(1, 6)
        await group.heard.end_of(1)
        assert group.heard.tokens[1] == [7, 8, 6]
        assert group.heard.ended[1][0].finish_reason == generate_pb2.FINISH_REASON_LENGTH
        assert len(masks.tokens) == 2, "nobody waits for a mask after the last token"

    run(script)


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_schema": "{}"},
        {"json_object": True},
        {"choice": generate_pb2.ChoiceConstraint(choices=["a", "b"])},
    ],
    ids=str,
)
def test_a_grammar_process_is_told_the_constraint_whole(constraint: dict[str, Any]) -> None:
    async def script(group: Harness, masks: Masks) -> None:
        group.submit(1, [4], 1, stop_ids=[9], temperature=0.5, **constraint)
        await masks.until(lambda: bool(masks.opened))
        params, _ = masks.opened[1]
        assert params == generate_pb2.SamplingParams(stop_token_ids=[9], min_tokens=0, **constraint)
        masks.allow(1, 7)
        await group.heard.end_of(1)

    run(script)


def test_a_constraint_that_does_not_compile_is_refused_and_never_queued() -> None:
    async def script(group: Harness, masks: Masks) -> None:
        group.submit(1, [4], 3, regex="a(")
        await masks.until(lambda: bool(masks.opened))
        masks.refuse(1, "regex cannot be used")
        await group.heard.end_of(1)
        [ended] = group.heard.ended[1]
        assert (ended.status_code, ended.status_message) == (INVALID, "regex cannot be used")
        assert ended.field == "regex"
        assert 1 not in group.heard.tokens
        assert group.metrics.requests_rejected["invalid_argument"] == 1

    run(script)


def test_a_constraint_that_cannot_go_on_ends_its_request_alone() -> None:
    async def script(group: Harness, masks: Masks) -> None:
        group.submit(1, [4], 9, regex="a")
        group.submit(2, [5], 9)
        await masks.until(lambda: bool(masks.opened))
        masks.allow(1, 7)
        await masks.until(lambda: bool(masks.tokens))
        masks.refuse(1, "too complex")
        await group.heard.end_of(1, 2)
        assert group.heard.tokens[1] == [7] and len(group.heard.tokens[2]) == 9
        assert group.heard.ended[1][0].status_message == "too complex"
        assert group.heard.ended[1][0].field == "regex"
        assert group.heard.ended[2][0].status_code == 0

    run(script)


def test_a_grammar_process_that_is_lost_is_no_fault_of_a_field() -> None:
    async def script(group: Harness, masks: Masks) -> None:
        group.submit(1, [4], 3, regex="a")
        await masks.until(lambda: bool(masks.opened))
        masks.refuse(1, "the grammar process ended", grpc.StatusCode.UNAVAILABLE)
        await group.heard.end_of(1)
        [ended] = group.heard.ended[1]
        assert (ended.field, ended.retry_after_seconds) == ("", 1.0)

    run(script)


def test_an_abort_finds_a_request_that_still_waits_for_its_first_mask() -> None:
    async def script(group: Harness, masks: Masks) -> None:
        group.submit(1, [4], 9, regex="a", request_id="name")
        await masks.until(lambda: bool(masks.opened))
        request = group.book._by_name["", "name"][0]
        group.book.finish(request, generate_pb2.FINISH_REASON_ABORTED)
        group.leader.wake()
        await group.heard.end_of(1)
        masks.allow(1, 7)  # crossed its end

    run(script)


def test_a_stop_id_ends_the_request_and_a_resumed_end_needs_no_mask() -> None:
    async def script(group: Harness, masks: Masks) -> None:
        group.submit(1, [4], 9, regex="a", stop_ids=[8])
        group.submit(2, [4], 9, regex="a", stop_ids=[8], resume=[7, 8])
        await masks.until(lambda: bool(masks.opened))
        masks.allow(1, 8)
        await group.heard.end_of(1, 2)
        for handle in (1, 2):
            [ended] = group.heard.ended[handle]
            assert ended.finish_reason == generate_pb2.FINISH_REASON_STOP
            assert ended.stop_token_id == 8
        assert len(masks.opened) == 1 and not masks.tokens

    run(script)
