"""Streams of both clients against a scripted server: order, ends, retries, resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from lockstep.client import (
    Client,
    ClientConfig,
    Delta,
    FinishReason,
    GenerateRequest,
    RetryPolicy,
    SamplingParams,
)
from tests.helpers import scripted_server
from tests.helpers.client_runs import KINDS, stream
from tests.helpers.scripted_server import (
    IDS,
    STORY,
    TEXT,
    ScriptedServer,
    breaks_after,
    ends_early,
    fails,
    hangs_after,
    mixed_samples,
    serving,
    whole_and_broken,
)

_AWAY = grpc.StatusCode.UNAVAILABLE
_FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
_CONFIG = ClientConfig(
    timeout_s=30.0, retry=RetryPolicy(max_attempts=3, initial_backoff_s=0.01, max_backoff_s=0.02)
)
_REQUEST = GenerateRequest("x", SamplingParams(max_tokens=8))

both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    yield ScriptedServer()


@pytest.fixture
def address(server: ScriptedServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


@both
def test_deltas_come_in_order_with_started_finished_and_times(
    kind: str, server: ScriptedServer, address: str
) -> None:
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert run.error is None
    assert run.deltas == [Delta(text, (token,)) for text, token in STORY]
    assert run.generation.started.seed == scripted_server.DRAWN_SEED
    assert run.generation.finished.usage.output_token_count == len(IDS)
    assert run.generation.times == {"lockstep-queue-ms": "1.500"}
    assert len(server.requests) == 1


@both
def test_samples_are_told_apart_and_finished_is_sample_0s(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(mixed_samples)
    run = stream(kind, address, GenerateRequest("x", SamplingParams(n=3)), _CONFIG)
    assert {delta.sample_index for delta in run.deltas} == {0, 1, 2}
    assert sorted(run.generation.finished_samples) == [0, 1, 2]
    assert run.generation.finished == run.generation.finished_samples[0]


@both
def test_a_call_without_tokens_is_tried_again_until_it_is_served(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(fails(_AWAY), breaks_after(0))
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert (run.error, run.text) == (None, TEXT)
    assert len(server.requests) == 3
    # What was promised in the second call's `started` is kept.
    assert server.requests[2].sampling_params.seed == scripted_server.DRAWN_SEED
    assert not server.requests[1].sampling_params.HasField("seed")


@both
def test_attempts_end_with_the_last_error(kind: str, server: ScriptedServer, address: str) -> None:
    server.plant(*[fails(_AWAY, f"attempt {number}") for number in (1, 2, 3)])
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert str(run.error) == "UNAVAILABLE: attempt 3"
    assert len(server.requests) == 3
    assert run.generation.times == {"lockstep-queue-ms": "1.500"}


@both
@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, _FULL]
)
def test_what_would_fail_again_is_not_tried_again(
    kind: str, server: ScriptedServer, address: str, code: grpc.StatusCode
) -> None:
    server.plant(fails(code))
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert run.error is not None and run.error.code == code.name
    assert len(server.requests) == 1


@both
def test_tokens_that_were_delivered_forbid_another_attempt(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(breaks_after(1))
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert run.text == "Hi "
    assert run.error is not None and str(run.error).startswith("UNAVAILABLE: rank 1 lost at step 5")
    assert len(server.requests) == 1


@both
def test_a_full_server_says_when_to_come_again(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(fails(_FULL, "the queue is full", ("grpc-retry-pushback-ms", "300")))
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert (run.error, run.text) == (None, TEXT)
    first, second = server.arrivals
    assert second - first >= 0.3


@both
def test_a_delay_beyond_the_deadline_is_told_at_once(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(fails(_FULL, "the queue is full", ("grpc-retry-pushback-ms", "60000")))
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert run.error is not None and run.error.retry_delay_s == 60.0
    assert len(server.requests) == 1


@both
def test_a_server_that_says_never_is_not_asked_again(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(fails(_AWAY, "draining", ("grpc-retry-pushback-ms", "-1")))
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert run.error is not None and run.error.message == "draining"
    assert len(server.requests) == 1


@both
def test_the_limit_ends_a_stream_that_says_nothing(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(hangs_after(1))
    run = stream(kind, address, _REQUEST, _CONFIG, timeout_s=3.0)
    assert run.text == "Hi "
    assert run.error is not None and run.error.code == "DEADLINE_EXCEEDED"
    assert server.cancelled.wait(scripted_server.WAIT_S)


@both
def test_every_attempt_has_what_is_left_of_the_limit(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(fails(_FULL, "full", ("grpc-retry-pushback-ms", "1000")))
    stream(kind, address, _REQUEST, _CONFIG, timeout_s=9.0)
    first_s, second_s = server.limits_s
    # A second went by; gRPC rounds limits up by less than a tenth on the way.
    assert second_s <= first_s - 0.8 and first_s <= 9.1


@both
def test_a_stream_without_its_last_message_is_an_error(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(ends_early)
    run = stream(kind, address, _REQUEST, _CONFIG)
    assert run.text == TEXT
    assert run.error is not None and "without its last message" in run.error.message


@both
def test_a_resumed_stream_goes_on_where_it_broke_with_the_same_seed(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(breaks_after(1), fails(_AWAY), breaks_after(1))
    run = stream(kind, address, _REQUEST, _CONFIG, resume=True)
    assert (run.error, run.text, run.token_ids) == (None, TEXT, IDS)
    assert [list(request.resume_output_ids) for request in server.requests] == [
        [],
        [4],
        [4],
        [4, 5],
    ]
    seeds = [request.sampling_params.seed for request in server.requests]
    assert seeds == [0, *[scripted_server.DRAWN_SEED] * 3]


@both
def test_resume_is_on_by_configuration_and_off_by_call(
    kind: str, server: ScriptedServer, address: str
) -> None:
    config = ClientConfig(timeout_s=30.0, retry=_CONFIG.retry, resume=True)
    server.plant(breaks_after(2))
    assert stream(kind, address, _REQUEST, config).text == TEXT
    server.plant(breaks_after(2))
    assert stream(kind, address, _REQUEST, config, resume=False).error is not None


@both
def test_own_resumed_ids_come_first_and_are_not_delivered(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(breaks_after(1))
    request = GenerateRequest("x", SamplingParams(max_tokens=8, seed=5), resume_output_ids=[4])
    run = stream(kind, address, request, _CONFIG, resume=True)
    assert run.token_ids == IDS[1:]
    assert list(server.requests[1].resume_output_ids) == [4, 5]
    assert server.requests[1].sampling_params.seed == 5


@both
def test_a_break_after_the_last_token_asks_how_it_ended(
    kind: str, server: ScriptedServer, address: str
) -> None:
    server.plant(breaks_after(len(IDS)))
    run = stream(kind, address, _REQUEST, _CONFIG, resume=True)
    assert (run.error, run.text) == (None, TEXT)
    assert list(server.requests[1].resume_output_ids) == list(IDS)
    assert run.generation.finished.finish_reason is FinishReason.LENGTH


@both
@pytest.mark.parametrize("resume", [False, True])
def test_a_break_after_the_last_message_loses_nothing(
    kind: str, server: ScriptedServer, address: str, resume: bool
) -> None:
    server.plant(whole_and_broken)
    run = stream(kind, address, _REQUEST, _CONFIG, resume=resume)
    assert (run.error, run.text, len(server.requests)) == (None, TEXT, 1)
    assert run.generation.finished is not None


def test_only_one_sample_can_be_resumed(address: str) -> None:
    with Client(address, _CONFIG) as client, pytest.raises(ValueError, match="n is 2"):
        client.generate(GenerateRequest("x", SamplingParams(n=2)), resume=True)


@both
def test_a_server_that_dies_and_comes_back_at_its_address_is_resumed(
    kind: str, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/server"  # a port could be another's in between
    first, second = ScriptedServer(), ScriptedServer()
    first.plant(hangs_after(2))
    config = ClientConfig(
        timeout_s=60.0, resume=True, retry=RetryPolicy(max_attempts=500, max_backoff_s=0.5)
    )
    with contextlib.ExitStack() as first_life, ThreadPoolExecutor(1) as pool:
        first_life.enter_context(serving(first, address))
        run = pool.submit(stream, kind, address, _REQUEST, config)
        assert first.told.wait(scripted_server.WAIT_S)
        first_life.close()
        with serving(second, address):
            outcome = run.result(60.0)
    assert (outcome.error, outcome.text) == (None, TEXT)
    assert list(second.requests[-1].resume_output_ids) == list(IDS[:2])


def test_calls_are_under_way_before_they_are_iterated(server: ScriptedServer, address: str) -> None:
    with Client(address, _CONFIG) as client:
        generations = [client.generate(_REQUEST) for _ in range(3)]
        assert server.arrived(3)
        assert ["".join(delta.text for delta in each) for each in generations] == [TEXT] * 3


def test_threads_share_a_client(server: ScriptedServer, address: str) -> None:
    with Client(address, _CONFIG) as client, ThreadPoolExecutor(8) as pool:
        texts = pool.map(
            lambda _: "".join(delta.text for delta in client.generate(_REQUEST)), range(16)
        )
        assert list(texts) == [TEXT] * 16
