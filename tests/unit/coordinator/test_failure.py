"""Who is to blame, who may be killed, and how often a group may fail."""

import os
import signal
import subprocess
import sys

import pytest

from coordinator.errors import RankLost, StartRefused
from coordinator.failure import FailureBudget, find_root, kill_if_local
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.process_identity import boot_id, start_ticks
from protos.lockstep.v1 import worker_pb2

LOST = RankLost(0, 9, "silent")


def answer(error: str = "", is_drained: bool = True) -> worker_pb2.QuiesceResponse:
    return worker_pb2.QuiesceResponse(last_error=error, last_step=4, is_drained=is_drained)


@pytest.mark.parametrize(
    ("answers", "root"),
    [
        (
            [answer(), None, answer("ValueError: x")],
            "rank 1 lost at step 9: it does not answer (seen at rank 0: silent)",
        ),
        ([None, None], "rank 0 lost at step 9: silent"),
        (
            [answer("CommTimeout: y"), answer("ValueError: x", False)],
            "rank 1 lost at step 5: ValueError: x",
        ),
        (
            [answer("ValueError: z"), answer("ValueError: x")],
            "rank 0 lost at step 9: ValueError: z (silent)",
        ),
        ([answer(), answer(is_drained=False)], "rank 1 lost at step 5: its device does not stop"),
        ([answer(), answer("CommAborted: y")], "rank 0 lost at step 9: silent"),
        ([answer(), answer()], "rank 0 lost at step 9: silent"),
    ],
)
def test_the_root_is_the_rank_that_failed_not_the_one_that_waited(
    answers: list[worker_pb2.QuiesceResponse | None], root: str
) -> None:
    assert str(find_root(LOST, answers)) == root


def test_the_rank_behind_in_its_collectives_is_the_root_where_no_rank_has_an_error() -> None:
    waited = "rank 1 lost at step 5: the others wait for it (seen at rank 0: silent)"
    assert str(find_root(LOST, [answer(), answer("CommAborted: y")], [1])) == waited
    failed = "rank 1 lost at step 5: ValueError: x"
    assert str(find_root(LOST, [answer(), answer("ValueError: x")], [0])) == failed


def test_a_rank_of_this_boot_with_that_start_time_is_killed_and_no_other() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        hello = worker_pb2.HelloResponse(
            pid=process.pid, pid_start_ticks=start_ticks(process.pid), boot_id=boot_id()
        )
        reused = worker_pb2.HelloResponse()
        reused.CopyFrom(hello)
        reused.pid_start_ticks += 1
        elsewhere = worker_pb2.HelloResponse()
        elsewhere.CopyFrom(hello)
        elsewhere.boot_id = "another"
        assert not kill_if_local(0, reused)
        assert not kill_if_local(0, elsewhere)
        assert process.poll() is None
        assert kill_if_local(0, hello)
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert not kill_if_local(0, hello)


def test_start_ticks_of_no_process_match_nothing() -> None:
    assert start_ticks(2**22 + 1) == -1
    assert start_ticks(os.getpid()) > 0


def test_the_third_failure_within_ten_minutes_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("coordinator.failure.time.monotonic", lambda: clock[0])
    budget = FailureBudget()
    for at in (0.0, 300.0, 700.0, 950.0):  # never three within 600 s
        clock[0] = at
        budget.spend("a")
    clock[0] = 1100.0
    with pytest.raises(StartRefused, match="3 failures in 400 s; the last: b") as caught:
        budget.spend("b")
    assert caught.value.exit_code == ExitCode.GROUP_LOST
