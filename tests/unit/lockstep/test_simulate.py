"""`lockstep simulate` hands each flag to whom it belongs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lockstep.daemon.flags import FlagError
from lockstep.errors import ConfigError
from lockstep.simulate import simulate_config, simulated_group


def test_flags_go_to_the_workers_or_the_coordinator(tmp_path: Path) -> None:
    argv = ["--model", str(tmp_path), "--tp", "3", "--step-ms", "5", "--max-num-seqs", "64"]
    argv += ["--metrics-host", "10.0.0.1"]
    config, worker_flags = simulate_config(argv, {"LOCKSTEP_SEED": "7"})
    assert config.num_ranks == 3
    group = simulated_group(config, worker_flags, {})
    worker = list(group.worker_command(1, 0, 0, "ready"))
    pairs = set(itertools.pairwise(worker))
    expected = {("-m", "worker.simulated"), ("--step-ms", "5"), ("--seed", "7")}
    assert expected | {("--metrics-host", "10.0.0.1")} <= pairs
    assert not {"--max-num-seqs", "--device"} & set(worker)
    coordinator = list(group.coordinator_command(["a:1"], 0, 0, "ready"))
    assert ("--max-num-seqs", "64") in set(itertools.pairwise(coordinator))
    assert not {"--step-ms", "--seed"} & set(coordinator)


@pytest.mark.parametrize("flag", ["--devices", "--load-format", "--nccl-path"])
def test_settings_of_a_model_are_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(FlagError, match=flag):
        simulate_config(["--model", str(tmp_path), flag, "1"], {})


def test_a_model_that_is_no_folder_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'owner/name'"):
        simulate_config(["--model", "owner/name"], {})


def test_a_bad_value_is_refused_as_serve_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--tp: '0'"):
        simulate_config(["--model", str(tmp_path), "--tp", "0"], {})
