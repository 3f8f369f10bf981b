"""promtool on the rules: they parse, and each alert fires when it should and only then."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from coordinator.metrics import EngineMetrics, MetricsServer
from worker.metrics import WorkerMetrics

pytestmark = pytest.mark.apt

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
RULES = ("alerting.rules.yml", "recording.rules.yml")
TESTS = ("tests/alerting.test.yml", "tests/recording.test.yml")


def promtool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *words], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_example_configuration_and_its_rules_are_sound() -> None:
    checked = promtool(FOLDER, "check", "config", "prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("rules found") == len(RULES)


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    tested = promtool(FOLDER, "test", "rules", *TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("name", "written", "wrong"),
    [
        ("alerting.rules.yml", 'up{job=~"lockstep.*"} == 0', 'up{job=~"lockstep.*"} > 1'),
        ("alerting.rules.yml", "for: 10m", "for: 0m"),
        ("alerting.rules.yml", "and rate(lockstep_preemptions", "unless rate(lockstep_preemptions"),
        ("alerting.rules.yml", "> 0.05", "> 0.5"),
        ("recording.rules.yml", 'reason=~"queue_full|queue_time"', 'reason="draining"'),
        ("recording.rules.yml", "histogram_quantile(0.99", "histogram_quantile(0.5"),
    ],
)
def test_a_rule_that_is_wrong_is_noticed(
    tmp_path: Path, name: str, written: str, wrong: str
) -> None:
    copy = tmp_path / "prometheus"
    shutil.copytree(FOLDER, copy)
    text = (copy / name).read_text()
    assert written in text
    (copy / name).write_text(text.replace(written, wrong))
    assert promtool(copy, "test", "rules", *TESTS).returncode != 0


def scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return bytes(response.read())


def test_what_the_daemons_serve_is_sound_for_prometheus() -> None:
    with (
        MetricsServer(EngineMetrics("m", rank_up={0: True}), "127.0.0.1", 0) as coordinator,
        WorkerMetrics("m", "127.0.0.1", 0) as worker,
    ):
        worker.set_memory({"kv": 1})
        worker.observe_step(0.001)
        texts = [scrape(coordinator.port), scrape(worker.port)]
    for text in texts:
        checked = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
