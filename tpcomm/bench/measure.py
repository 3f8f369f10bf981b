"""Times of calls inside replayed CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tpcomm.errors import CommTimeout
from tpcomm.staged import StagedCommunicator

CALLS_PER_GRAPH = 100
_REPLAYS = 5
_ROUNDS = 7
_LIMIT_S = 15.0
_POLL_S = 0.0002


def wait_for(event: torch.cuda.Event, limit_s: float, what: str) -> None:
    """Wait on the host for an event, never longer than `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            raise CommTimeout(f"{what} did not end within {limit_s:g} s")
        time.sleep(_POLL_S)


def wait_idle(limit_s: float, what: str) -> None:
    """Wait for the current stream."""
    wait_for(torch.cuda.current_stream().record_event(), limit_s, what)


def capture(call: Callable[[], object], num_calls: int) -> torch.cuda.CUDAGraph:
    """`num_calls` calls as one graph, after one eager call (kernels compile, NCCL connects)."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        call()
        wait_idle(_LIMIT_S, "the first call")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(num_calls):
                call()
    return graph


def graph_microseconds(
    comm: StagedCommunicator, call: Callable[[], object], num_calls: int = CALLS_PER_GRAPH
) -> float:
    """Median time of one call among `num_calls` in a replayed graph, in us. Collective."""
    graph = capture(call, num_calls)
    times = []
    graph.replay()
    for _ in range(_ROUNDS):
        comm.barrier(_LIMIT_S)
        begin, end = _timing_event(), _timing_event()
        graph.replay()  # absorbs what the ranks are apart
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        wait_for(end, _LIMIT_S, "a replayed graph")
        times.append(_microseconds(begin, end) / (_REPLAYS * num_calls))
    del graph
    return statistics.median(times)


def eager_microseconds(comm: StagedCommunicator, call: Callable[[], object]) -> float:
    """Time of one call issued by the host, in us, mean of a burst. Collective."""
    call()
    comm.barrier(_LIMIT_S)
    begin, end = _timing_event(), _timing_event()
    begin.record()
    for _ in range(CALLS_PER_GRAPH):
        call()
    end.record()
    wait_for(end, _LIMIT_S, "a burst of calls")
    return _microseconds(begin, end) / CALLS_PER_GRAPH


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _microseconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(begin.elapsed_time(end)) * 1000
