"""Draws the dashboards from a running Prometheus: a picture a dashboard, as SVG.

    python deploy/grafana/pictures.py --prometheus http://127.0.0.1:9090 --minutes 5 \\
        --caption "what ran" --out docs/pictures

Each panel's own queries are asked for the last minutes, for all jobs and models. The pictures are
for documents and reports; they have the panels' titles and places, not Grafana's looks.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent
_COLUMN, _ROW = 40, 24  # pixels of a cell of Grafana's grid
_HEAD = 46
_NUM_POINTS = 90
_MOST_LEGENDS = 6
_COLOURS = ("#3274d9", "#e0752d", "#299c46", "#a352cc", "#e02f44", "#1f9e9e", "#8f8f00", "#777777")
Query = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Line:
    """One series: its legend and its points, (seconds since 1970, value)."""

    legend: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Frame:
    """Where a panel lies, in pixels, and the times that it shows."""

    x: int
    y: int
    width: int
    height: int
    begin: float
    end: float


def prometheus_query(address: str, begin: float, end: float) -> Query:
    """Asks that Prometheus for a range; raises urllib's errors."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def query(expr: str) -> list[dict[str, Any]]:
        step = (end - begin) / _NUM_POINTS
        params = {"query": expr, "start": begin, "end": end, "step": step}
        url = f"{address}/api/v1/query_range?{urllib.parse.urlencode(params)}"
        with opener.open(url, timeout=30) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found

    return query


def draw(
    board: dict[str, Any], query: Query, begin: float, end: float, rate_s: int, caption: str
) -> str:
    """The SVG of a dashboard's JSON model."""
    panels = board["panels"]
    height = _HEAD + _ROW * max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{24 * _COLUMN}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        '<rect width="100%" height="100%" fill="#f4f5f5"/>',
        f'<text x="10" y="18" font-size="15">{escape(board["title"])}</text>',
        f'<text x="10" y="36" fill="#666">{escape(caption)}</text>',
    ]
    for panel in panels:
        grid = panel["gridPos"]
        x, y = grid["x"] * _COLUMN + 4, _HEAD + grid["y"] * _ROW
        frame = Frame(x, y, grid["w"] * _COLUMN - 8, grid["h"] * _ROW - 8, begin, end)
        lines = [line for target in panel["targets"] for line in _lines(target, query, rate_s)]
        parts.append(_panel(panel, frame, lines))
    return "\n".join([*parts, "</svg>\n"])


def _lines(target: dict[str, Any], query: Query, rate_s: int) -> list[Line]:
    expr = target["expr"].replace("$__rate_interval", f"{rate_s}s")
    expr = expr.replace("$job", "lockstep.*").replace("$model", ".*")
    lines = []
    for series in query(expr):
        labels: dict[str, str] = series["metric"]
        values = ((float(at), float(value)) for at, value in series["values"])
        points = [(at, value) for at, value in values if math.isfinite(value)]
        legend = target["legendFormat"]
        for name in re.findall(r"\{\{(\w+)\}\}", legend):
            legend = legend.replace(f"{{{{{name}}}}}", labels.get(name, ""))
        if points:
            lines.append(Line(legend, points))
    return lines


def _panel(panel: dict[str, Any], frame: Frame, lines: Sequence[Line]) -> str:
    parts = [
        f'<rect x="{frame.x}" y="{frame.y}" width="{frame.width}" height="{frame.height}" '
        'fill="white" stroke="#ddd"/>',
        f'<text x="{frame.x + 8}" y="{frame.y + 17}" font-size="12" font-weight="bold">'
        f"{escape(panel['title'])}</text>",
    ]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if not lines:
        parts.append(f'<text x="{frame.x + 8}" y="{frame.y + 60}" fill="#999">no data</text>')
    elif panel["type"] == "stat":
        parts += _numbers(frame, lines, unit)
    else:
        parts += _graph(frame, lines, unit)
    return "\n".join(parts)


def _numbers(frame: Frame, lines: Sequence[Line], unit: str) -> list[str]:
    """The last value of each line, large."""
    step = frame.width // len(lines)
    parts = []
    for index, line in enumerate(lines):
        x = frame.x + index * step + step // 2
        value = escape(in_unit(line.points[-1][1], unit))
        parts += [
            f'<text x="{x}" y="{frame.y + 100}" font-size="34" text-anchor="middle" '
            f'fill="{_COLOURS[2]}">{value}</text>',
            f'<text x="{x}" y="{frame.y + 124}" text-anchor="middle">{escape(line.legend)}</text>',
        ]
    return parts


def _graph(frame: Frame, lines: Sequence[Line], unit: str) -> list[str]:
    """Axes, lines and legends."""
    values = [value for line in lines for _, value in line.points]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1.0
    left, top = frame.x + 62, frame.y + 28
    width, height = frame.width - 72, frame.height - 66
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = top + height * (1 - share)
        label = escape(in_unit(low + share * (high - low), unit))
        parts += [
            f'<path d="M{left} {y:.1f}h{width}" stroke="#e5e5e5"/>',
            f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#666">{label}</text>',
        ]
    for index, line in enumerate(lines):
        points = " ".join(
            f"{left + width * (at - frame.begin) / (frame.end - frame.begin):.1f},"
            f"{top + height * (high - value) / (high - low):.1f}"
            for at, value in line.points
        )
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.3"/>'
        )
    return [*parts, *_legends(frame, lines)]


def _legends(frame: Frame, lines: Sequence[Line]) -> list[str]:
    """Two rows of names; what does not fit is counted."""
    shown = list(lines[:_MOST_LEGENDS])
    names = [line.legend for line in shown]
    if len(lines) > len(shown):
        names[-1] = f"and {len(lines) - len(shown) + 1} more"
    columns = 2 if max(len(name) for name in names) > 22 and len(names) <= 4 else 3
    step = (frame.width - 16) // columns
    parts = []
    for index, name in enumerate(names):
        x = frame.x + 8 + index % columns * step
        y = frame.y + frame.height - 22 + index // columns * 14
        text = name if len(name) <= step // 6 else "..." + name[-(step // 6 - 3) :]
        parts += [
            f'<rect x="{x}" y="{y - 8}" width="10" height="3" fill="{_COLOURS[index]}"/>',
            f'<text x="{x + 14}" y="{y}">{escape(text)}</text>',
        ]
    return parts


def in_unit(value: float, unit: str) -> str:
    """A value as a person would write it; the units are Grafana's names for them."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1e3:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} us"
    if unit == "bytes":
        return f"{value / 2**30:.3g} GiB" if abs(value) >= 2**30 else f"{value / 2**20:.3g} MiB"
    short = next(
        (f"{value / n:.3g}{k}" for n, k in ((1e6, "M"), (1e3, "k")) if abs(value) >= n), ""
    )
    return (short or f"{value:.3g}") + {"s": " s", "ops": "/s", "reqps": "/s"}.get(unit, "")


def main() -> None:
    """Writes a picture of every dashboard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back (default: 60)")
    parser.add_argument("--rate-interval", type=int, default=60, help="seconds (default: 60)")
    parser.add_argument("--caption", required=True, help="what ran, for the reader")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    end = time.time()
    begin = end - 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    query = prometheus_query(options.prometheus, begin, end)
    for path in sorted(FOLDER.glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        svg = draw(board, query, begin, end, options.rate_interval, options.caption)
        (options.out / f"{path.stem}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
