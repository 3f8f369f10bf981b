"""A real Prometheus over daemons under test, with the project's rules in a shorter time."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
_START_LIMIT_S = 30.0
_STOP_LIMIT_S = 10.0
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = r"(\d+)([smhd])"
# Scrapes come once a second and rate() wants two at least, also when one is late.
_LEAST_RANGE_S = 4


def shortened(rules: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """The rule file's content with all its times divided by `factor`, and evaluated every second.

    The times are `for`, the ranges in brackets and the offsets; a range stays at least 4 s long.
    Nothing else changes: expressions, thresholds, labels and names are those that are deployed.
    """

    def ranges(expr: str) -> str:
        expr = re.sub(
            rf"\[{_DURATION}\]", lambda at: f"[{_short(at, factor, _LEAST_RANGE_S)}]", expr
        )
        return re.sub(rf"offset {_DURATION}", lambda at: f"offset {_short(at, factor, 1)}", expr)

    groups = []
    for group in rules["groups"]:
        changed = []
        for rule in group["rules"]:
            short = rule | {"expr": ranges(rule["expr"])}
            if "for" in rule:
                duration = re.fullmatch(_DURATION, rule["for"])
                assert duration is not None, rule["for"]
                short["for"] = _short(duration, factor, 1)
            changed.append(short)
        groups.append(group | {"interval": "1s", "rules": changed})
    return {"groups": groups}


def _short(duration: re.Match[str], factor: int, least_s: int) -> str:
    seconds = int(duration[1]) * _SECONDS[duration[2]]
    return f"{max(least_s, seconds // factor)}s"


class PrometheusServer:
    """Scrapes `targets` (addresses by job) once a second; a context manager that ends it."""

    def __init__(self, folder: Path, targets: Mapping[str, Sequence[str]], factor: int) -> None:
        folder.mkdir()
        names = [path.name for path in sorted(RULES.glob("*.rules.yml"))]
        for name in names:
            rules = shortened(yaml.safe_load((RULES / name).read_text()), factor)
            (folder / name).write_text(yaml.safe_dump(rules, sort_keys=False))
        config = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": names,
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": list(addresses)}]}
                for job, addresses in targets.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False))
        self.address = f"127.0.0.1:{_free_port()}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._log = folder / "prometheus.log"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
        command += [f"--web.listen-address={self.address}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query that are numbers; a quantile of nothing is none."""
        found = self._get("query", {"query": expr})["result"]
        return [sample for sample in found if not math.isnan(float(sample["value"][1]))]

    def query_range(self, expr: str, seconds: float) -> list[dict[str, Any]]:
        """Series over the last `seconds`, a value a second."""
        end = time.time()
        params = {"query": expr, "start": end - seconds, "end": end, "step": 1}
        series: list[dict[str, Any]] = self._get("query_range", params)["result"]
        return series

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        alerts = self._get("alerts", {})["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def has_fired(self) -> set[str]:
        """Names of the alerts that have fired at any time."""
        samples = self.query('max_over_time(ALERTS{alertstate="firing"}[1h])')
        return {sample["metric"]["alertname"] for sample in samples}

    def log_text(self) -> str:
        """What it has complained of so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _START_LIMIT_S
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end()
                raise AssertionError(f"prometheus does not start: {self.log_text()}")
            time.sleep(0.05)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _is_up(self) -> bool:
        try:
            self._get("query", {"query": "1"})
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def _get(self, path: str, params: Mapping[str, object]) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(params)}"
        try:
            with self._opener.open(url, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:
                raise
            raise AssertionError(f"{params}: {error.read().decode()}") from error

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
