"""The coordinator's numbers under the names that vLLM gives its own, at /metrics/vllm.

Dashboards, autoscalers and endpoint pickers made for vLLM find here what they ask for: its names
and units, `model_name`, and `engine`, which is always "0". Buckets are ours, which are finer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from coordinator.metrics import EngineMetrics

PATH = "/metrics/vllm"
_LABELS = ("model_name", "engine")
# vLLM knows no other end; those by a client or its deadline count as aborted there.
_REASONS = {"cancelled": "abort", "deadline": "abort"}


class VllmCollector(Collector):
    """Turns EngineMetrics into vLLM's families, in the scraping thread."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", metrics.num_requests_running),
            ("num_requests_waiting", "Requests in the queue.", metrics.num_requests_waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", metrics.kv_cache_usage),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            family.add_metric(self._values(), value)
            yield family
        labels = ["engine", "block_size", "num_gpu_blocks"]
        config = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=labels)
        config.add_metric(["0", str(metrics.block_size), str(metrics.kv_cache_blocks)], 1)
        yield config

    def _counters(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", metrics.prompt_tokens),
            ("generation_tokens", "Tokens generated.", metrics.generation_tokens),
            ("num_preemptions", "Requests that lost their place.", metrics.preemptions),
            ("prefix_cache_queries", "Tokens looked up.", metrics.prefix_cache_queries),
            ("prefix_cache_hits", "Tokens found.", metrics.prefix_cache_hits),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            family.add_metric(self._values(), count)
            yield family
        ends = Counter({"stop": 0, "length": 0, "abort": 0})
        for reason, count in metrics.request_success.copy().items():
            ends[_REASONS.get(reason, reason)] += count
        labels = [*_LABELS, "finished_reason"]
        family = CounterMetricFamily("vllm:request_success", "Requests ended.", labels=labels)
        for reason, count in ends.items():
            family.add_metric([*self._values(), reason], count)
        yield family

    def _histograms(self) -> Iterator[Metric]:
        for name, text, histogram in self._metrics.histograms():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            family.add_metric(self._values(), histogram.cumulative(), histogram.sum)
            yield family

    def _values(self) -> list[str]:
        return [self._metrics.model_name, "0"]
