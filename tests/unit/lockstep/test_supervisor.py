"""What the supervisor does when a daemon, or it itself, ends."""

import os
import signal
from pathlib import Path

import pytest

from lockstep.daemon.exit_codes import ExitCode
from tests.unit.lockstep.fake_daemons import SERVES, Supervised, kill, supervised


def test_workers_first_then_a_coordinator_that_knows_their_addresses(tmp_path: Path) -> None:
    with supervised(tmp_path) as group:
        pid = group.wait_ready()
        names = [note["name"] for note in group.notes()]
        assert sorted(names[:2]) == ["worker 0", "worker 1"]
        ports = {n["name"]: 40000 + n["pid"] % 10000 for n in group.notes()[:2]}
        addresses = ",".join(f"127.0.0.1:{ports[f'worker {rank}']}" for rank in range(2))
        assert names[2:] == [f"coordinator {addresses}"]
        assert group.notes()[2]["pid"] == pid
        assert list(group.tmp.iterdir()) == []


def test_workers_are_given_their_metrics_ports(tmp_path: Path) -> None:
    with supervised(tmp_path) as group:
        group.wait_ready()
        for rank in range(2):
            assert group.wait_notes(f"worker {rank}", 1)[0]["metrics_port"] == 9860 + rank


def test_killed_worker_is_started_again_on_its_port(tmp_path: Path) -> None:
    with supervised(tmp_path) as group:
        coordinator = group.wait_ready()
        first = group.wait_notes("worker 1", 1)[0]
        kill(first["pid"])
        second = group.wait_notes("worker 1", 2)[1]
        assert second["port"] == 40000 + first["pid"] % 10000
        assert len(group.wait_notes("worker 0", 1)) == 1
        os.kill(coordinator, 0)


def test_worker_that_exits_after_serving_is_started_again_whatever_its_code(
    tmp_path: Path,
) -> None:
    exits = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(4)); " + SERVES
    with supervised(tmp_path, workers=[exits]) as group:
        group.wait_ready()
        os.kill(group.wait_notes("worker 0", 1)[0]["pid"], signal.SIGUSR1)
        group.wait_notes("worker 0", 2)


def test_coordinator_killed_by_a_signal_restarts_the_group_on_the_same_ports(
    tmp_path: Path,
) -> None:
    with supervised(tmp_path) as group:
        first = group.wait_ready()
        kill(first)
        assert group.wait_ready() != first
        ports = [note["port"] for note in group.wait_notes("coordinator", 2)]
        assert ports == [0, 40000 + first % 10000]
        for rank in range(2):
            old, new = group.wait_notes(f"worker {rank}", 2)
            assert new["port"] == 40000 + old["pid"] % 10000


def test_third_lost_coordinator_ends_with_group_lost(tmp_path: Path) -> None:
    with supervised(tmp_path) as group:
        for _ in range(3):
            kill(group.wait_ready())
        code, errors = group.wait_exit()
        assert code == ExitCode.GROUP_LOST
        assert "SIGKILL; 3 such losses in 10 minutes" in errors
        group.assert_nothing_left()


def test_coordinator_that_crashes_once_it_has_served_restarts_the_group(tmp_path: Path) -> None:
    # At once: its end may be seen before its ready file.
    crashes = SERVES.replace("time.sleep(600)", "int(port) or os._exit(1); time.sleep(600)")
    with supervised(tmp_path, coordinator=crashes) as group:
        first = group.wait_ready()
        assert group.wait_ready() != first
        assert len(group.wait_notes("worker 0", 2)) == 2


@pytest.mark.parametrize("code", [0, 1, 2, 5, 6])
def test_coordinator_that_exits_ends_everything_with_its_code(tmp_path: Path, code: int) -> None:
    with supervised(tmp_path, coordinator=f"note(event='start'); sys.exit({code})") as group:
        assert group.wait_exit()[0] == code
        assert len(group.notes("SIGTERM")) == 2
        group.assert_nothing_left()


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_worker_that_refuses_to_start_ends_everything_with_its_code(
    tmp_path: Path, code: int
) -> None:
    refuses = f"note(event='start'); sys.exit({code})"
    with supervised(tmp_path, workers=[SERVES, refuses]) as group:
        exit_code, errors = group.wait_exit()
        assert exit_code == code
        assert f"worker 1 (pid {_pid_of(group, 'worker 1')}) exited with {code}" in errors
        group.assert_nothing_left()


def test_worker_that_crashes_at_start_again_and_again_ends_with_group_lost(
    tmp_path: Path,
) -> None:
    with supervised(tmp_path, workers=["note(event='start'); os.kill(os.getpid(), 9)"]) as group:
        assert group.wait_exit()[0] == ExitCode.GROUP_LOST
        group.assert_nothing_left()


def test_without_restarts_a_lost_rank_ends_everything_by_name(tmp_path: Path) -> None:
    with supervised(tmp_path, restarts=False) as group:
        group.wait_ready()
        pid = group.wait_notes("worker 1", 1)[0]["pid"]
        kill(pid)
        code, errors = group.wait_exit()
        assert code == ExitCode.GROUP_LOST
        assert f"rank lost: worker 1 (pid {pid}) was ended by SIGKILL" in errors
        group.assert_nothing_left()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_the_coordinator_before_the_workers(tmp_path: Path, signum: int) -> None:
    with supervised(tmp_path) as group:
        group.wait_ready()
        group.process.send_signal(signum)
        assert group.wait_exit()[0] == ExitCode.CLEAN
        stopped = [note["name"].split()[0] for note in group.notes("SIGTERM")]
        assert stopped == ["coordinator", "worker", "worker"]
        group.assert_nothing_left()


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    stubborn = "signal.signal(signal.SIGTERM, lambda *_: note(event='SIGTERM')); " + SERVES
    stubborn = stubborn.replace("time.sleep(600)", "[time.sleep(1) for _ in range(600)]")
    with supervised(tmp_path, coordinator=stubborn, drain_timeout_s=600) as group:
        group.wait_ready()
        group.process.send_signal(signal.SIGTERM)
        group.wait_notes("coordinator", 1, event="SIGTERM")
        group.process.send_signal(signal.SIGTERM)
        assert group.wait_exit()[0] == ExitCode.SECOND_SIGNAL
        group.assert_nothing_left()


def test_coordinator_that_does_not_drain_in_time_is_killed(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVES
    with supervised(tmp_path, coordinator=deaf, drain_timeout_s=0.3) as group:
        group.wait_ready()
        group.process.send_signal(signal.SIGTERM)
        code, errors = group.wait_exit()
        assert code == ExitCode.GROUP_LOST
        assert "coordinator did not stop within 0.3 s" in errors
        group.assert_nothing_left()


def test_killed_supervisor_leaves_nothing_behind(tmp_path: Path) -> None:
    with supervised(tmp_path) as group:
        group.wait_ready()
        group.process.kill()
        group.wait_exit()
        group.assert_nothing_left()


def test_signal_during_start_stops_too(tmp_path: Path) -> None:
    never_ready = "note(event='start'); time.sleep(600)"
    with supervised(tmp_path, workers=[never_ready]) as group:
        group.wait_notes("worker", 2)
        group.process.send_signal(signal.SIGTERM)
        assert group.wait_exit()[0] == ExitCode.CLEAN
        group.assert_nothing_left()


def test_gateway_starts_once_the_coordinator_can_answer_and_ready_waits_for_it(
    tmp_path: Path,
) -> None:
    with supervised(tmp_path, gateway=SERVES) as group:
        coordinator = group.wait_ready()
        names = [note["name"] for note in group.notes()]
        assert names[-1] == f"gateway 127.0.0.1:{40000 + coordinator % 10000}"
        assert (tmp_path / "gateway.ready").exists()


def test_signal_stops_the_gateway_before_the_coordinator_before_the_workers(
    tmp_path: Path,
) -> None:
    with supervised(tmp_path, gateway=SERVES) as group:
        group.wait_ready()
        group.process.send_signal(signal.SIGTERM)
        assert group.wait_exit()[0] == ExitCode.CLEAN
        stopped = [note["name"].split()[0] for note in group.notes("SIGTERM")]
        assert stopped == ["gateway", "coordinator", "worker", "worker"]
        group.assert_nothing_left()


def test_killed_gateway_is_started_again_and_the_group_goes_on(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway=SERVES) as group:
        coordinator = group.wait_ready()
        kill(group.wait_notes("gateway", 1)[0]["pid"])
        assert group.wait_ready() == coordinator
        assert len(group.wait_notes("gateway", 2)) == 2
        assert len(group.notes()) == 2 + 1 + 2


def test_gateway_outlives_a_restart_of_the_group(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway=SERVES) as group:
        kill(group.wait_ready())
        group.wait_ready()
        assert len(group.wait_notes("coordinator", 2)) == 2
        assert len(group.wait_notes("gateway", 1)) == 1


def test_gateway_that_ends_before_it_was_ready_ends_everything(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway="note(event='start'); sys.exit(1)") as group:
        code, errors = group.wait_exit()
        assert code == ExitCode.CONFIG
        assert f"gateway (pid {_pid_of(group, 'gateway')}) exited with 1" in errors
        group.assert_nothing_left()


def test_gateway_that_is_not_ready_in_time_is_started_again_and_at_last_ends_everything(
    tmp_path: Path,
) -> None:
    never = "note(event='start'); time.sleep(600)"
    with supervised(tmp_path, gateway=never, gateway_timeout_s=0.5) as group:
        code, errors = group.wait_exit()
        assert code == ExitCode.GROUP_LOST
        assert "gateway not ready within 0.5 s; 3 such losses in 10 minutes" in errors
        assert len([note for note in group.notes() if note["name"].startswith("gateway")]) == 3
        group.assert_nothing_left()


def test_third_lost_gateway_ends_with_group_lost(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway=SERVES) as group:
        for count in (1, 2, 3):
            group.wait_ready()
            kill(group.wait_notes("gateway", count)[-1]["pid"])
        code, errors = group.wait_exit()
        assert code == ExitCode.GROUP_LOST
        assert "SIGKILL; 3 such losses in 10 minutes" in errors
        group.assert_nothing_left()


def _pid_of(group: Supervised, name: str) -> int:
    return next(int(note["pid"]) for note in group.notes() if note["name"].startswith(name))
