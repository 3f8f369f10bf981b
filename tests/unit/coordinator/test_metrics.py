"""What a scrape shows."""

import urllib.request

import pytest

from coordinator.metrics import EngineMetrics, Histogram, MetricsServer


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def test_a_histogram_counts_bounds_inclusively_and_cumulates() -> None:
    histogram = Histogram([0.001, 0.01])
    histogram.observe([0.0005, 0.001, 0.005, 7.0])
    histogram.observe([])
    histogram.observe_one(0.01)
    assert histogram.cumulative() == [("0.001", 2.0), ("0.01", 4.0), ("+Inf", 5.0)]
    assert histogram.count == 5
    assert histogram.sum == pytest.approx(7.0165)


def test_every_metric_of_the_design_is_served_with_its_labels() -> None:
    metrics = EngineMetrics("m")
    metrics.num_requests_running = 3
    metrics.num_requests_waiting = 2
    metrics.kv_cache_usage = 0.5
    metrics.prompt_tokens = 11
    metrics.generation_tokens = 12
    metrics.steps = 9
    metrics.preemptions = 1
    metrics.request_success["stop"] = 4
    metrics.requests_rejected["queue_full"] = 5
    metrics.requests_failed["unavailable"] = 6
    metrics.rank_up = {0: True, 1: False}
    metrics.startup_seconds = {"load": 1.5}
    metrics.time_to_first_token.observe([0.0012])
    metrics.inter_token_latency.observe([0.002])
    metrics.e2e_latency.observe([0.1])
    metrics.queue_prompt_tokens = 21
    metrics.num_tenants_waiting = 22
    metrics.predicted_ttft = 2.5
    metrics.requests_without_client = 23
    metrics.request_queue_time.observe_one(0.1)
    metrics.request_prefill_time.observe_one(0.2)
    metrics.request_decode_time.observe_one(0.3)
    with MetricsServer(metrics, "127.0.0.1", 0) as server:
        seen = scrape(server.port)
        metrics.generation_tokens += 1
        again = scrape(server.port)
    model = 'model_name="m"'
    wanted = {
        f"lockstep_num_requests_running{{{model}}}": 3,
        f"lockstep_num_requests_waiting{{{model}}}": 2,
        f"lockstep_kv_cache_usage_perc{{{model}}}": 0.5,
        f"lockstep_prompt_tokens_total{{{model}}}": 11,
        f"lockstep_generation_tokens_total{{{model}}}": 12,
        f"lockstep_steps_total{{{model}}}": 9,
        f"lockstep_preemptions_total{{{model}}}": 1,
        f'lockstep_request_success_total{{finished_reason="stop",{model}}}': 4,
        f'lockstep_requests_rejected_total{{{model},reason="queue_full"}}': 5,
        f'lockstep_requests_failed_total{{code="unavailable",{model}}}': 6,
        f'lockstep_rank_up{{{model},rank="0"}}': 1,
        f'lockstep_rank_up{{{model},rank="1"}}': 0,
        f'lockstep_startup_seconds{{{model},phase="load"}}': 1.5,
        f'lockstep_time_to_first_token_seconds_bucket{{le="0.001",{model}}}': 0,
        f'lockstep_time_to_first_token_seconds_bucket{{le="0.0015",{model}}}': 1,
        f"lockstep_inter_token_latency_seconds_sum{{{model}}}": 0.002,
        f"lockstep_e2e_request_latency_seconds_count{{{model}}}": 1,
        f"lockstep_queue_prompt_tokens{{{model}}}": 21,
        f"lockstep_num_tenants_waiting{{{model}}}": 22,
        f"lockstep_predicted_ttft_seconds{{{model}}}": 2.5,
        f"lockstep_requests_without_client{{{model}}}": 23,
        f"lockstep_request_queue_time_seconds_sum{{{model}}}": 0.1,
        f"lockstep_request_prefill_time_seconds_sum{{{model}}}": 0.2,
        f"lockstep_request_decode_time_seconds_sum{{{model}}}": 0.3,
    }
    assert {name: seen.get(name) for name in wanted} == wanted
    assert again[f"lockstep_generation_tokens_total{{{model}}}"] == 13


def test_a_port_in_use_is_an_error_and_a_closed_server_frees_it() -> None:
    with MetricsServer(EngineMetrics("m"), "127.0.0.1", 0) as server:
        port = server.port
        with pytest.raises(OSError):
            MetricsServer(EngineMetrics("m"), "127.0.0.1", port)
    with MetricsServer(EngineMetrics("m"), "127.0.0.1", port) as server:
        assert scrape(port)
