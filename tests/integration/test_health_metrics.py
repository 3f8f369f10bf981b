"""What an operator sees: health, reflection, metrics, commands, a clean end in odd surroundings."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lockstep.daemon.version import __version__
from protos.lockstep.v1 import generate_pb2_grpc
from tests.helpers.message_client import ids_request
from tests.helpers.served_group import ServedGroup, scrape, serve_environ, value_of
from tests.helpers.worker_driver import WorkerProcess
from tests.integration.conftest import CPU_FLAGS

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_LIMIT_S = 60.0
_TINY_FLAGS = (*CPU_FLAGS, "--kv-cache-bytes", "256K", "--max-model-len", "512")
_METRICS_HOST = "127.0.0.3"
_COORDINATOR_FLAGS = ("--port", "0", "--metrics-port", "0", "--kv-cache-bytes", "256K")
_ALWAYS_THERE = (
    "lockstep_num_requests_running",
    "lockstep_num_requests_waiting",
    "lockstep_kv_cache_usage_perc",
    "lockstep_prompt_tokens_total",
    "lockstep_generation_tokens_total",
    "lockstep_time_to_first_token_seconds_count",
    "lockstep_inter_token_latency_seconds_count",
    "lockstep_e2e_request_latency_seconds_count",
)


@pytest.fixture(scope="module")
def group(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    """In odd surroundings: no HOME, proxies that lead nowhere, a path with a space (tiny_dir),
    addresses that are not the default ones.
    """
    folder = tmp_path_factory.mktemp("a folder with spaces")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
    environ = serve_environ(folder, HOME=None, no_proxy=None, NO_PROXY=None, **proxies)
    hosts = ("--host", "127.0.0.2", "--metrics-host", _METRICS_HOST)
    flags = ("--tp", "2", "--served-model-name", "tiny", *hosts, *_TINY_FLAGS)
    with ServedGroup(tiny_dir, folder, *flags, environ=environ) as group:
        yield group


@pytest.fixture(scope="module")
def channel(group: ServedGroup) -> Iterator[grpc.Channel]:
    with group.channel() as channel:
        yield channel


def health_of(channel: grpc.Channel, name: str) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=_LIMIT_S).status)


def workers_metrics(group: ServedGroup) -> list[str]:
    """Each worker's metrics address: the port that it listens on beside its gRPC port."""
    with group.client() as client:
        ranks = client.server_info().ranks
    found = []
    for rank in ranks:
        connections = psutil.Process(rank.pid).net_connections("tcp")
        ports = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
        (port,) = ports - {int(rank.address.rpartition(":")[2])}
        found.append(f"{_METRICS_HOST}:{port}")
    return found


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lockstep.cli", *words],
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        cwd=Path(__file__).parents[2],
    )


def test_every_health_name_serves_once_ready(channel: grpc.Channel) -> None:
    service = "lockstep.v1.GenerateService"
    for name in ("", "readiness", "liveness", service, "rank/0", "rank/1"):
        assert health_of(channel, name) == SERVING, name
    with pytest.raises(grpc.RpcError) as caught:
        health_of(channel, "rank/2")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=_LIMIT_S)
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {
        "lockstep.v1.GenerateService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_coordinator_counts_a_request(group: ServedGroup) -> None:
    before = scrape(group.metrics)
    assert {name for name, _ in before} >= set(_ALWAYS_THERE)
    finished = ("lockstep_request_success_total", (("finished_reason", "length"),))
    with group.client() as client:
        request = ids_request([3, 4, 5], max_tokens=7, temperature=0.0, ignore_eos=True)
        client.generate_unary(request, timeout_s=_LIMIT_S)
    after = scrape(group.metrics)

    def gained(name: str) -> float:
        return after[name, ()] - before[name, ()]

    assert gained("lockstep_prompt_tokens_total") == 3
    assert gained("lockstep_generation_tokens_total") == 7
    assert gained("lockstep_time_to_first_token_seconds_count") == 1
    assert gained("lockstep_inter_token_latency_seconds_count") == 6
    assert gained("lockstep_e2e_request_latency_seconds_count") == 1
    assert gained("lockstep_request_prompt_tokens_sum") == 3
    assert gained("lockstep_request_generation_tokens_sum") == 7
    assert gained("lockstep_request_time_per_output_token_seconds_count") == 1
    assert after[finished] == before.get(finished, 0) + 1
    assert after["lockstep_epoch", ()] > 0 and after["lockstep_kv_cache_blocks", ()] > 1
    for rank in ("0", "1"):
        assert value_of(group.metrics, "lockstep_rank_up", rank=rank) == 1
        assert value_of(group.metrics, "lockstep_rank_losses_total", rank=rank) == 0
        assert value_of(group.metrics, "lockstep_broadcast_seconds_count", rank=rank) > 0


def test_coordinator_counts_a_refused_request(group: ServedGroup, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError):
        group.stub(channel).Generate(ids_request([]), timeout=_LIMIT_S).next()
    deadline = time.monotonic() + _LIMIT_S
    refused = ("lockstep_requests_rejected_total", (("reason", "invalid_argument"),))
    while scrape(group.metrics).get(refused, 0) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_tell_steps_and_memory_by_rank(group: ServedGroup) -> None:
    with group.client() as client:
        client.generate_unary(ids_request([3, 4, 5], max_tokens=4), timeout_s=_LIMIT_S)
    for rank, address in enumerate(workers_metrics(group)):
        samples = scrape(address)
        label = ("rank", str(rank))
        steps = samples["lockstep_step_seconds_count", (("phase", "device"), label)]
        assert steps >= 4
        assert samples["lockstep_step_seconds_count", (("phase", "queued"), label)] == steps
        assert samples["lockstep_step_seconds_sum", (("phase", "comm"), label)] > 0
        assert (
            samples[
                "lockstep_comm_path_usable", (("operation", "all_reduce"), ("path", "shm"), label)
            ]
            == 1
        )
        for kind in ("weights", "kv"):
            assert samples["lockstep_memory_bytes", (("kind", kind), label)] > 0
        assert samples["lockstep_all_reduces", (label,)] > 0


def test_metrics_carry_the_served_name(group: ServedGroup) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", _FETCH, group.metrics], capture_output=True, text=True, timeout=30
    )
    lines = [line for line in completed.stdout.splitlines() if line.startswith("lockstep_")]
    assert lines and all('model_name="tiny"' in line for line in lines)


_FETCH = """
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(opener.open(f"http://{sys.argv[1]}/metrics").read().decode())
"""


def test_generate_command_prints_ids(group: ServedGroup) -> None:
    words = ("--token-ids", "3,4,5", "--max-tokens", "6", "--temperature", "0", "--ignore-eos")
    ran = run_command("generate", "--address", group.address, *words, "--ids", "--verbose")
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) == 6
    assert "3 prompt + 6 output tokens, ended by length" in ran.stderr


def test_generate_command_tells_why_a_call_failed(group: ServedGroup) -> None:
    ran = run_command("generate", "--address", group.address, "--prompt", "hello")
    assert ran.returncode == 1
    assert "FAILED_PRECONDITION" in ran.stderr and "tokenizer" in ran.stderr


def test_version_command() -> None:
    assert run_command("--version").stdout == f"lockstep {__version__}\n"


def test_ctrl_c_leaves_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    group = ServedGroup(tiny_dir, tmp_path, *_TINY_FLAGS).wait_ready()
    assert group.stop(signal.SIGINT) in (0, 130)
    # What `stop` asserts, planted and seen: a file, shared memory, a process.
    file = tmp_path / "tmp" / "left"
    file.touch()
    with pytest.raises(AssertionError, match="files left"):
        group.stop()
    file.unlink()
    segment = Path(f"/dev/shm/{tmp_path.name}-{group.process.pid}")
    segment.touch()
    with pytest.raises(AssertionError, match="left in /dev/shm"):
        group.stop()
    segment.unlink()
    orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    group.adopt(orphan.pid)
    with pytest.raises(AssertionError, match="left running"):
        group.stop()
    orphan.communicate(timeout=_LIMIT_S)


def test_not_serving_until_the_ranks_are_ready(tiny_dir: Path, tmp_path: Path) -> None:
    ready = tmp_path / "coordinator.json"
    command = [sys.executable, "-m", "coordinator", "--model", str(tiny_dir), *_COORDINATOR_FLAGS]
    with WorkerProcess(tiny_dir, tmp_path) as worker:
        address = worker.address()
        worker.process.send_signal(signal.SIGSTOP)
        command += ["--workers", address, "--ready-file", str(ready)]
        coordinator = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        try:
            public = frontend_address(coordinator)
            with grpc.insecure_channel(public, options=[("grpc.enable_http_proxy", 0)]) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(service="readiness"), timeout=_LIMIT_S
                )
                assert next(watch).status == NOT_SERVING
                assert health_of(channel, "liveness") == SERVING
                with pytest.raises(grpc.RpcError) as caught:
                    stub = generate_pb2_grpc.GenerateServiceStub(channel)
                    stub.Generate(ids_request([3]), timeout=_LIMIT_S).next()
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
                assert not ready.exists()
                worker.process.send_signal(signal.SIGCONT)
                assert next(watch).status == SERVING
                watch.cancel()
        finally:
            worker.process.send_signal(signal.SIGCONT)
            coordinator.send_signal(signal.SIGTERM)
            code = coordinator.wait(_LIMIT_S)
        assert code == 0
        assert not ready.exists(), "a ready file outlived its coordinator"


def frontend_address(coordinator: subprocess.Popen[bytes]) -> str:
    """Where its frontend listens: it does so before the ranks are ready."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        assert coordinator.poll() is None, f"coordinator ended with {coordinator.returncode}"
        for process in psutil.Process(coordinator.pid).children():
            try:
                connections = process.net_connections("tcp")
            except psutil.Error:  # it is gone
                continue
            for connection in connections:
                if connection.status == psutil.CONN_LISTEN:
                    return f"127.0.0.1:{connection.laddr.port}"
        time.sleep(0.01)
    raise AssertionError("the frontend listens nowhere")
