"""Several frontends at one port: connections spread, names known to all, ends that concern all."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import grpc
import psutil
import pytest

from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.chaos_support import (
    END_LIMIT_S,
    ENDLESS,
    RECOVERY_LIMIT_S,
    ChaosGroup,
    wait_until,
)

pytestmark = pytest.mark.timeout(240)
_LIMIT_S = 60.0
# Connections go to frontends by a hash: all of them to one in a case of 2**19.
_NUM_CHANNELS = 20


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosGroup]:
    model_dir = tmp_path_factory.mktemp("frontends-model") / "tiny"
    write_tiny_model(model_dir, max_position_embeddings=32768)
    folder = tmp_path_factory.mktemp("frontends")
    with ChaosGroup(model_dir, folder, "--num-frontends", "2") as group:
        yield group


def request(max_tokens: int, request_id: str = "") -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        request_id=request_id,
        token_ids=generate_pb2.TokenIds(ids=[3, 5, 7]),
        sampling_params=generate_pb2.SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True
        ),
    )


def frontends(group: ChaosGroup) -> list[psutil.Process]:
    """Both frontend processes, as soon as they run."""
    found: list[psutil.Process] = []

    def both() -> bool:
        found[:] = group.running("coordinator.frontend")
        return len(found) == 2

    wait_until(both, RECOVERY_LIMIT_S, lambda: f"{len(found)} frontends: {group.log_text()}")
    return found


def clients_of(frontend: psutil.Process) -> set[int]:
    """Ports of the clients that are connected to a frontend."""
    return {
        connection.raddr.port
        for connection in frontend.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    }


class Connection:
    """A connection of its own and the frontend at its other end."""

    def __init__(self, group: ChaosGroup, stack: contextlib.ExitStack) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        before = {process.pid: clients_of(process) for process in frontends(group)}
        channel = stack.enter_context(grpc.insecure_channel(group.address, options=options))
        grpc.channel_ready_future(channel).result(_LIMIT_S)
        self.stub = generate_pb2_grpc.GenerateServiceStub(channel)
        (self.frontend,) = (
            process.pid for process in frontends(group) if clients_of(process) - before[process.pid]
        )


@pytest.fixture
def pair(group: ChaosGroup) -> Iterator[tuple[Connection, Connection]]:
    """Two connections to different frontends."""
    with contextlib.ExitStack() as stack:
        first = Connection(group, stack)
        for _ in range(_NUM_CHANNELS):
            second = Connection(group, stack)
            if second.frontend != first.frontend:
                break
        assert second.frontend != first.frontend
        yield first, second


def test_both_frontends_get_connections_and_answer_alike(
    pair: tuple[Connection, Connection],
) -> None:
    answers = [
        connection.stub.GenerateUnary(
            generate_pb2.GenerateUnaryRequest(request=request(16)), timeout=_LIMIT_S
        )
        for connection in pair
    ]
    assert answers[0].output == answers[1].output
    assert len(answers[0].output.token_ids) == 16


def test_a_name_in_use_at_one_frontend_is_in_use_at_the_other_and_aborts_there(
    pair: tuple[Connection, Connection],
) -> None:
    here, there = pair
    call = here.stub.Generate(request(ENDLESS, "shared"), timeout=_LIMIT_S)
    assert next(call).started.request_id == "shared"
    again = there.stub.Generate(request(4, "shared"), timeout=_LIMIT_S)
    with pytest.raises(grpc.RpcError) as caught:
        list(again)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    answer = there.stub.Abort(generate_pb2.AbortRequest(request_id="shared"), timeout=_LIMIT_S)
    assert answer.was_active
    *_, last = call
    assert last.finished.finish_reason == generate_pb2.FINISH_REASON_ABORTED


def test_a_killed_frontend_ends_all_streams_and_the_group_comes_back(
    group: ChaosGroup, pair: tuple[Connection, Connection]
) -> None:
    epoch = group.epoch()
    calls = [
        connection.stub.Generate(request(ENDLESS), timeout=_LIMIT_S + END_LIMIT_S)
        for connection in pair
    ]
    for call in calls:
        assert next(call).HasField("started")
    psutil.Process(pair[0].frontend).kill()
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    group.wait_answering(above_epoch=epoch)
    assert pair[0].frontend not in {process.pid for process in frontends(group)}


def test_drain_finishes_the_streams_of_both_and_ends_clean(
    group: ChaosGroup, pair: tuple[Connection, Connection]
) -> None:
    calls = [
        connection.stub.Generate(request(400), timeout=_LIMIT_S + END_LIMIT_S)
        for connection in pair
    ]
    for call in calls:
        assert next(call).HasField("started")
    group.process.send_signal(signal.SIGTERM)
    for call in calls:
        events = list(call)
        assert events[-1].finished.finish_reason == generate_pb2.FINISH_REASON_LENGTH
        assert sum(len(event.delta.token_ids) for event in events) == 400
    assert group.wait_exit() == 0
