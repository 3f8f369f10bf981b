"""docs/metrics.md lists exactly what the daemons' registries serve."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.metrics import EngineMetrics, MetricsServer
from protos.lockstep.v1 import worker_pb2
from worker.metrics import WorkerMetrics

# Name -> (type, labels), as a scrape shows it.
Table = dict[str, tuple[str, frozenset[str]]]

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", re.M)


def documented(page: str, title: str) -> Table:
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in _ROW.findall(section)
    }


def served(port: int) -> Table:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    table: Table = {}
    for family in text_string_to_metric_families(text):
        # prometheus_client adds when each counter and histogram began.
        if family.name.endswith("_created"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        table[name] = (family.type, frozenset(labels))
    return table


def test_every_metric_of_the_coordinator_is_documented_and_no_other() -> None:
    metrics = EngineMetrics(
        "m",
        rank_up={0: True},
        startup_seconds={"load": 1.0},
        command_arrival_skew={1: 0.001},
        collective_arrival_skew={1: 0.001},
        worker_idle_seconds={0: 1.0},
    )
    for counted in (metrics.request_success, metrics.requests_failed, metrics.requests_rejected):
        counted["any"] += 1
    metrics.observe_broadcast(0, 0.001)
    with MetricsServer(metrics, "127.0.0.1", 0) as server:
        assert served(server.port) == documented(_PAGE.read_text(), "Coordinator")


@pytest.fixture
def worker_table() -> Iterator[Table]:
    with WorkerMetrics("m", "127.0.0.1", 0) as metrics:
        metrics.set_rank(1)
        metrics.set_phase(5)
        metrics.set_memory({"kv": 1})
        metrics.observe_step(0.001)
        metrics.set_all_reduces(3)
        metrics.observe_collective("all_reduce", "one_shot", 3e-6)
        time = worker_pb2.PathTime(byte_count=8192, microseconds=4.0)
        path = worker_pb2.PathReport(path="one_shot", operation="all_reduce", times=[time])
        metrics.set_paths(worker_pb2.PreflightResponse(paths=[path]))
        yield served(metrics.port)


def test_every_metric_of_a_worker_is_documented_and_no_other(worker_table: Table) -> None:
    assert worker_table == documented(_PAGE.read_text(), "Worker")


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("`lockstep_all_reduces` | gauge", "`lockstep_all_reduces` | counter"),
        ("`rank`, `kind`", "`rank`"),
        ("| `lockstep_worker_phase`", "| lockstep_worker_phase"),
    ],
)
def test_a_row_that_is_wrong_or_missing_is_noticed(
    worker_table: Table, written: str, wrong: str
) -> None:
    page = _PAGE.read_text()
    assert written in page
    assert worker_table != documented(page.replace(written, wrong), "Worker")
