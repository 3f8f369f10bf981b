"""Log-likelihoods against a server that tells a prompt's log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from lockstep.client import (
    AsyncClient,
    CallFailed,
    Client,
    ClientConfig,
    GenerateRequest,
    SamplingParams,
    Unavailable,
)
from tests.helpers.client_runs import KINDS, stream
from tests.helpers.scripted_server import ScriptedServer, fails, scores, serving, whole

_CONFIG = ClientConfig(timeout_s=30.0)

both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def address(server: ScriptedServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


def loglikelihood(kind: str, address: str, pairs: Any, num_parallel: int = 4) -> Any:
    if kind == "sync":
        with Client(address, _CONFIG) as client:
            return client.loglikelihood(pairs, num_parallel)

    async def ask() -> Any:
        async with AsyncClient(address, _CONFIG) as client:
            return await client.loglikelihood(pairs, num_parallel)

    return asyncio.run(ask())


def test_token_ids_are_scored_in_one_call(server: ScriptedServer, address: str) -> None:
    server.plant(scores)
    with Client(address, _CONFIG) as client:
        score = client.score([5, 6, 7], [8, 3])
    assert (score.token_ids, score.logprobs) == ((8, 3), (-2.0, -0.75))
    assert (score.logprob, score.is_greedy) == (-2.75, False)
    (request,) = server.requests
    assert list(request.token_ids.ids) == [5, 6, 7, 8, 3]
    params = request.sampling_params
    assert (params.prompt_logprobs, params.max_tokens, params.temperature) == (1, 1, 0.0)


def test_a_text_is_cut_where_its_context_alone_ends(server: ScriptedServer, address: str) -> None:
    server.plant(scores, scores)
    with Client(address, _CONFIG) as client:
        score = client.score("one two", " and three")
    assert score.token_ids == (len(" and"), len(" three"))
    assert score.is_greedy
    assert [request.text for request in server.requests] == ["one two", "one two and three"]
    assert not server.requests[0].sampling_params.HasField("prompt_logprobs")


def test_white_space_at_the_end_of_a_context_is_scored_with_what_follows(
    server: ScriptedServer, address: str
) -> None:
    server.plant(*[scores] * 4)
    with Client(address, _CONFIG) as client:
        assert client.score("one two ", "and") == client.score("one two", " and")


@both
def test_pairs_come_back_in_order_and_a_context_is_counted_once(
    kind: str, server: ScriptedServer, address: str
) -> None:
    pairs = [
        ("the sky is", " blue"),
        ("the sky is", " green"),
        ("the sky is ", "blue"),
        ("grass is", " green"),
        ((5, 6), (2, 4)),
        ([5, 6], [3]),
    ]
    server.plant(*[scores] * 8)
    expected = [(-5 / 4, False), (-6 / 4, True), (-5 / 4, False), (-6 / 4, True)]
    expected += [(-6 / 4, True), (-3 / 4, False)]
    assert loglikelihood(kind, address, pairs) == expected
    assert len(server.requests) == len(pairs) + 2


@both
def test_more_pairs_than_turns_are_all_scored(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(*[scores] * 30)
    pairs = [([5], [2 * number]) for number in range(1, 31)]
    expected = [(-number / 2, True) for number in range(1, 31)]
    assert loglikelihood(kind, address, pairs, num_parallel=3) == expected
    assert loglikelihood(kind, address, []) == []


@both
def test_one_failure_is_that_of_all(kind: str, server: ScriptedServer, address: str) -> None:
    server.plant(scores, *[fails(grpc.StatusCode.UNAVAILABLE, "rank 1 lost")] * 8)
    with pytest.raises(Unavailable, match="rank 1 lost"):
        loglikelihood(kind, address, [([5], [6]), ([5], [7])], num_parallel=1)


@pytest.mark.parametrize(
    ("context", "continuation", "kind", "words"),
    [
        ("", "x", ValueError, "context is empty"),
        ([], [1], ValueError, "context is empty"),
        ("x", "", ValueError, "continuation is empty"),
        ("  ", "x", ValueError, "more than white space"),
        ("x", [1], TypeError, "both be texts"),
        ([1], "x", TypeError, "both be texts"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_call(
    context: Any, continuation: Any, kind: type[Exception], words: str
) -> None:
    with Client("127.0.0.1:1", _CONFIG) as client, pytest.raises(kind, match=words):
        client.score(context, continuation)


def test_a_continuation_that_adds_no_token_is_refused(server: ScriptedServer, address: str) -> None:
    server.plant(scores, scores)
    with Client(address, _CONFIG) as client, pytest.raises(ValueError, match="at least one"):
        client.score("one two", "s")


def test_an_answer_without_log_probabilities_is_an_error(
    server: ScriptedServer, address: str
) -> None:
    server.plant(whole)
    with Client(address, _CONFIG) as client, pytest.raises(CallFailed, match="lacks log-prob"):
        client.score([5], [6])


@both
def test_a_stream_joins_the_pieces_of_the_prompt_also_after_a_retry(
    kind: str, server: ScriptedServer, address: str
) -> None:
    def cut(server: ScriptedServer, request: Any, context: Any) -> Any:
        yield from list(scores(server, request, context))[:2]
        context.abort(grpc.StatusCode.UNAVAILABLE, "rank 1 lost")

    server.plant(cut, scores)
    request = GenerateRequest([5, 6, 7, 8], SamplingParams(prompt_logprobs=1, max_tokens=1))
    run = stream(kind, address, request, _CONFIG)
    assert run.error is None
    assert run.generation.prompt_logprobs.first_position == 1
    assert run.generation.prompt_logprobs.token_ids == (6, 7, 8)
    assert [entry.logprob for entry in run.generation.prompt_logprobs.logprobs] == [-1.5, -1.75, -2]
