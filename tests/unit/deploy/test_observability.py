"""Alerts and dashboards ask for metrics that exist, and every alert says what to do."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).resolve().parents[3]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RUNBOOK = ROOT / "docs" / "runbook.md"
SUFFIXES = ("_bucket", "_sum", "_count")
# Labels that Prometheus adds.
TARGET_LABELS = {"job", "instance", "le"}

_ROW = re.compile(r"^\| `(lockstep_\w+)` \| (\w+) \| (.*?) \|", re.M)
_SELECTOR = re.compile(r"(?<![\w:])(lockstep_\w+|up)(?:\{([^}]*)\})?")


def documented() -> dict[str, set[str]]:
    """Labels of every series that the daemons serve."""
    found: dict[str, set[str]] = {}
    for name, kind, labels in _ROW.findall((ROOT / "docs" / "metrics.md").read_text()):
        names = [name + suffix for suffix in SUFFIXES] if kind == "histogram" else [name]
        found |= dict.fromkeys(names, set(re.findall(r"`(\w+)`", labels)))
    return found


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / f"{name}.rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerting")}
RECORDED = {rule["record"]: rule for rule in rules("recording")}


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}


def expressions() -> Iterator[tuple[str, str]]:
    for name, rule in (ALERTS | RECORDED).items():
        yield name, rule["expr"]
    for name, board in dashboards().items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]


def unknown(expr: str) -> list[str]:
    """Series, labels and recorded names in an expression that nobody serves."""
    known, found = documented(), []
    for name, selector in _SELECTOR.findall(expr):
        if name == "up":
            continue
        labels = {part.split("=")[0].strip(" !~") for part in selector.split(",") if part}
        if name not in known:
            found.append(name)
        elif not labels <= known[name] | TARGET_LABELS:
            found.append(f"{name}{labels}")
    recorded = re.findall(r"\w+:lockstep_\w+:\w+", expr)
    return found + [name for name in recorded if name not in RECORDED]


@pytest.mark.parametrize(("where", "expr"), list(expressions()))
def test_an_expression_asks_only_for_what_is_served(where: str, expr: str) -> None:
    assert unknown(expr) == []
    assert "vector(" not in expr
    assert _SELECTOR.search(expr) or ":lockstep_" in expr


@pytest.mark.parametrize(
    "expr",
    [
        "rate(lockstep_generated_total[1m])",
        'lockstep_rank_up{host="a"}',
        "lockstep_e2e_request_latency_seconds",
        "job_model:lockstep_nothing:rate1m > 1",
    ],
)
def test_an_unknown_name_or_label_is_noticed(expr: str) -> None:
    assert unknown(expr) != []


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_severity_a_summary_and_a_section_in_the_runbook(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    words = re.findall(r"[A-Z][a-z]+", name)
    anchor = "-".join(words).lower()
    assert alert["annotations"]["runbook"] == f"docs/runbook.md#{anchor}"
    sections = re.findall(r"^## (.+)\n\n(.+)$", RUNBOOK.read_text(), re.M)
    texts = {title.lower().replace(" ", "-"): text for title, text in sections}
    assert len(texts[anchor]) > 200


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    titles = re.findall(r"^## (Lockstep .+)$", RUNBOOK.read_text(), re.M)
    assert {title.lower().replace(" ", "-") for title in titles} == {
        "-".join(re.findall(r"[A-Z][a-z]+", name)).lower() for name in ALERTS
    }


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_tested_to_fire_and_to_be_quiet(name: str) -> None:
    cases = yaml.safe_load((PROMETHEUS / "tests" / "alerting.test.yml").read_text())["tests"]
    outcomes = {
        bool(test["exp_alerts"])
        for case in cases
        for test in case["alert_rule_test"]
        if test["alertname"] == name
    }
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", dashboards())
def test_a_dashboard_is_what_its_description_writes(name: str) -> None:
    module = runpy.run_path(str(GRAFANA / "dashboards.py"))
    assert set(module["DASHBOARDS"]) == set(dashboards())
    assert (GRAFANA / f"{name}.json").read_text() == module["text"](name)


def lost(given: object, kept: object, path: str = "") -> list[str]:
    """Where `kept` lacks or changes what `given` holds."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            item
            for key in given
            for item in (
                lost(given[key], kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"]
            )
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return [item for index, (a, b) in pairs for item in lost(a, b, f"{path}[{index}]")]
    return [] if given == kept else [path]


def through_schema(board: dict[str, Any]) -> Any:
    """As Grafana's own schema library reads and writes it: what it does not know is dropped."""
    register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))


@pytest.mark.parametrize("name", dashboards())
def test_grafanas_schema_knows_every_field_of_a_dashboard(name: str) -> None:
    board = dashboards()[name]
    assert lost(board, through_schema(board)) == []
    board["panels"][0]["titel"] = "x"
    assert lost(board, through_schema(board)) == [".panels[0].titel"]


@pytest.mark.parametrize("name", dashboards())
def test_panels_fill_the_grid_without_overlap(name: str) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboards()[name]["panels"]:
        grid = panel["gridPos"]
        own = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert max(x for x, _ in own) < 24
        assert cells.isdisjoint(own)
        cells |= own
