"""The names that tools made for vLLM ask for."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from coordinator import vllm_metrics
from coordinator.metrics import EngineMetrics, MetricsServer

# What vLLM's own Grafana dashboard, the HPA examples of its production stack and the endpoint
# picker of the Gateway API inference extension ask for.
_ASKED_FOR = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
    *("vllm:e2e_request_latency_seconds_bucket", "vllm:request_queue_time_seconds_sum"),
    *("vllm:request_prefill_time_seconds_sum", "vllm:request_decode_time_seconds_sum"),
    *("vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket"),
    *("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
    *("vllm:num_preemptions_total", "vllm:cache_config_info"),
}


def samples(port: int, path: str) -> dict[tuple[str, str], float]:
    """Values by name and finished_reason."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, sample.labels.get("finished_reason", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_vllms_names_have_their_own_path_and_the_same_numbers() -> None:
    metrics = EngineMetrics("m", num_requests_waiting=3, preemptions=2)
    metrics.request_success.update({"stop": 4, "abort": 1, "cancelled": 2})
    views = {vllm_metrics.PATH: vllm_metrics.VllmCollector(metrics)}
    with MetricsServer(metrics, "127.0.0.1", 0, views) as server:
        theirs = samples(server.port, "/metrics/vllm")
        ours = samples(server.port, "/metrics")
    assert {name for name, _ in theirs} >= _ASKED_FOR
    assert theirs["vllm:num_requests_waiting", ""] == 3
    assert theirs["vllm:num_preemptions_total", ""] == 2
    reasons = {key[1]: n for key, n in theirs.items() if key[0] == "vllm:request_success_total"}
    assert reasons == {"stop": 4, "length": 0, "abort": 3}
    assert not any(name.startswith("vllm:") for name, _ in ours)
    assert not any(name.startswith("lockstep_") for name, _ in theirs)
