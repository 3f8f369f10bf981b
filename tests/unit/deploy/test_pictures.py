"""Pictures of dashboards: what the queries found is in them, and they are well-formed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

GRAFANA = Path(__file__).resolve().parents[3] / "deploy" / "grafana"
_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def module() -> dict[str, Any]:
    return runpy.run_path(str(GRAFANA / "pictures.py"))


def found(expr: str) -> list[dict[str, Any]]:
    """Two series for every query, one of which has a gap."""
    assert "$" not in expr
    points = [[at, str(at % 7)] for at in range(100, 200, 10)]
    gap = [[at, "NaN"] for at in range(100, 150, 10)] + points[5:]
    return [{"metric": {"rank": "0"}, "values": points}, {"metric": {"rank": "<1>"}, "values": gap}]


@pytest.mark.parametrize("name", ["overview", "ranks", "requests"])
def test_every_panel_is_drawn_with_a_line_a_series(name: str, module: dict[str, Any]) -> None:
    board = json.loads((GRAFANA / f"{name}.json").read_text())
    svg = ElementTree.fromstring(module["draw"](board, found, 100.0, 200.0, 10, "a run & no more"))
    texts = [text.text for text in svg.iter(f"{_SVG}text")]
    assert "a run & no more" in texts
    assert {panel["title"] for panel in board["panels"]} <= set(texts)
    graphs = [panel for panel in board["panels"] if panel["type"] == "timeseries"]
    num_targets = sum(len(panel["targets"]) for panel in graphs)
    assert len(list(svg.iter(f"{_SVG}polyline"))) == 2 * num_targets


def test_a_panel_without_data_says_so(module: dict[str, Any]) -> None:
    board = json.loads((GRAFANA / "ranks.json").read_text())
    svg = ElementTree.fromstring(module["draw"](board, lambda expr: [], 100.0, 200.0, 10, ""))
    texts = [text.text for text in svg.iter(f"{_SVG}text")]
    assert texts.count("no data") == len(board["panels"])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.125, "percentunit", "12.5%"),
        (0.0025, "s", "2.5 ms"),
        (0.00004, "s", "40 us"),
        (3.0, "s", "3 s"),
        (0.0, "s", "0 s"),
        (3 * 2**30, "bytes", "3 GiB"),
        (1500.0, "short", "1.5k"),
        (12.0, "reqps", "12/s"),
    ],
)
def test_values_are_written_as_people_do(
    value: float, unit: str, text: str, module: dict[str, Any]
) -> None:
    assert module["in_unit"](value, unit) == text
