"""What outsiders are told about a group that cannot answer."""

from __future__ import annotations

from pathlib import Path

from coordinator.config import CoordinatorConfig
from coordinator.group_status import GroupStatus
from coordinator.metrics import EngineMetrics

LOST = "rank 1 lost at step 7: it does not answer"


def make_status() -> GroupStatus:
    config = CoordinatorConfig(
        model=Path("model"), served_model_name="model", workers=("127.0.0.1:1", "127.0.0.1:2")
    )
    return GroupStatus(config, EngineMetrics("model"), lambda: None)


def cause(status: GroupStatus) -> str:
    return str(status.message().state.cause)


def test_a_first_start_names_its_phase() -> None:
    status = make_status()
    status.epoch_began(1)
    status.phase_began("load")
    assert cause(status) == "starting, phase load"


def test_a_restart_says_what_made_it_necessary() -> None:
    status = make_status()
    status.epoch_began(1)
    status.lost(LOST, rank=1, step=8)
    assert cause(status) == LOST
    status.epoch_began(2)
    status.phase_began("hello")
    assert cause(status) == f"starting, phase hello, after: {LOST}"
    assert status.message().state.server.epoch == 2
    assert not status.message().state.is_ready
