"""The table of `lockstep status`, and `lockstep drain` where it may not."""

import json
import os

import pytest

from lockstep.client import ServerInfo
from lockstep.client.wire import model_info_of, server_info_of
from lockstep.daemon.process_identity import boot_id, start_ticks
from lockstep.drain import DrainRefused, is_running, tell
from lockstep.status import as_json, render
from protos.lockstep.v1 import generate_pb2

MODEL = model_info_of(generate_pb2.GetModelInfoResponse(model="m", max_model_len=4096))


def server(**changes: object) -> ServerInfo:
    ranks = [
        generate_pb2.RankInfo(
            rank=0,
            address="10.0.0.1:50100",
            host="a",
            pid=12,
            version="0.1.0",
            device="NVIDIA H100",
            is_up=True,
            memory_bytes={"weights": 16 * 2**30, "kv": 5 * 2**20, "graphs": 0},
        ),
        generate_pb2.RankInfo(rank=1, address="10.0.0.2:50100", last_error="CommTimeout: 30 s"),
    ]
    given: dict[str, object] = {"version": "0.1.0", "is_ready": True, "epoch": 7, "ranks": ranks}
    given |= {"running_count": 3, "max_num_seqs": 256, "waiting_count": 2, "block_size": 16}
    given |= {"block_count": 100, "kv_cache_usage": 0.125} | changes
    return server_info_of(generate_pb2.GetServerInfoResponse(**given))  # type: ignore[arg-type]


def test_ranks_load_memory_and_last_errors_are_shown() -> None:
    lines = render("h:1", server(last_loss="rank 1 lost at step 5: why"), MODEL).splitlines()
    assert lines[0] == "server     h:1, lockstep 0.1.0, SERVING"
    assert "3 running of 256, 2 waiting, 12% of 100 KV blocks of 16 tokens in use" in lines[2]
    assert lines[4] == "last loss  rank 1 lost at step 5: why"
    first, second = (line.split(" | ") for line in lines[-4:-2])
    assert [cell.strip() for cell in first] == [
        *("0", "10.0.0.1:50100", "a", "12", "0.1.0", "NVIDIA H100", "up"),
        "kv 5.0 MiB, weights 16.0 GiB",
    ]
    assert [cell.strip() for cell in second[2:]] == ["-", "-", "-", "-", "down", "-"]
    assert lines[-1] == "rank 1: CommTimeout: 30 s"


@pytest.mark.parametrize(
    ("changes", "health"),
    [
        ({"is_ready": False, "cause": "starting, phase load"}, "NOT_SERVING: starting, phase load"),
        ({"is_ready": False, "is_draining": True}, "NOT_SERVING: draining"),
    ],
)
def test_why_it_cannot_answer_is_said(changes: dict[str, object], health: str) -> None:
    assert render("h:1", server(**changes), MODEL).splitlines()[0].endswith(health)


def test_json_has_both_answers() -> None:
    found = json.loads(as_json(server(), MODEL))
    assert found["server"]["ranks"][1]["last_error"] == "CommTimeout: 30 s"
    assert found["model"]["model"] == "m"


@pytest.mark.parametrize("changes", [{"boot_id": "another host"}, {"pid_start_ticks": 1}])
def test_a_process_that_is_not_the_one_that_answered_is_not_signalled(
    changes: dict[str, object],
) -> None:
    pid = os.getpid()
    own: dict[str, object] = {"pid": pid, "boot_id": boot_id(), "pid_start_ticks": start_ticks(pid)}
    with pytest.raises(DrainRefused, match="none of this host"):
        tell(server(**own | changes))


def test_a_running_process_is_told_from_an_ended_one() -> None:
    pid = os.getpid()
    assert is_running(pid, start_ticks(pid))
    assert not is_running(pid, start_ticks(pid) + 1)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not is_running(child, start_ticks(child))  # a zombie
    os.waitpid(child, 0)
    assert not is_running(child, -1)
