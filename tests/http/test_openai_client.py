"""The openai client against the gateway and a real model: the same results as over gRPC."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from tokenizers import Tokenizer

from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2
from protos.vllm_engine.vllm_engine_pb2_grpc import VllmEngineStub
from tests.helpers.message_client import Client, chat_request, ids_request
from tests.helpers.served_group import ServedGroup, scrape

pytestmark = [pytest.mark.http, pytest.mark.timeout(240)]  # with the start of the group

MODEL = "smol"
_LIMIT_S = 100.0
_POLL_S = 0.05
_PROMPT = "The capital of France is"
_QUESTION = "What is the capital of France? Answer in one sentence."
_GREEDY: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 24}
_NUM_USERS = 32


@pytest.fixture(scope="module")
def client(group: ServedGroup) -> Iterator[openai.OpenAI]:
    url = f"http://{group.http}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=_LIMIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def direct(group: ServedGroup) -> Iterator[Client]:
    with group.client() as client:
        yield client


@pytest.fixture(scope="module")
def encode(smollm2_dir: Path) -> Any:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(client: openai.OpenAI, text: str = _QUESTION, **params: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=messages(text), **{**_GREEDY, **params}
    )


def complete(client: openai.OpenAI, prompt: str | list[str] = _PROMPT, **params: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **{**_GREEDY, **params})


def direct_chat(
    direct: Client, text: str = _QUESTION, **params: Any
) -> generate_pb2.GenerateUnaryResponse:
    request = chat_request(messages(text), **{**_GREEDY, **params})
    return direct.generate_unary(request, timeout_s=_LIMIT_S)


def direct_ids(
    direct: Client, ids: Sequence[int], **params: Any
) -> generate_pb2.GenerateUnaryResponse:
    request = ids_request(ids, **{**_GREEDY, **params})
    return direct.generate_unary(request, timeout_s=_LIMIT_S)


def test_the_model_is_listed_and_no_other_is_known(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages("hi"))


def test_nothing_listens_where_others_could_reach_it(group: ServedGroup) -> None:
    listening = {
        connection.laddr
        for member in group.members()
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert int(group.http.rpartition(":")[2]) in {address.port for address in listening}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_chat_answers_as_over_grpc(client: openai.OpenAI, direct: Client) -> None:
    answer = chat(client)
    same = direct_chat(direct)
    (choice,) = answer.choices
    assert choice.message.content == same.output.text
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == same.started.prompt_token_count
    assert answer.usage.completion_tokens == same.finished.usage.output_token_count


def test_a_chat_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(delta.delta.content or "" for delta in deltas)
    assert text == chat(client).choices[0].message.content
    assert len(deltas) > 3
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == chat(client).usage.completion_tokens


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 11}], ids=str
)
def test_completions_are_those_of_the_same_ids_and_seed(
    client: openai.OpenAI, direct: Client, encode: Any, params: dict[str, Any]
) -> None:
    answer = complete(client, **params)
    same = direct_ids(direct, encode(_PROMPT), **params)
    assert answer.choices[0].text == same.output.text
    assert answer.usage.prompt_tokens == same.started.prompt_token_count
    assert complete(client, **params).choices[0].text == same.output.text


def test_several_prompts_have_an_answer_each(client: openai.OpenAI) -> None:
    prompts = ["One, two, three,", "Monday, Tuesday,"]
    together = complete(client, prompts, max_tokens=8)
    apart = [complete(client, prompt, max_tokens=8).choices[0].text for prompt in prompts]
    by_index = sorted(together.choices, key=lambda choice: choice.index)
    assert [choice.text for choice in by_index] == apart


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_the_answer_also_inside_a_token(
    client: openai.OpenAI, direct: Client, stream: bool
) -> None:
    whole = direct_chat(direct).output.text
    for stop in ("capital of", "apital of F", "aris"):
        answer = chat(client, stop=[stop], stream=stream)
        if stream:
            deltas = [chunk.choices[0] for chunk in answer if chunk.choices]
            text = "".join(delta.delta.content or "" for delta in deltas)
            reason = deltas[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)] == direct_chat(direct, stop=[stop]).output.text
        assert reason == "stop"


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, direct: Client) -> None:
    entries = chat(client, logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    same = direct_chat(direct, logprobs=3, max_tokens=4).output.logprobs
    assert [entry.logprob for entry in entries] == pytest.approx(
        [entry.logprob for entry in same], abs=1e-3
    )
    for entry, ours in zip(entries, same, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            list(ours.top_logprobs), abs=1e-3
        )
    assert (
        "".join(entry.token for entry in entries)
        == chat(client, max_tokens=4).choices[0].message.content
    )


def test_samples_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    first, second = (
        [choice.message.content for choice in chat(client, n=3, temperature=1.5, seed=7).choices]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3


def test_max_tokens_beyond_the_context_are_what_fits(client: openai.OpenAI) -> None:
    assert chat(client, max_tokens=100_000).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("params", "words"),
    [({"max_tokens": 0}, "max_tokens is 0"), ({"n": 17}, "n is 17; it must be at least 1")],
    ids=str,
)
def test_a_refusal_reaches_the_client_with_field_and_limit(
    client: openai.OpenAI, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        complete(client, **params)


def test_a_prompt_that_does_not_fit_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(client, "one two " * 2000)


def test_anthropic_messages_are_answered_too(group: ServedGroup, direct: Client) -> None:
    body = {"model": MODEL, "messages": messages(_QUESTION), "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"http://{group.http}/v1/messages",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_LIMIT_S) as response:
        answer = json.load(response)
    assert answer["content"][0]["text"] == direct_chat(direct).output.text


def wait_idle(group: ServedGroup) -> None:
    """Waits until no request holds a slot or a block."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        samples = scrape(group.metrics)
        busy = [
            samples[name, ()]
            for name in (
                "lockstep_num_requests_running",
                "lockstep_num_requests_waiting",
                "lockstep_kv_cache_usage_perc",
            )
        ]
        if not any(busy):
            return
        assert time.monotonic() < deadline, busy
        time.sleep(_POLL_S)


def num_generated(group: ServedGroup) -> float:
    return scrape(group.metrics)["lockstep_generation_tokens_total", ()]


def test_the_load_is_told_while_a_request_runs(group: ServedGroup, client: openai.OpenAI) -> None:
    chunks = chat(client, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    next(chunks)
    with group.channel() as channel:
        stub = VllmEngineStub(channel)

        def wait_for(num_running: int) -> vllm_engine_pb2.SchedulerLoad:
            deadline = time.monotonic() + _LIMIT_S
            while True:
                answer = stub.GetLoads(vllm_engine_pb2.GetLoadsRequest(), timeout=_LIMIT_S)
                load: vllm_engine_pb2.SchedulerLoad = answer.loads[0]
                if load.num_running_reqs == num_running:
                    return load
                assert time.monotonic() < deadline
                time.sleep(_POLL_S)

        busy = wait_for(1)
        assert 0 < busy.token_usage <= 1
        assert 0 < busy.num_used_tokens <= busy.max_total_num_tokens
        chunks.close()
        assert wait_for(0).num_used_tokens == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_and_blocks(
    group: ServedGroup, client: openai.OpenAI, stream: bool
) -> None:
    before = num_generated(group)
    long: dict[str, Any] = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    if stream:
        chunks = chat(client, stream=True, **long)
        for _ in range(3):
            next(chunks)
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            chat(client.with_options(timeout=2.0), **long)
    wait_idle(group)
    assert num_generated(group) - before < 800


def test_32_users_at_once_get_what_they_get_over_grpc(group: ServedGroup, direct: Client) -> None:
    questions = [f"Count upwards from {start}." for start in range(_NUM_USERS)]
    params: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}

    async def ask(client: openai.AsyncOpenAI, question: str, stream: bool) -> str:
        answer: Any = await client.chat.completions.create(
            model=MODEL,
            messages=messages(question),
            stream=stream,
            extra_body={"ignore_eos": True},
            **params,
        )
        if not stream:
            assert answer.usage.completion_tokens == 12
            return str(answer.choices[0].message.content)
        parts = [chunk.choices[0].delta.content async for chunk in answer if chunk.choices]
        return "".join(part or "" for part in parts)

    async def ask_all() -> list[str]:
        url = f"http://{group.http}/v1"
        async with openai.AsyncOpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=_LIMIT_S
        ) as client:
            calls = (ask(client, q, index % 2 == 0) for index, q in enumerate(questions))
            return await asyncio.gather(*calls)

    answers = asyncio.run(ask_all())
    with ThreadPoolExecutor(_NUM_USERS) as pool:
        same = list(
            pool.map(
                lambda q: direct_chat(direct, q, ignore_eos=True, **params).output.text, questions
            )
        )
    assert answers == same
    wait_idle(group)
