"""Cancelling, closing, unary calls, what a call carries, and what the client does not need."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from lockstep.client import (
    AsyncClient,
    CallFailed,
    Cancelled,
    ChatMessage,
    Client,
    ClientConfig,
    ConfigError,
    GenerateRequest,
    RetryPolicy,
    Unavailable,
)
from tests.helpers.client_runs import KINDS, unary
from tests.helpers.scripted_server import (
    IDS,
    TEXT,
    WAIT_S,
    ScriptedServer,
    fails,
    hangs_after,
    serving,
)

_AWAY = grpc.StatusCode.UNAVAILABLE
_CONFIG = ClientConfig(
    timeout_s=30.0, retry=RetryPolicy(max_attempts=3, initial_backoff_s=0.01, max_backoff_s=0.02)
)
# A wait that a test would not outlast.
_PATIENT = ClientConfig(
    timeout_s=500.0, retry=RetryPolicy(initial_backoff_s=300.0, max_backoff_s=300.0)
)
_REQUEST = GenerateRequest("x")

both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def address(server: ScriptedServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


def test_cancel_from_another_thread_reaches_server_and_reader(
    server: ScriptedServer, address: str
) -> None:
    server.plant(hangs_after(1))
    with Client(address, _CONFIG) as client:
        generation = client.generate(_REQUEST)
        assert next(generation).text == "Hi "
        threading.Timer(0.05, generation.cancel).start()
        with pytest.raises(Cancelled):
            next(generation)
    assert server.cancelled.wait(WAIT_S)


def test_leaving_the_loop_cancels_the_call(server: ScriptedServer, address: str) -> None:
    server.plant(hangs_after(1))
    with Client(address, _CONFIG) as client:
        for delta in client.generate(_REQUEST):
            assert delta.text == "Hi "
            break
        assert server.cancelled.wait(WAIT_S)


@pytest.mark.parametrize("num_read", [0, 1])
def test_closing_a_generation_cancels_the_call_and_ends_the_iteration(
    server: ScriptedServer, address: str, num_read: int
) -> None:
    server.plant(hangs_after(1))
    with Client(address, _CONFIG) as client:
        with client.generate(_REQUEST) as generation:
            assert server.told.wait(WAIT_S)
            for _ in range(num_read):
                next(generation)
        assert server.cancelled.wait(WAIT_S)
        assert list(generation) == []
        generation.close()


def test_closing_the_client_ends_a_stream_and_a_wait_between_attempts(
    server: ScriptedServer, address: str
) -> None:
    server.plant(hangs_after(1), fails(_AWAY), fails(_AWAY))
    client = Client(address, _PATIENT)
    with ThreadPoolExecutor(3) as pool:
        reading = pool.submit(lambda: list(client.generate(_REQUEST)))
        assert server.told.wait(WAIT_S)
        waiting = pool.submit(lambda: list(client.generate(_REQUEST)))
        asking = pool.submit(lambda: client.generate_unary(_REQUEST))
        assert server.arrived(3)
        client.close()
        for run in (reading, waiting, asking):
            with pytest.raises(Cancelled):
                run.result(WAIT_S)
    with pytest.raises(Cancelled, match="client is closed"):
        client.server_info()
    client.close()


def test_cancel_ends_a_wait_between_attempts(server: ScriptedServer, address: str) -> None:
    server.plant(fails(_AWAY))
    with Client(address, _PATIENT) as client:
        generation = client.generate(_REQUEST)
        assert server.arrived(1)
        threading.Timer(0.1, generation.cancel).start()
        with pytest.raises(Cancelled):
            next(generation)


def test_an_asynchronous_stream_ends_with_its_block_and_with_its_task(
    server: ScriptedServer, address: str
) -> None:
    server.plant(hangs_after(1), hangs_after(1))

    async def leave_block() -> None:
        async with AsyncClient(address, _CONFIG) as client:
            async with client.generate(_REQUEST) as generation:
                assert (await anext(generation)).text == "Hi "
            assert [delta async for delta in generation] == []

    async def cancel_task() -> None:
        async with AsyncClient(address, _CONFIG) as client:
            generation = client.generate(_REQUEST)
            await anext(generation)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(generation), 0.1)

    for leave in (leave_block, cancel_task):
        server.cancelled.clear()
        asyncio.run(leave())
        assert server.cancelled.wait(WAIT_S)


def test_closing_the_asynchronous_client_is_an_error_and_not_a_cancelled_task(
    server: ScriptedServer, address: str
) -> None:
    server.plant(hangs_after(1), hangs_after(0))

    async def run() -> None:
        client = AsyncClient(address, _CONFIG)
        generation = client.generate(_REQUEST)
        await anext(generation)
        reading = asyncio.ensure_future(anext(generation))
        asking = asyncio.ensure_future(client.generate_unary(_REQUEST))
        await asyncio.to_thread(server.arrived, 2)
        await client.close()
        for waiting in (reading, asking):
            with pytest.raises(Cancelled):
                await waiting
        with pytest.raises(Cancelled, match="client is closed"):
            await client.model_info()

    asyncio.run(run())


@both
def test_a_unary_call_gives_the_whole_and_is_tried_again(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(fails(_AWAY))
    answer = unary(kind, address, _REQUEST, _CONFIG)
    assert (answer.text, answer.samples[0].token_ids) == (TEXT, IDS)
    assert answer.samples[0].finished.usage.output_token_count == len(IDS)
    assert len(server.requests) == 2


@both
def test_a_unary_call_that_had_begun_to_answer_is_not_tried_again(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(fails(_AWAY, "rank 1 lost", ("lockstep-prefill-ms", "12.500")))
    with pytest.raises(Unavailable, match="rank 1 lost"):
        unary(kind, address, _REQUEST, _CONFIG)
    assert len(server.requests) == 1


@both
def test_a_unary_call_has_a_limit(kind: str, server: ScriptedServer, address: str) -> None:
    server.plant(hangs_after(0))
    with pytest.raises(CallFailed, match="DEADLINE_EXCEEDED"):
        unary(kind, address, _REQUEST, ClientConfig(timeout_s=2.0))
    assert server.cancelled.wait(WAIT_S)


def test_chat_abort_and_info_in_both_clients(server: ScriptedServer, address: str) -> None:
    turns = [ChatMessage("system", "be kind"), ChatMessage("user", "hi")]

    async def ask() -> tuple[Any, ...]:
        async with AsyncClient(address, _CONFIG) as client:
            return (
                [delta.text async for delta in client.chat(turns)],
                (await client.abort("r"), await client.abort("other")),
                (await client.model_info(), await client.server_info()),
            )

    with Client(address, _CONFIG) as client:
        answers = (
            [delta.text for delta in client.chat(turns)],
            (client.abort("r"), client.abort("other")),
            (client.model_info(), client.server_info()),
        )
    assert answers == asyncio.run(ask())
    assert "".join(answers[0]) == TEXT
    assert answers[1] == (True, False)
    assert (answers[2][0].model, answers[2][1].epoch, answers[2][1].ranks[0].pid) == (
        "story",
        2,
        11,
    )
    assert [turn.role for turn in server.requests[0].chat.messages] == ["system", "user"]


def test_no_server_is_named_with_what_to_do() -> None:
    with Client("127.0.0.1:1", _CONFIG) as client, pytest.raises(Unavailable, match="`lockstep"):
        client.server_info()


def test_proxy_of_the_environment_is_not_used(
    server: ScriptedServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(address, _CONFIG) as client:
        assert client.server_info().epoch == 2


@both
def test_an_api_key_goes_with_every_call_and_is_never_shown(
    kind: str, server: ScriptedServer, address: str
) -> None:
    config = ClientConfig(api_key="s3cret-key")
    unary(kind, address, _REQUEST, config)
    assert server.metadata[0]["authorization"] == "Bearer s3cret-key"
    assert "s3cret" not in repr(config)


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError, match="^api_key must be of printable ASCII") as caught:
        ClientConfig(api_key=key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClientConfig(timeout_s=0), "timeout_s is 0"),
        (lambda: ClientConfig(timeout_s=float("inf")), "timeout_s is inf"),
        (lambda: ClientConfig(info_timeout_s=float("nan")), "info_timeout_s is nan"),
        (lambda: RetryPolicy(max_attempts=0), "max_attempts is 0"),
        (lambda: RetryPolicy(max_backoff_s=-1), "max_backoff_s is -1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
