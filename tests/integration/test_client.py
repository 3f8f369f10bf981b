"""The Python client, sync and async, and `lockstep chat` against a real model on two ranks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lockstep.client import (
    AsyncClient,
    ChatMessage,
    Client,
    ClientConfig,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    SamplingParams,
)
from tests.helpers.served_group import ServedGroup, value_of
from tests.integration.chaos_support import wait_until

pytestmark = pytest.mark.timeout(240)  # includes the start of the group, perhaps on busy cores
_ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 100.0
_CONFIG = ClientConfig(timeout_s=_LIMIT_S)
_GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
_REQUEST = GenerateRequest("The capital of France is", _GREEDY)
_NUM_ENDLESS = 1000
_ENDLESS = GenerateRequest([5, 6], SamplingParams(max_tokens=_NUM_ENDLESS, ignore_eos=True))


@pytest.fixture(scope="module")
def client(smollm2_tp2: ServedGroup) -> Iterator[Client]:
    with Client(smollm2_tp2.address, _CONFIG) as client:
        yield client


def generated(group: ServedGroup) -> float:
    """Tokens that the group has made so far."""
    return value_of(group.metrics, "lockstep_generation_tokens_total")


def wait_ended(group: ServedGroup, before: float) -> None:
    """Until nothing runs; what ran since `before` tokens did not run to its own end."""
    wait_until(
        lambda: value_of(group.metrics, "lockstep_num_requests_running") == 0,
        _LIMIT_S,
        lambda: f"a request still runs: {group.log_text()}",
    )
    assert generated(group) - before < _NUM_ENDLESS


def test_stream_unary_and_both_clients_give_the_same(
    client: Client, smollm2_tp2: ServedGroup
) -> None:
    generation = client.generate(_REQUEST)
    deltas = list(generation)
    unary = client.generate_unary(_REQUEST)
    (sample,) = unary.samples
    assert "".join(delta.text for delta in deltas) == sample.text == unary.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == sample.token_ids
    assert len(sample.logprobs) == len(sample.token_ids) == 12
    assert generation.finished is not None and generation.started is not None
    assert generation.finished.finish_reason is FinishReason.LENGTH
    assert generation.finished.usage.output_token_count == 12
    assert float(generation.times["lockstep-decode-ms"]) > 0

    async def ask() -> tuple[str, tuple[int, ...]]:
        async with AsyncClient(smollm2_tp2.address, _CONFIG) as asynchronous:
            texts = [delta.text async for delta in asynchronous.generate(_REQUEST)]
            answer = await asynchronous.generate_unary(_REQUEST)
            return "".join(texts), answer.samples[0].token_ids

    assert asyncio.run(ask()) == (sample.text, sample.token_ids)


def test_many_asynchronous_streams_run_beside_each_other(
    client: Client, smollm2_tp2: ServedGroup
) -> None:
    requests = [GenerateRequest([number, 7], _GREEDY) for number in range(3, 19)]

    async def ids(asynchronous: AsyncClient, request: GenerateRequest) -> Sequence[int]:
        generation = asynchronous.generate(request)
        return [token async for delta in generation for token in delta.token_ids]

    async def ask() -> list[Sequence[int]]:
        async with AsyncClient(smollm2_tp2.address, _CONFIG) as asynchronous:
            return await asyncio.gather(*(ids(asynchronous, request) for request in requests))

    outputs = asyncio.run(ask())
    assert [len(output) for output in outputs] == [12] * len(requests)
    assert list(client.generate_unary(requests[0]).samples[0].token_ids) == outputs[0]


def test_a_resumed_request_goes_on_as_the_whole_would(client: Client) -> None:
    sampling = SamplingParams(temperature=1.2, seed=5, max_tokens=12)
    whole = client.generate_unary(GenerateRequest("Once upon", sampling)).samples[0]
    resumed = GenerateRequest("Once upon", sampling, resume_output_ids=whole.token_ids[:5])
    rest = client.generate_unary(resumed).samples[0]
    assert rest.token_ids == whole.token_ids[5:]
    assert whole.text.endswith(rest.text)
    # Only the word of its end was lost.
    ended = client.generate(
        GenerateRequest("Once upon", sampling, resume_output_ids=whole.token_ids)
    )
    assert list(ended) == []
    assert ended.finished == whole.finished


def test_leaving_a_stream_and_abort_both_end_the_request(
    client: Client, smollm2_tp2: ServedGroup
) -> None:
    before = generated(smollm2_tp2)
    for _ in client.generate(_ENDLESS):
        break
    wait_ended(smollm2_tp2, before)
    generation = client.generate(_ENDLESS)
    next(generation)
    assert generation.started is not None
    assert client.abort(generation.started.request_id)
    for _ in generation:
        continue
    assert generation.finished is not None
    assert generation.finished.finish_reason is FinishReason.ABORTED

    before = generated(smollm2_tp2)

    async def leave() -> None:
        async with AsyncClient(smollm2_tp2.address, _CONFIG) as asynchronous:
            async with asynchronous.generate(_ENDLESS) as stream:
                await anext(stream)
            await asyncio.to_thread(wait_ended, smollm2_tp2, before)

    asyncio.run(leave())


def test_a_refused_value_is_an_error_of_its_own(client: Client) -> None:
    request = GenerateRequest("x", SamplingParams(temperature=-1.0))
    with pytest.raises(InvalidRequest, match="temperature is -1.0; it must be at least 0"):
        client.generate_unary(request)
    with pytest.raises(InvalidRequest):
        list(client.generate(request))


def test_info_is_of_this_server(client: Client) -> None:
    model, server = client.model_info(), client.server_info()
    assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (1024, 49152, (2,))
    assert server.is_ready and [rank.rank for rank in server.ranks] == [0, 1]


def test_chat_answers_and_remembers_over_a_pipe(client: Client, smollm2_tp2: ServedGroup) -> None:
    words = ["--address", smollm2_tp2.address, "--temperature", "0", "--max-tokens", "24"]
    asked = "My name is Ada.\nWhat is my name?\n"
    shown = subprocess.run(
        [sys.executable, "-m", "lockstep", "chat", *words, "--verbose"],
        cwd=_ROOT,
        input=asked,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=24)
    turns = [ChatMessage("user", "My name is Ada.")]
    first = "".join(delta.text for delta in client.chat(turns, sampling))
    turns += [ChatMessage("assistant", first), ChatMessage("user", "What is my name?")]
    second = "".join(delta.text for delta in client.chat(turns, sampling))
    assert shown.stdout == f"{first}\n{second}\n"
    assert shown.stderr.count("tokens/s)") == 2
