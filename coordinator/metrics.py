"""What the coordinator measures. Always on; Prometheus text on --metrics-port.

The event loop writes plain numbers and numpy arrays; they become metrics when somebody scrapes. One
observation per token would otherwise cost more than the rest of a step's bookkeeping.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType, TracebackType
from wsgiref.simple_server import WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import numpy as np
from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from coordinator.collective_skew import slowest_rank

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06),
    *(0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0),
)
# Shown from the start, as 0: rate() cannot see the step from no series to its first count.
_KNOWN_LABELS = {
    "request_success": ("stop", "length", "abort", "cancelled", "deadline"),
    "requests_failed": ("internal", "unavailable"),
    "requests_rejected": ("invalid_argument", "not_ready", "queue_full", "queue_time", "deadline"),
}
_E2E_BUCKETS_S = (*_LATENCY_BUCKETS_S, 160.0, 320.0, 640.0, 1280.0, 2560.0)
_BROADCAST_BUCKETS_S = (
    *(0.0001, 0.0002, 0.0003, 0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.007),
    *(0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0),
)
_TOKEN_BUCKETS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))


class Histogram:
    """Counts per bucket, filled many values at a time. Written by one thread.

    `bounds` are upper bounds in the unit of the values: seconds, or tokens.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._bounds_list = list(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def observe(self, values: Sequence[float]) -> None:
        """Adds values."""
        if not values:
            return
        buckets = np.searchsorted(self._bounds, values, side="left")
        self._counts += np.bincount(buckets, minlength=len(self._counts))
        self.sum += float(sum(values))

    def observe_one(self, value: float) -> None:
        """Adds a value; cheaper than `observe` for a single one."""
        self._counts[bisect_left(self._bounds_list, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it) as Prometheus wants them."""
        bounds = [*(str(bound) for bound in self._bounds.tolist()), "+Inf"]
        counts = (float(count) for count in accumulate(self._counts.tolist()))
        return list(zip(bounds, counts, strict=True))


@dataclass
class EngineMetrics:
    """The numbers behind the metrics; names are those of the metrics without prefix."""

    model_name: str
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    queue_prompt_tokens: int = 0
    num_tenants_waiting: int = 0
    predicted_ttft: float = 0.0
    requests_without_client: int = 0
    kv_cache_usage: float = 0.0
    kv_cache_blocks: int = 0
    block_size: int = 0
    epoch: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    group_restarts: int = 0
    step_log_up: bool = False
    step_log_dropped: int = 0
    request_success: Counter[str] = field(default_factory=Counter)
    requests_failed: Counter[str] = field(default_factory=Counter)
    requests_rejected: Counter[str] = field(default_factory=Counter)
    rank_losses: Counter[int] = field(default_factory=Counter)
    rank_up: dict[int, bool] = field(default_factory=dict)
    command_arrival_skew: dict[int, float] = field(default_factory=dict)
    collective_arrival_skew: dict[int, float] = field(default_factory=dict)
    worker_idle_seconds: dict[int, float] = field(default_factory=dict)
    startup_seconds: dict[str, float] = field(default_factory=dict)
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_LATENCY_BUCKETS_S))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_LATENCY_BUCKETS_S))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(_E2E_BUCKETS_S))
    request_queue_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BUCKETS_S))
    request_prefill_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BUCKETS_S))
    request_decode_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BUCKETS_S))
    request_inference_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BUCKETS_S))
    time_per_output_token: Histogram = field(default_factory=lambda: Histogram(_LATENCY_BUCKETS_S))
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BUCKETS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BUCKETS))
    broadcast: dict[int, Histogram] = field(default_factory=dict)

    def observe_broadcast(self, rank: int, seconds: float) -> None:
        """A command took that long to come to a rank."""
        if rank not in self.broadcast:
            self.broadcast[rank] = Histogram(_BROADCAST_BUCKETS_S)
        self.broadcast[rank].observe_one(seconds)

    def histograms(self) -> tuple[tuple[str, str, Histogram], ...]:
        """Those of requests and tokens: name without prefix, which vLLM's are too, and meaning."""
        return (
            ("time_to_first_token_seconds", "Arrival to first token.", self.time_to_first_token),
            (
                "inter_token_latency_seconds",
                "Between a request's tokens.",
                self.inter_token_latency,
            ),
            ("e2e_request_latency_seconds", "Arrival to end of a request.", self.e2e_latency),
            ("request_queue_time_seconds", "Arrival to first chunk.", self.request_queue_time),
            (
                "request_prefill_time_seconds",
                "First chunk to first token.",
                self.request_prefill_time,
            ),
            ("request_decode_time_seconds", "First token to end.", self.request_decode_time),
            ("request_inference_time_seconds", "First chunk to end.", self.request_inference_time),
            (
                "request_time_per_output_token_seconds",
                "Decode time of a request by its tokens after the first.",
                self.time_per_output_token,
            ),
            ("request_prompt_tokens", "Of ended requests.", self.request_prompt_tokens),
            ("request_generation_tokens", "Of ended requests.", self.request_generation_tokens),
        )


class _EngineCollector(Collector):
    """Turns EngineMetrics into metric families, in the scraping thread."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        metrics = self._metrics
        plain = (
            ("num_requests_running", "Requests in the batch.", metrics.num_requests_running),
            ("num_requests_waiting", "Requests in the queue.", metrics.num_requests_waiting),
            ("queue_prompt_tokens", "Prompt tokens in the queue.", metrics.queue_prompt_tokens),
            ("num_tenants_waiting", "Tenants in the queue.", metrics.num_tenants_waiting),
            ("predicted_ttft_seconds", "For a request behind all.", metrics.predicted_ttft),
            (
                "requests_without_client",
                "Requests that no frontend holds.",
                metrics.requests_without_client,
            ),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", metrics.kv_cache_usage),
            ("kv_cache_blocks", "KV blocks of the group.", metrics.kv_cache_blocks),
            ("epoch", "Epoch of the group.", metrics.epoch),
            ("step_log_up", "The step log is being written.", metrics.step_log_up),
        )
        for name, text, value in plain:
            family = GaugeMetricFamily(f"lockstep_{name}", text, labels=["model_name"])
            family.add_metric([metrics.model_name], value)
            yield family
        ranks = {str(rank): float(is_up) for rank, is_up in metrics.rank_up.copy().items()}
        yield self._labelled_gauge("rank_up", "The rank is in the group.", "rank", ranks)
        skews = {str(rank): skew for rank, skew in metrics.command_arrival_skew.copy().items()}
        yield self._labelled_gauge(
            "command_arrival_skew_seconds", "Arrival of a command after rank 0's.", "rank", skews
        )
        yield from self._collective_gauges()
        yield self._labelled_gauge(
            "startup_seconds",
            "Time of each phase of the last start.",
            "phase",
            metrics.startup_seconds.copy(),
        )

    def _collective_gauges(self) -> Iterator[Metric]:
        skews = self._metrics.collective_arrival_skew.copy()
        yield self._labelled_gauge(
            "collective_arrival_skew_seconds",
            "Arrival in collectives after the first rank's.",
            "rank",
            {str(rank): skew for rank, skew in skews.items()},
        )
        slowest = GaugeMetricFamily(
            "lockstep_slowest_rank", "Rank that the others wait for.", labels=["model_name"]
        )
        if (rank := slowest_rank(skews)) is not None:
            slowest.add_metric([self._metrics.model_name], rank)
        yield slowest

    def _labelled_gauge(
        self, name: str, text: str, label: str, values: dict[str, float]
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"lockstep_{name}", text, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self._metrics.model_name, key], value)
        return family

    def _counters(self) -> Iterator[Metric]:
        metrics = self._metrics
        plain = (
            ("prompt_tokens", "Prompt tokens of admitted requests.", metrics.prompt_tokens),
            ("generation_tokens", "Tokens generated.", metrics.generation_tokens),
            ("steps", "Steps reported.", metrics.steps),
            ("preemptions", "Requests that lost their place.", metrics.preemptions),
            (
                "prefix_cache_queries",
                "Tokens looked up in the prefix cache.",
                metrics.prefix_cache_queries,
            ),
            (
                "prefix_cache_hits",
                "Tokens found in the prefix cache.",
                metrics.prefix_cache_hits,
            ),
            ("group_restarts", "Times the ranks had to start again.", metrics.group_restarts),
            ("step_log_dropped", "Records the step log lacks.", metrics.step_log_dropped),
        )
        for name, text, value in plain:
            family = CounterMetricFamily(f"lockstep_{name}", text, labels=["model_name"])
            family.add_metric([metrics.model_name], value)
            yield family
        losses = {rank: metrics.rank_losses[rank] for rank in metrics.rank_up.copy()}
        by_label = (
            ("rank_losses", "Times the rank was why the group was lost.", "rank", losses),
            ("request_success", "Requests ended well.", "finished_reason", metrics.request_success),
            ("requests_failed", "Requests ended in an error.", "code", metrics.requests_failed),
            ("requests_rejected", "Requests never begun.", "reason", metrics.requests_rejected),
            ("worker_idle_seconds", "Time without a command.", "rank", metrics.worker_idle_seconds),
        )
        for name, text, label, counts in by_label:
            labels = ["model_name", label]
            family = CounterMetricFamily(f"lockstep_{name}", text, labels=labels)
            known: dict[str | int, float] = dict.fromkeys(_KNOWN_LABELS.get(name, ()), 0)
            for key, count in (known | counts.copy()).items():
                family.add_metric([metrics.model_name, str(key)], count)
            yield family

    def _histograms(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, text, histogram in metrics.histograms():
            yield self._histogram(name, text, histogram)
        text = "From sending a command to its arrival at the rank."
        labels = ["model_name", "rank"]
        family = HistogramMetricFamily("lockstep_broadcast_seconds", text, labels=labels)
        for rank, histogram in metrics.broadcast.copy().items():
            label_values = [metrics.model_name, str(rank)]
            family.add_metric(label_values, histogram.cumulative(), histogram.sum)
        yield family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"lockstep_{name}", text, labels=["model_name"])
        family.add_metric([self._metrics.model_name], histogram.cumulative(), histogram.sum)
        return family


class MetricsServer:
    """Serves the metrics on a thread of its own until closed. OSError if the port is taken.

    `views` are further collectors of the same numbers, by their path.
    """

    def __init__(
        self,
        metrics: EngineMetrics,
        host: str,
        port: int,
        views: Mapping[str, Collector] = MappingProxyType({}),
    ) -> None:
        registry = CollectorRegistry()
        registry.register(_EngineCollector(metrics))
        served: tuple[WSGIServer, threading.Thread] = start_http_server(
            port, addr=host, registry=registry
        )
        self._server, self._thread = served
        self._server.set_app(_by_path(registry, views))
        self.port: int = self._server.server_port

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def _by_path(registry: CollectorRegistry, views: Mapping[str, Collector]) -> WSGIApplication:
    """Answers a view's path with the view, and any other one with `registry`."""
    whole = make_wsgi_app(registry)
    apps = {}
    for path, collector in views.items():
        view = CollectorRegistry()
        view.register(collector)
        apps[path] = make_wsgi_app(view)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer: Iterable[bytes] = apps.get(environ["PATH_INFO"], whole)(environ, start_response)
        return answer

    return app
