"""Writes the dashboards: python deploy/grafana/dashboards.py; a test holds the files to this.

A panel is a title, a unit and queries with their legends; every query is limited to the job and the
model that are chosen at the top of the page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
_PANEL_HEIGHT = 8
_GRID_WIDTH = 24
_ON = 'job=~"$job", model_name=~"$model"'
_DEVICE, _COMM = ', phase="device"', ', phase="comm"'
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One graph (or, as `stat`, one number); `queries` are (PromQL, legend)."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 12
    text: str = ""
    minimum: int | None = 0


def quantiles(name: str, more: str = "") -> list[tuple[str, str]]:
    """Median, p90 and p99 of a histogram over all chosen instances; `more` selects further."""
    rate = f"sum by (le) (rate(lockstep_{name}_bucket{{{_ON}{more}}}[$__rate_interval]))"
    return [
        (f"histogram_quantile({share}, {rate})", label)
        for share, label in ((0.5, "median"), (0.9, "p90"), (0.99, "p99"))
    ]


def rate(name: str, by: str, more: str = "") -> str:
    """Events a second, summed by a label; `more` selects further."""
    return f"sum by ({by}) (rate(lockstep_{name}{{{_ON}{more}}}[$__rate_interval]))"


def mean_step(phase: str) -> str:
    """Mean time of a step's phase, by rank."""
    by, selected = "instance, rank", f', phase="{phase}"'
    total, count = (rate(f"step_seconds_{part}", by, selected) for part in ("sum", "count"))
    return f"{total} / {count}"


def gauge(name: str, legend: str) -> list[tuple[str, str]]:
    """A value of every instance as it is."""
    return [(f"lockstep_{name}{{{_ON}}}", f"{{{{instance}}}} {legend}")]


OVERVIEW = (
    Panel(
        "Ranks in the group",
        "none",
        [(f"sum(lockstep_rank_up{{{_ON}}})", "up"), (f"count(lockstep_rank_up{{{_ON}}})", "all")],
        kind="stat",
        width=6,
    ),
    Panel(
        "Targets that answer",
        "none",
        [('sum(up{job=~"$job"})', "up"), ('count(up{job=~"$job"})', "all")],
        kind="stat",
        width=6,
    ),
    Panel(
        "Restarts in the last day",
        "none",
        [(f"sum(increase(lockstep_group_restarts_total{{{_ON}}}[1d]))", "restarts")],
        kind="stat",
        width=6,
    ),
    Panel(
        "Failed in the last hour",
        "none",
        [(f"sum(increase(lockstep_requests_failed_total{{{_ON}}}[1h]))", "requests")],
        kind="stat",
        width=6,
    ),
    Panel(
        "Tokens",
        "short",
        [
            (rate("generation_tokens_total", "model_name"), "{{model_name}} generated a second"),
            (rate("prompt_tokens_total", "model_name"), "{{model_name}} prompt tokens a second"),
        ],
    ),
    Panel(
        "Requests running and waiting",
        "short",
        [
            (f"sum(lockstep_num_requests_running{{{_ON}}})", "running"),
            (f"sum(lockstep_num_requests_waiting{{{_ON}}})", "waiting"),
        ],
        text="Waiting and a full KV cache: memory limits. Waiting without: the batch does.",
    ),
    Panel(
        "KV cache in use",
        "percentunit",
        [(f"lockstep_kv_cache_usage_perc{{{_ON}}}", "{{instance}}")],
    ),
    Panel(
        "Preemptions",
        "ops",
        [(rate("preemptions_total", "instance"), "{{instance}}")],
        text="Requests that lost their KV blocks and are computed again.",
    ),
    Panel(
        "Prompt tokens found in the prefix cache",
        "percentunit",
        [
            (
                f"{rate('prefix_cache_hits_total', 'instance')}"
                f" / {rate('prefix_cache_queries_total', 'instance')}",
                "{{instance}}",
            )
        ],
        text="Found tokens are not computed again.",
    ),
    Panel(
        "Prompt tokens in the queue",
        "short",
        [(f"lockstep_queue_prompt_tokens{{{_ON}}}", "{{instance}}")],
        text="Full at --max-queue-prompt-tokens: then requests are refused as queue_full.",
    ),
    Panel("Between tokens", "s", quantiles("inter_token_latency_seconds")),
    Panel(
        "To the first token",
        "s",
        [
            *quantiles("time_to_first_token_seconds"),
            (f"lockstep_predicted_ttft_seconds{{{_ON}}}", "{{instance}} predicted now"),
        ],
        text="Predicted: of a short request behind all that wait.",
    ),
)

RANKS = (
    Panel("Rank in the group", "none", gauge("rank_up", "rank {{rank}}")),
    Panel(
        "Start-up phase",
        "none",
        gauge("worker_phase", "rank {{rank}}"),
        text="1 started, 2 loaded, 3 joined, 4 captured, 5 ready, 6 failed.",
    ),
    Panel(
        "Mean step on the device",
        "s",
        [(mean_step("device"), "{{instance}} rank {{rank}}")],
        text="Ranks wait for each other in every step: a slow one slows all.",
    ),
    Panel("Step on the device, all ranks", "s", quantiles("step_seconds", _DEVICE)),
    Panel(
        "Share of a step in collectives",
        "percentunit",
        [
            (
                f"{rate('step_seconds_sum', 'instance, rank', _COMM)}"
                f" / {rate('step_seconds_sum', 'instance, rank', _DEVICE)}",
                "{{instance}} rank {{rank}}",
            )
        ],
        text="Waiting for the others included, so the rank with the lowest share is the slow one. "
        "Where the communicator measures it.",
    ),
    Panel(
        "Mean all-reduce",
        "s",
        [
            (
                f"{rate('step_seconds_sum', 'instance, rank', _COMM)}"
                f" / {rate('all_reduces', 'instance, rank')}",
                "{{instance}} rank {{rank}}",
            )
        ],
        text="Time in collectives by all-reduces, waiting for the others included.",
    ),
    Panel(
        "Mean wait of a step for the device",
        "s",
        [(mean_step("queued"), "{{instance}} rank {{rank}}")],
        text="From a command's arrival to its step's start: some, or the device runs dry.",
    ),
    Panel(
        "Steps",
        "ops",
        [(rate("step_seconds_count", "instance, rank", _DEVICE), "{{instance}} rank {{rank}}")],
    ),
    Panel(
        "From sending a command to its arrival",
        "s",
        quantiles("broadcast_seconds"),
        text="Ranks of the coordinator's host.",
    ),
    Panel(
        "All-reduces since the group's start",
        "short",
        gauge("all_reduces", "rank {{rank}}"),
        text="Equal on all ranks; a line that lags is a rank that hangs.",
    ),
    Panel(
        "Share of time without a command",
        "percentunit",
        [(rate("worker_idle_seconds_total", "instance, rank"), "{{instance}} rank {{rank}}")],
        text="High under load: the coordinator does not keep the ranks busy.",
    ),
    Panel(
        "Arrival of commands after rank 0",
        "s",
        gauge("command_arrival_skew_seconds", "rank {{rank}}"),
        text="Below 0: sooner than at rank 0. Only ranks on rank 0's host, whose clock they share.",
        minimum=None,
    ),
    Panel(
        "Arrival in collectives after the first rank",
        "s",
        gauge("collective_arrival_skew_seconds", "rank {{rank}}"),
        text="Mean of about a second. A rank that stays above the others is what they wait for.",
    ),
    Panel(
        "Time of a collective, by way",
        "s",
        quantiles("collective_seconds"),
        text="A sample of each second, waiting for other ranks included.",
    ),
    Panel(
        "Losses that the rank caused",
        "short",
        gauge("rank_losses_total", "rank {{rank}}"),
        text="Since the coordinator's start. Always the same rank: its device or host.",
    ),
    Panel(
        "Communication paths",
        "none",
        gauge("comm_path_usable", "rank {{rank}} {{path}}"),
        text="1: the path's sums were right at the last start. The log says why where it is 0.",
    ),
    Panel("Memory by kind", "bytes", gauge("memory_bytes", "rank {{rank}} {{kind}}")),
    Panel("Last start by phase", "s", gauge("startup_seconds", "{{phase}}")),
)

REQUESTS = (
    Panel(
        "Requests that ended well, by reason",
        "reqps",
        [(rate("request_success_total", "finished_reason"), "{{finished_reason}}")],
    ),
    Panel(
        "Requests that failed, by status",
        "reqps",
        [(rate("requests_failed_total", "code"), "{{code}}")],
    ),
    Panel(
        "Requests refused, by reason",
        "reqps",
        [(rate("requests_rejected_total", "reason"), "{{reason}}")],
        text="queue_full, queue_time and deadline are overload, not_ready and draining an outage, "
        "the rest mistakes of clients.",
    ),
    Panel("Prompt tokens of a request", "short", quantiles("request_prompt_tokens")),
    Panel("Generated tokens of a request", "short", quantiles("request_generation_tokens")),
    Panel("To the first token", "s", quantiles("time_to_first_token_seconds")),
    Panel("In the queue", "s", quantiles("request_queue_time_seconds")),
    Panel("Between tokens", "s", quantiles("inter_token_latency_seconds")),
    Panel("Prefill", "s", quantiles("request_prefill_time_seconds")),
    Panel("From arrival to end", "s", quantiles("e2e_request_latency_seconds")),
)

DASHBOARDS = {
    "overview": ("Lockstep: overview", OVERVIEW),
    "ranks": ("Lockstep: ranks and communication", RANKS),
    "requests": ("Lockstep: requests", REQUESTS),
}


def dashboard(name: str) -> dict[str, Any]:
    """The JSON model of a dashboard, as Grafana 11 takes it."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"lockstep-{name}",
        "title": title,
        "tags": ["lockstep"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _placed(panels),
    }


def _variables() -> list[dict[str, Any]]:
    def query(name: str, label: str, text: str) -> dict[str, Any]:
        return {
            "type": "query",
            "name": name,
            "label": label,
            "datasource": _DATASOURCE,
            "query": text,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "allValue": ".*" if name == "model" else "lockstep.*",
        }

    return [
        {"type": "datasource", "name": "datasource", "label": "Source", "query": "prometheus"},
        query("job", "Job", 'label_values(up{job=~"lockstep.*"}, job)'),
        query("model", "Model", 'label_values({__name__=~"lockstep_.+"}, model_name)'),
    ]


def _placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    placed = []
    x = y = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > _GRID_WIDTH:
            x, y = 0, y + _PANEL_HEIGHT
        grid = {"x": x, "y": y, "w": panel.width, "h": _PANEL_HEIGHT}
        x += panel.width
        body: dict[str, Any] = {
            "id": number,
            "type": panel.kind,
            "title": panel.title,
            "datasource": _DATASOURCE,
            "gridPos": grid,
            "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
            "targets": [
                {"refId": chr(65 + index), "expr": expr, "legendFormat": legend}
                for index, (expr, legend) in enumerate(panel.queries)
            ],
        }
        placed.append(body | ({"description": panel.text} if panel.text else {}))
    return placed


def _defaults(panel: Panel) -> dict[str, Any]:
    least = {} if panel.minimum is None else {"min": panel.minimum}
    return {"unit": panel.unit} | least


def text(name: str) -> str:
    """The file of a dashboard."""
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(text(each))
