"""Log-probabilities of prompts: of every token once, whatever becomes of the request."""

import asyncio
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from coordinator.errors import ProtocolBroken
from coordinator.frontend.prompt_pieces import prompt_logprobs
from coordinator.results import _take_prompt_scores
from protos.lockstep.v1 import generate_pb2, worker_pb2
from tests.helpers.batch_history import make_request
from tests.helpers.engine_harness import Harness, running_group


def run(script: Callable[[Harness], Coroutine[Any, Any, None]], **config: Any) -> None:
    async def main() -> None:
        async with running_group(**config) as group:
            await script(group)
            await group.settled()

    asyncio.run(main())


def told(group: Harness, handle: int, prompt: list[int]) -> list[generate_pb2.PromptLogprobs]:
    """The pieces of a request, which must cover its prompt in order and without gaps."""
    pieces = [prompt_logprobs(piece) for piece in group.heard.prompts.get(handle, [])]
    position = 1
    for piece in pieces:
        assert piece.first_position == position
        position += len(piece.token_ids)
        assert len(piece.logprobs) == len(piece.token_ids)
    assert [token for piece in pieces for token in piece.token_ids] == prompt[1:]
    own = [entry.logprob for piece in pieces for entry in piece.logprobs]
    assert own == pytest.approx([-token / 1000 for token in prompt[1:]])
    return pieces


def test_every_prompt_token_but_the_first_is_told_in_pieces_beside_other_requests() -> None:
    async def script(group: Harness) -> None:
        prompts = {1: list(range(10, 100)), 2: list(range(40)), 3: [7], 4: [5, 6]}
        for handle, prompt in prompts.items():
            wanted = {} if handle == 2 else {"prompt_logprobs": 3}
            group.submit(handle, prompt, 4, **wanted)
        await group.heard.end_of(1, 2, 3, 4)
        assert len(told(group, 1, prompts[1])) > 2  # steps have 32 tokens
        assert not group.heard.prompts.get(2) and not group.heard.prompts.get(3)
        [piece] = told(group, 4, prompts[4])
        assert list(piece.logprobs[0].top_token_ids) == [0, 1, 2]
        assert list(piece.logprobs[0].top_logprobs) == [-1.0] * 3
        assert all(len(tokens) == 4 for tokens in group.heard.tokens.values())

    run(script)


def test_a_cached_prefix_is_computed_again_for_who_wants_its_log_probabilities() -> None:
    async def script(group: Harness) -> None:
        prompt = list(range(100, 124))
        group.submit(1, prompt, 2, use_prefix_cache=True)
        await group.heard.end_of(1)
        group.submit(2, prompt, 2, use_prefix_cache=True, prompt_logprobs=0)
        await group.heard.end_of(2)
        [piece, *_] = told(group, 2, prompt)
        assert not piece.logprobs[0].top_token_ids
        assert group.heard.ended[2][0].times.cached_token_count == 0
        group.submit(3, prompt, 2, use_prefix_cache=True)
        await group.heard.end_of(3)
        assert group.heard.ended[3][0].times.cached_token_count > 0

    run(script)


def test_a_beginning_that_was_told_before_a_preemption_is_not_told_again() -> None:
    class Book:
        def __init__(self) -> None:
            self.outbox = self
            self.pieces: list[generate_pb2.PromptLogprobs] = []

        def add_prompt_piece(self, request: object, piece: Any) -> None:
            self.pieces.append(prompt_logprobs(piece))

    def result(*logprobs: float) -> worker_pb2.StepResult:
        return worker_pb2.StepResult(prompt_logprobs=struct.pack(f"<{len(logprobs)}f", *logprobs))

    request, book = make_request(1, [5, 6, 7, 8, 9], 3), Book()
    anybook: Any = book
    _take_prompt_scores(result(-1.0, -2.0), [(request, 0, 2)], anybook)
    _take_prompt_scores(result(-1.0), [(request, 0, 1)], anybook)
    _take_prompt_scores(result(-2.0, -3.0, -4.0), [(request, 1, 3)], anybook)
    assert [piece.first_position for piece in book.pieces] == [1, 3]
    assert [list(piece.token_ids) for piece in book.pieces] == [[6, 7], [8, 9]]
    assert [e.logprob for piece in book.pieces for e in piece.logprobs] == [-1, -2, -3, -4]
    with pytest.raises(ProtocolBroken, match="do not fit"):
        _take_prompt_scores(result(-1.0), [(request, 0, 2)], anybook)


def test_too_many_alternatives_are_refused_by_the_engine_too() -> None:
    async def script(group: Harness) -> None:
        group.submit(1, [1, 2], 2, prompt_logprobs=21)
        await group.heard.end_of(1)
        assert group.heard.ended[1][0].status_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]

    run(script)
