"""A real Prometheus over running groups: every query finds data, and each fault fires its alerts.

The ranks are simulated but for one small real group. Times of the rules are divided by a factor;
their expressions and thresholds are the deployed ones (tests/helpers/prometheus_server.py).
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.helpers.prometheus_server import RULES, PrometheusServer, shortened
from tests.helpers.served_group import ServedGroup
from tests.helpers.steady_load import SteadyLoad
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.test_daemons_alone import HandStarted, start_coordinator, start_worker

pytestmark = [pytest.mark.apt, pytest.mark.timeout(300)]

GRAFANA = RULES.parent / "grafana"
# For queries 30 minutes of offset have to pass, but not so fast that the five seconds in which
# Prometheus finds its first target are the five minutes of "no target". For load: five minutes are
# ten seconds. For losses: the two minutes that a target may be down are ten seconds, in which a
# worker starts again also on busy cores; the alerts that are waited for have no such time.
QUERY_FACTOR, LOAD_FACTOR, LOSS_FACTOR = 40, 30, 12
_POLL_S = 0.25
# After the expected alerts have fired: time in which no other one may.
_AFTERMATH_S = 3.0
_COMPARED = re.compile(r" (?:==|>=?|<) ")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder, max_position_embeddings=4096)
    return folder


def metrics_ports(group: ServedGroup) -> list[str]:
    """Where the workers tell their metrics: each says so in its log."""
    return sorted(
        {f"127.0.0.1:{port}" for port in re.findall(r"metrics on port (\d+)", group.log_text())}
    )


@contextlib.contextmanager
def watched(folder: Path, factor: int, *groups: ServedGroup) -> Iterator[PrometheusServer]:
    targets = {
        "lockstep-coordinator": [group.metrics for group in groups],
        "lockstep-worker": [port for group in groups for port in metrics_ports(group)],
    }
    with PrometheusServer(folder, targets, factor) as prometheus:
        yield prometheus


@contextlib.contextmanager
def simulated(model: Path, folder: Path, *flags: str) -> Iterator[ServedGroup]:
    words = ("--tp", "2", "--served-model-name", "simulated", "--drain-seconds", "1", *flags)
    with ServedGroup(model, folder, *words, subcommand="simulate") as group:
        yield group


def wait_until_firing(prometheus: PrometheusServer, names: set[str], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not names <= prometheus.has_fired():
        assert time.monotonic() < deadline, (prometheus.has_fired(), prometheus.log_text())
        time.sleep(_POLL_S)


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Of every panel and every variable of a dashboard, as Grafana would send them."""
    for path in sorted(GRAFANA.glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                expr = target["expr"].replace("$__rate_interval", "10s")
                expr = expr.replace("$job", "lockstep.*").replace("$model", ".*")
                yield f"{path.stem}: {panel['title']}", expr
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                selector = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"])
                assert selector is not None
                yield f"{path.stem}: ${variable['name']}", selector[1]


def rule_queries() -> Iterator[tuple[str, str]]:
    """What a recording rule computes and records, and the two sides of what an alert compares."""
    for path in sorted(RULES.glob("*.rules.yml")):
        rules = shortened(yaml.safe_load(path.read_text()), QUERY_FACTOR)
        for rule in (rule for group in rules["groups"] for rule in group["rules"]):
            if "record" in rule:
                yield rule["record"], rule["record"]
                yield rule["record"], rule["expr"]
            else:
                for side in sides(rule["expr"]):
                    yield rule["alert"], side


def sides(expr: str) -> list[str]:
    """An alert's expression has no value while all is well; what it compares must have one."""
    if inner := re.fullmatch(r"absent\((.+)\)", expr):
        return [inner[1]]
    compared = [side for part in expr.split(" and ") for side in _COMPARED.split(part)]
    found = [re.sub(r"^[\d.]+ \* ", "", side.strip()) for side in compared]
    return [side for side in found if not re.fullmatch(r"[\d.]+", side)]


def without_data(prometheus: PrometheusServer) -> list[str]:
    queries = [*dashboard_queries(), *rule_queries()]
    assert len(queries) > 60
    return [f"{where}: {expr}" for where, expr in queries if not prometheus.query(expr)]


def test_every_query_finds_data_in_a_system_under_load_and_no_alert_fires(
    tiny: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        real = ServedGroup(tiny, tmp_path / "real", "--tp", "2", "--num-threads", "1")
        stack.enter_context(real)
        fake = stack.enter_context(
            simulated(tiny, tmp_path / "fake", "--step-ms", "10", "--max-num-seqs", "8")
        )
        stack.enter_context(SteadyLoad(real.address, 0.5, max_tokens=20))
        stack.enter_context(SteadyLoad(fake.address, 0.1, max_tokens=50))
        prometheus = stack.enter_context(watched(tmp_path / "prometheus", QUERY_FACTOR, real, fake))
        # Until a rank's own past, which is the youngest by its offset, can be looked up.
        deadline = time.monotonic() + 90
        while missing := without_data(prometheus):
            assert time.monotonic() < deadline, missing
            time.sleep(1.0)
        assert prometheus.has_fired() == set()
        assert prometheus.log_text() == ""
        for address in (real.metrics, fake.metrics, *metrics_ports(real), *metrics_ports(fake)):
            assert complaints(f"{address}/metrics") == []
        # The colon is vLLM's.
        lint = " metric names should not contain ':'"
        assert all(line.endswith(lint) for line in complaints(f"{real.metrics}/metrics/vllm"))
        assert pictures_without_data(prometheus, tmp_path / "pictures") == []


def complaints(address: str) -> list[str]:
    """What promtool has to say of a page of metrics."""
    with urllib.request.urlopen(f"http://{address}", timeout=10) as response:
        text = bytes(response.read())
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
    )
    said = checked.stdout + checked.stderr
    return str(said, "utf-8").splitlines()


def pictures_without_data(prometheus: PrometheusServer, folder: Path) -> list[str]:
    """Draws every dashboard as the documents' pictures are drawn; names those with empty panels."""
    words = ["--prometheus", f"http://{prometheus.address}", "--minutes", "0.5"]
    words += ["--rate-interval", "10", "--caption", "a test", "--out", str(folder)]
    program = str(GRAFANA / "pictures.py")
    subprocess.run([sys.executable, program, *words], timeout=60, check=True)
    drawn = {path.stem: path.read_text() for path in folder.glob("*.svg")}
    assert set(drawn) == {path.stem for path in GRAFANA.glob("*.json")}
    return [name for name, svg in drawn.items() if "no data" in svg]


def test_without_targets_no_query_finds_data_and_that_alone_is_alerted(tmp_path: Path) -> None:
    with PrometheusServer(tmp_path / "prometheus", {}, QUERY_FACTOR) as prometheus:
        assert len(without_data(prometheus)) == len([*dashboard_queries(), *rule_queries()])
        wait_until_firing(prometheus, {"LockstepNoTarget"}, limit_s=30)
        assert prometheus.has_fired() == {"LockstepNoTarget"}


def workers(group: ServedGroup) -> list[psutil.Process]:
    return [each for each in group.members() if "worker.simulated" in each.cmdline()]


def test_a_killed_worker_fires_rank_lost_and_a_second_one_group_restarting(
    tiny: Path, tmp_path: Path
) -> None:
    with (
        simulated(tiny, tmp_path / "group") as group,
        watched(tmp_path / "prometheus", LOSS_FACTOR, group) as prometheus,
    ):
        wait_for_scrapes(prometheus)
        workers(group)[1].kill()
        wait_until_firing(prometheus, {"LockstepRankLost"}, limit_s=30)
        wait_for(prometheus, "min(lockstep_rank_up) == 1")
        time.sleep(_AFTERMATH_S)
        assert prometheus.has_fired() == {"LockstepRankLost"}
        workers(group)[0].kill()
        both = {"LockstepRankLost", "LockstepGroupRestarting"}
        wait_until_firing(prometheus, both, limit_s=30)
        wait_for(prometheus, "min(lockstep_rank_up) == 1")
        time.sleep(_AFTERMATH_S)
        assert prometheus.has_fired() == both


def test_a_rank_that_stalls_under_load_fires_rank_lost_alone(tiny: Path, tmp_path: Path) -> None:
    flags = ("--step-timeout", "1", "--step-ms", "5")
    with (
        simulated(tiny, tmp_path / "group", *flags) as group,
        SteadyLoad(group.address, 0.05, max_tokens=10) as load,
        watched(tmp_path / "prometheus", LOSS_FACTOR, group) as prometheus,
    ):
        wait_for_scrapes(prometheus)
        wait_for(prometheus, "sum(rate(lockstep_e2e_request_latency_seconds_count[10s])) > 15")
        workers(group)[1].send_signal(signal.SIGSTOP)
        wait_until_firing(prometheus, {"LockstepRankLost"}, limit_s=30)
        wait_for(prometheus, "min(lockstep_rank_up) == 1")
        time.sleep(_AFTERMATH_S)
        assert prometheus.has_fired() == {"LockstepRankLost"}
        assert load.ends["OK"] > 0


def test_workers_that_stay_away_fire_rank_lost_target_down_and_group_down(
    tiny: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        workers = [start_worker(stack, tiny, tmp_path / f"rank{rank}", 0) for rank in range(2)]
        addresses = [worker.address() for worker in workers]
        coordinator = start_coordinator(stack, tiny, tmp_path / "coordinator", addresses)
        coordinator.address()
        targets = {
            "lockstep-coordinator": [metrics_address(coordinator)],
            "lockstep-worker": [metrics_address(worker) for worker in workers],
        }
        prometheus = stack.enter_context(
            PrometheusServer(tmp_path / "prometheus", targets, LOAD_FACTOR)
        )
        wait_for_scrapes(prometheus)
        workers[1].process.kill()
        expected = {"LockstepRankLost", "LockstepTargetDown", "LockstepGroupDown"}
        wait_until_firing(prometheus, expected, limit_s=90)
        time.sleep(_AFTERMATH_S)
        assert prometheus.has_fired() == expected
        # The other worker was told to end, and nobody here starts one again.
        down = prometheus.query('ALERTS{alertname="LockstepTargetDown",alertstate="firing"}')
        assert {each["metric"]["instance"] for each in down} == set(targets["lockstep-worker"])


def metrics_address(daemon: HandStarted) -> str:
    return str(json.loads(daemon.ready_file.read_text(encoding="utf-8"))["metrics"])


# Twice what four rows of 50 tokens at 20 ms can serve, so that about five more wait every second.
OVERLOAD: dict[str, Any] = {"period_s": 0.1, "max_tokens": 50}
SLOW = ("--step-ms", "20", "--max-num-seqs", "4")


def test_a_queue_that_grows_fires_queue_growing_alone(tiny: Path, tmp_path: Path) -> None:
    with (
        simulated(tiny, tmp_path / "group", *SLOW) as group,
        SteadyLoad(group.address, **OVERLOAD),
        watched(tmp_path / "prometheus", LOAD_FACTOR, group) as prometheus,
    ):
        wait_until_firing(prometheus, {"LockstepQueueGrowing"}, limit_s=90)
        assert prometheus.has_fired() == {"LockstepQueueGrowing"}


def test_a_full_queue_fires_requests_rejected_alone(tiny: Path, tmp_path: Path) -> None:
    with (
        simulated(tiny, tmp_path / "group", *SLOW, "--max-queue-requests", "16") as group,
        SteadyLoad(group.address, **OVERLOAD) as load,
        watched(tmp_path / "prometheus", LOAD_FACTOR, group) as prometheus,
    ):
        wait_until_firing(prometheus, {"LockstepRequestsRejected"}, limit_s=90)
        time.sleep(_AFTERMATH_S)
        assert prometheus.has_fired() == {"LockstepRequestsRejected"}
        assert set(load.ends) == {"OK", "RESOURCE_EXHAUSTED"}


def wait_for_scrapes(prometheus: PrometheusServer) -> None:
    """Until rate() has something to go by, so that what comes next is seen as a change."""
    wait_for(prometheus, "min(count_over_time(up[10s])) >= 3")


def wait_for(prometheus: PrometheusServer, condition: str, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not prometheus.query(condition):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {condition}"
        time.sleep(_POLL_S)
