"""What clients and operators see when a process of a running group is killed or stopped."""

from __future__ import annotations

import re
import signal
import time
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from lockstep.client import Client, ClientConfig, GenerateRequest, RetryPolicy, SamplingParams
from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import CallFailed
from tests.helpers.message_client import ids_request
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.chaos_support import (
    END_LIMIT_S,
    NUM_STREAMS,
    RECOVERY_LIMIT_S,
    ChaosGroup,
    GroupPool,
    StreamEnd,
    running_streams,
    wait_until,
)

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
ORPHAN_LIMIT_S = 5.0


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupPool]:
    model_dir = tmp_path_factory.mktemp("chaos-model") / "tiny"
    write_tiny_model(model_dir, max_position_embeddings=32768)
    lender = GroupPool(model_dir, lambda: tmp_path_factory.mktemp("chaos"))
    yield lender
    lender.close()


def lose_under_streams(group: ChaosGroup, name: str, number: signal.Signals) -> list[StreamEnd]:
    """Loses a process while streams run; all of them end UNAVAILABLE within the limit."""
    with running_streams(group.address) as streams:
        lost_at = group.lose(name, number)
        ends = streams.ends(END_LIMIT_S)
    assert len(ends) == NUM_STREAMS
    for end in ends:
        assert end.num_tokens > 0
        assert end.error is not None and end.error.code == "UNAVAILABLE"
        assert end.ended_at - lost_at < END_LIMIT_S
    return list(ends)


@pytest.mark.parametrize("number", [KILL, STOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_streams_end_naming_the_lost_rank_and_the_group_comes_back(
    pool: GroupPool, rank: int, number: signal.Signals
) -> None:
    with pool.restartable() as group:
        epoch = group.epoch()
        lost = group.find(f"rank {rank}")
        other = group.find(f"rank {1 - rank}")
        ends = lose_under_streams(group, f"rank {rank}", number)
        assert group.readiness() == "NOT_SERVING"
        for end in ends:
            assert re.search(rf"rank {rank} lost at step [1-9]\d*: \S+", str(end.error))
            assert f"rank {1 - rank} lost" not in str(end.error)
            if number == STOP:
                where = rf"rank {1 - rank} waits in call \d+, all_\w+ of \d+ bytes by shm, for \d"
                assert re.search(rf"rank {rank} gave no record \S+; {where}", str(end.error))
        group.wait_answering(epoch)
        # The whole group restarts, so that no rank is left in a collective of the old one.
        assert not lost.is_running() and not other.is_running()


def test_how_late_ranks_come_to_collectives_is_told_while_streams_run(pool: GroupPool) -> None:
    def told() -> bool:
        with urllib.request.urlopen(f"http://{group.metrics}/metrics", timeout=10) as response:
            text = response.read().decode()
        names = ("slowest_rank", "collective_arrival_skew_seconds")
        return all(f"lockstep_{name}{{" in text for name in names)

    with pool.restartable() as group, running_streams(group.address):
        wait_until(told, RECOVERY_LIMIT_S, group.log_text)


@pytest.mark.parametrize("name", ["rank 1", "frontend"])
def test_a_client_that_resumes_gets_the_output_of_an_unbroken_call(
    pool: GroupPool, name: str
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=11, max_tokens=2000, ignore_eos=True)
    request = GenerateRequest([3, 5, 7], sampling)
    patient = RetryPolicy(max_attempts=200, max_backoff_s=0.5)
    config = ClientConfig(timeout_s=RECOVERY_LIMIT_S + 60, resume=True, retry=patient)
    with pool.restartable() as group, Client(group.address, config) as client:
        whole = client.generate_unary(request).samples[0]
        ids: list[int] = []
        is_lost = False
        generation = client.generate(request)
        for delta in generation:
            ids += delta.token_ids
            if len(ids) >= 16 and not is_lost:
                is_lost = True
                group.lose(name, KILL)
        assert tuple(ids) == whole.token_ids
        assert generation.finished == whole.finished
        # The stream was broken, and the group that ended it is not the one that began it.
        assert int(generation.times["lockstep-steps"]) < len(ids)


@pytest.mark.parametrize(
    ("name", "number"), [("engine", KILL), ("engine", STOP), ("frontend", KILL)]
)
def test_streams_end_when_the_coordinator_is_lost_and_another_takes_over(
    pool: GroupPool, name: str, number: signal.Signals
) -> None:
    with pool.restartable() as group:
        epoch = group.epoch()
        engine, frontend = group.find("engine"), group.find("frontend")
        lose_under_streams(group, name, number)
        assert group.readiness() != "SERVING"
        group.wait_answering(epoch)
        assert not engine.is_running() and not frontend.is_running()


@pytest.mark.parametrize("name", ["engine", "rank 0", "rank 1"])
def test_a_process_killed_before_it_is_ready_is_started_again(pool: GroupPool, name: str) -> None:
    with pool.starting() as group:
        group.lose(name, KILL)
        group.wait_ready()
        group.wait_answering(above_epoch=0)
        assert "SIGKILL" in group.log_text()


def test_a_rank_killed_while_the_group_forms_is_started_again(pool: GroupPool) -> None:
    with pool.starting() as group:
        group.find("engine")  # all workers serve, none has been greeted
        group.lose("rank 1", KILL)
        group.wait_ready()
        group.wait_answering(above_epoch=0)


def test_a_rank_stopped_while_the_group_forms_is_named_when_the_start_times_out(
    pool: GroupPool,
) -> None:
    with pool.starting("--startup-timeout", "4") as group:
        group.find("engine")
        group.lose("rank 1", STOP)
        assert group.wait_exit(40) == ExitCode.GROUP_LOST
        assert re.search(r"rank 1 at \S+ did not answer within --startup-timeout", group.log_text())


def test_a_third_loss_in_ten_minutes_ends_the_group_with_code_6(pool: GroupPool) -> None:
    with pool.to_end() as group:
        for _ in range(3):  # fewer are enough for a group that has lost ranks already
            epoch = group.epoch()
            group.lose("rank 1", KILL)
            if not group.comes_back(epoch):
                break
        assert group.wait_exit(30) == ExitCode.GROUP_LOST
        assert re.search(r"3 failures in \d+ s; the last: rank 1 lost", group.log_text())


def test_a_killed_serve_leaves_no_process(pool: GroupPool) -> None:
    with pool.to_end() as group, running_streams(group.address) as streams:
        members = group.members()
        assert len(members) == 4
        group.process.kill()
        _, alive = psutil.wait_procs(members, timeout=ORPHAN_LIMIT_S)
        assert not alive
        assert all(end.error is not None for end in streams.ends(END_LIMIT_S))
        assert group.process.wait(5) == -KILL


def test_sigterm_lets_streams_finish_and_refuses_new_calls(pool: GroupPool) -> None:
    with pool.to_end() as group:
        with running_streams(group.address, max_tokens=1500) as streams:
            group.process.send_signal(signal.SIGTERM)
            with group.client() as client:
                wait_until(lambda: group.readiness() != "SERVING", 5, group.log_text)
                with pytest.raises(CallFailed, match="UNAVAILABLE.*(draining|stopping)"):
                    client.generate_unary(ids_request([3], max_tokens=1), timeout_s=10)
            ends = streams.ends(30)
        assert [(end.num_tokens, end.error) for end in ends] == [(1500, None)] * NUM_STREAMS
        assert group.wait_exit(15) == ExitCode.CLEAN


def test_a_second_signal_stops_at_once(pool: GroupPool) -> None:
    with pool.to_end() as group, running_streams(group.address) as streams:
        group.process.send_signal(signal.SIGINT)
        wait_until(lambda: group.readiness() != "SERVING", 5, group.log_text)
        signalled_at = time.monotonic()
        group.process.send_signal(signal.SIGINT)
        assert group.wait_exit(5) == ExitCode.SECOND_SIGNAL
        for end in streams.ends(5):
            assert end.error is not None and end.error.code == "UNAVAILABLE"
            assert end.ended_at > signalled_at - 5


def test_a_stopped_rank_does_not_outlive_its_group(pool: GroupPool) -> None:
    with pool.to_end() as group:
        group.lose("rank 0", STOP)
        assert group.stop() == ExitCode.CLEAN
