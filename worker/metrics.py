"""Prometheus metrics of one worker, on its own port, always on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server

from protos.lockstep.v1 import worker_pb2

# Read from decimal text: products of powers of ten would be labels like 0.00030000000000000003.
_STEP_BUCKETS_S = (
    *(float(f"{base}e{power}") for power in range(-4, 1) for base in (1, 2, 3, 5, 7)),
    10.0,
)
_COLLECTIVE_BUCKETS_S = tuple(
    float(f"{base}e{power}") for power in range(-6, 1) for base in (1, 2, 3, 5, 7)
)


class WorkerMetrics:
    """The registry and its server; a context manager that stops serving on exit.

    Labels: model_name and rank. Rank is known from Hello on. Observations may come from any thread.
    """

    def __init__(self, model_name: str, host: str, port: int) -> None:
        registry = CollectorRegistry()
        labels = ["model_name", "rank"]
        self._step = Histogram(
            "lockstep_step_seconds",
            "Time of a step: queued, on the device, and of that in collectives.",
            [*labels, "phase"],
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self._memory = Gauge(
            "lockstep_memory_bytes", "Device memory by kind.", [*labels, "kind"], registry=registry
        )
        self._phase = Gauge(
            "lockstep_worker_phase",
            "Start-up phase: 1 started, 2 loaded, 3 joined, 4 captured, 5 ready, 6 failed.",
            labels,
            registry=registry,
        )
        self._all_reduces = Gauge(
            "lockstep_all_reduces", "All-reduces run in this epoch.", labels, registry=registry
        )
        way = [*labels, "operation", "path"]
        self._path_usable = Gauge(
            "lockstep_comm_path_usable", "1 if preflight found it sound.", way, registry=registry
        )
        self._path_seconds = Gauge(
            "lockstep_comm_path_seconds",
            "One call inside a graph at start-up, slowest rank, by input bytes.",
            [*way, "bytes"],
            registry=registry,
        )
        self._collective = Histogram(
            "lockstep_collective_seconds",
            "Of a collective, from having sent to having received; the last ones of each second.",
            way,
            buckets=_COLLECTIVE_BUCKETS_S,
            registry=registry,
        )
        self._labels = {"model_name": model_name, "rank": "0"}
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_port)

    def set_rank(self, rank: int) -> None:
        """Labels everything from now on with this rank."""
        metrics = (self._step, self._memory, self._phase, self._all_reduces)
        for metric in (*metrics, self._path_usable, self._path_seconds, self._collective):
            metric.clear()
        self._labels = {**self._labels, "rank": str(rank)}

    def set_phase(self, phase: int) -> None:
        """Shows how far start-up has come."""
        self._phase.labels(**self._labels).set(phase)

    def set_memory(self, by_kind: Mapping[str, int]) -> None:
        """Shows the memory ledger, bytes by kind."""
        for kind, num_bytes in by_kind.items():
            self._memory.labels(**self._labels, kind=kind).set(num_bytes)

    def set_paths(self, preflight: worker_pb2.PreflightResponse) -> None:
        """Shows which communication paths are sound, and how long they take."""
        for path in preflight.paths:
            labels = {**self._labels, "operation": path.operation, "path": path.path}
            self._path_usable.labels(**labels).set(path.is_usable)
            for time in path.times:
                seconds = time.microseconds * 1e-6
                self._path_seconds.labels(**labels, bytes=str(time.byte_count)).set(seconds)

    def observe_step(
        self, device_s: float, queued_s: float = 0.0, comm_s: float | None = None
    ) -> None:
        """Counts a step; `comm_s`, its time in collectives, is None where it is not measured."""
        phases = {"device": device_s, "queued": queued_s, "comm": comm_s}
        for phase, seconds in phases.items():
            if seconds is not None:
                self._step.labels(**self._labels, phase=phase).observe(seconds)

    def observe_collective(self, operation: str, path: str, seconds: float) -> None:
        """Counts a collective of a sample."""
        self._collective.labels(**self._labels, operation=operation, path=path).observe(seconds)

    def set_all_reduces(self, count: int) -> None:
        """Shows the all-reduces of this epoch."""
        self._all_reduces.labels(**self._labels).set(count)

    def __enter__(self) -> Self:
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
