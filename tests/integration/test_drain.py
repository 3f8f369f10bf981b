"""SIGTERM under load: who has been accepted is served to the end, who comes too late is told."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.errors import CallFailed
from protos.lockstep.v1 import generate_pb2
from tests.helpers.message_client import Client, ids_request
from tests.helpers.served_group import ServedGroup
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.chaos_support import running_streams

pytestmark = pytest.mark.timeout(240)

NUM_STREAMS = 32
# 800 steps of 10 ms and more: over 5 s are left when the signal comes.
MAX_TOKENS, STEP_MS = 800, 10
LEFT_S = 5.0
PAUSE_S = 2.0
LIMIT_S = 90.0
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def group(tmp_path: Path) -> Iterator[ServedGroup]:
    model = tmp_path / "tiny"
    write_tiny_model(model, max_position_embeddings=4096)
    flags = ["--tp", "2", "--step-ms", str(STEP_MS), "--max-num-seqs", "64"]
    flags += ["--withdrawal-seconds", str(PAUSE_S), "--drain-seconds", "60"]
    with ServedGroup(model, tmp_path / "group", *flags, subcommand="simulate") as served:
        yield served


class Watched:
    """What readiness said last, and when it and the connection went."""

    def __init__(self, group: ServedGroup) -> None:
        self.not_serving_at = self.closed_at = 0.0
        self.end: grpc.StatusCode | None = None
        self._channel = group.channel()
        request = health_pb2.HealthCheckRequest(service="readiness")
        self._watch = health_pb2_grpc.HealthStub(self._channel).Watch(request, timeout=LIMIT_S)
        assert next(self._watch).status == health_pb2.HealthCheckResponse.SERVING
        self._thread = threading.Thread(target=self._read, name="readiness")
        self._thread.start()

    def join(self) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        self._channel.close()

    def _read(self) -> None:
        try:
            for answer in self._watch:
                if answer.status == NOT_SERVING and not self.not_serving_at:
                    self.not_serving_at = time.monotonic()
        except grpc.RpcError as error:
            self.end = error.code()
        self.closed_at = time.monotonic()


Arrival = tuple[float, str, int]


def num_refused(arrivals: list[Future[Arrival]]) -> int:
    ended = [arrival.result() for arrival in arrivals if arrival.done()]
    return sum(code != "OK" for _, code, _ in ended)


def arrive(client: Client, number: int) -> Arrival:
    """A short request: when it was sent, how it ended, its tokens."""
    sent_at = time.monotonic()
    request = ids_request([3, 3 + number % 100], temperature=0.0, max_tokens=8, ignore_eos=True)
    generation = client.generate(request, timeout_s=LIMIT_S)
    try:
        num_tokens = sum(len(delta.token_ids) for delta in generation)
    except CallFailed as error:
        return sent_at, error.code, 0
    assert generation.finished is not None
    assert generation.finished.finish_reason == generate_pb2.FINISH_REASON_LENGTH
    return sent_at, "OK", num_tokens


def test_sigterm_with_streams_in_flight_and_clients_still_arriving(group: ServedGroup) -> None:
    readiness = Watched(group)
    arrivals: list[Future[Arrival]] = []
    with (
        running_streams(group.address, NUM_STREAMS, MAX_TOKENS) as streams,
        group.client() as client,
        ThreadPoolExecutor(16) as pool,
    ):
        told_at = time.monotonic()
        group.process.send_signal(signal.SIGTERM)
        # One every 50 ms, until some have come too late.
        while num_refused(arrivals) < 10:
            assert time.monotonic() < told_at + LIMIT_S, group.log_text()
            arrivals.append(pool.submit(arrive, client, len(arrivals)))
            time.sleep(0.05)
        ends = streams.ends(LIMIT_S)
        came = sorted(arrival.result(LIMIT_S) for arrival in arrivals)
    assert [(end.num_tokens, end.error) for end in ends] == [(MAX_TOKENS, None)] * NUM_STREAMS
    assert min(end.ended_at for end in ends) - told_at > LEFT_S
    # Every arrival is served whole or refused as a whole, in this order and never otherwise.
    codes = [code for _, code, _ in came]
    num_served = codes.count("OK")
    assert codes == ["OK"] * num_served + ["UNAVAILABLE"] * (len(codes) - num_served)
    assert all(tokens == (8 if code == "OK" else 0) for _, code, tokens in came)
    assert num_served > 10
    first_refused = came[num_served][0]
    assert first_refused - told_at >= PAUSE_S - 0.1
    readiness.join()
    assert told_at < readiness.not_serving_at < first_refused
    assert readiness.closed_at > max(end.ended_at for end in ends) - 0.1
    assert group.wait_exit() == 0
