"""What `lockstep replay` starts."""

from pathlib import Path

import pytest

from lockstep.replay import main, replay_group


def _words(model: Path, *more: str) -> list[str]:
    return ["steps", "--tp", "2", "--model", str(model), "--devices", "cpu", *more]


def test_the_replay_stands_in_the_coordinators_place_and_leaves_the_workers(
    tmp_path: Path,
) -> None:
    group = replay_group(_words(tmp_path, "--pace", "recorded", "--json"))
    assert group.num_ranks == 2 and not group.restarts
    command = group.coordinator_command(["h:1", "h:2"], 0, 0, "/r")
    assert command[3:7] == ["coordinator.replay", "steps", "--workers", "h:1,h:2"]
    words = ["--leave-workers", "--pace", "recorded", "--json", "--model", str(tmp_path)]
    assert command[7:-2] == words
    assert command[-2] == "--group-secret"
    assert command[-1] in group.worker_command(0, 0, 0, "/r")
    assert "worker" in group.worker_command(0, 0, 0, "/r")


def test_simulated_workers_get_the_flags_meant_for_them(tmp_path: Path) -> None:
    group = replay_group(_words(tmp_path, "--simulated", "--worker-flags", "--step-ms 2"))
    worker = group.worker_command(1, 0, 0, "/r")
    assert "worker.simulated" in worker and worker[-2:] == ["--step-ms", "2"]
    assert "--simulated" in group.coordinator_command(["h:1"], 0, 0, "/r")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["steps", "--workers", "h:1", "--tp", "2"], "--tp and --devices would start some"),
        (["steps", "--tp", "2"], "--model is missing"),
    ],
)
def test_what_does_not_go_together_is_refused(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
