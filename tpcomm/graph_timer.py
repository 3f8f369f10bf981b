"""Times of calls inside replayed CUDA graphs, on the current device, with every wait limited."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tpcomm.errors import CommTimeout

_POLL_S = 0.0002
_REPLAYS = 3
_ROUNDS = 5
_CALLS = 20


def wait_for(event: torch.cuda.Event, limit_s: float, what: str) -> None:
    """Wait on the host for an event; CommTimeout after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            raise CommTimeout(f"{what} did not end within {limit_s:g} s")
        time.sleep(_POLL_S)


def wait_idle(limit_s: float, what: str) -> None:
    """Wait for the current stream; CommTimeout after `limit_s` seconds."""
    wait_for(torch.cuda.current_stream().record_event(), limit_s, what)


def capture(call: Callable[[], object], num_calls: int, limit_s: float) -> torch.cuda.CUDAGraph:
    """`num_calls` calls as one graph, after one eager call (kernels compile, NCCL connects)."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        wait_idle(limit_s, "the first call")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(num_calls):
                call()
    return graph


def graph_microseconds(
    call: Callable[[], object],
    num_calls: int,
    limit_s: float,
    *,
    before_round: Callable[[], None] | None = None,
    rounds: int = _ROUNDS,
    replays: int = _REPLAYS,
) -> float:
    """Median time of one call among `num_calls` in a replayed graph, in microseconds.

    All ranks measure the same call. A replay ahead of the timed ones absorbs what they are apart;
    `before_round` may bring them together.

    Raises:
        CommTimeout: a wait took longer than `limit_s` seconds.
    """
    graph = capture(call, num_calls, limit_s)
    times = []
    for _ in range(rounds):
        if before_round is not None:
            before_round()
        begin, end = timing_event(), timing_event()
        graph.replay()
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        wait_for(end, limit_s, "a replayed graph")
        times.append(elapsed_microseconds(begin, end) / (replays * num_calls))
    return statistics.median(times)


def measure_in_graph(call: Callable[[], object], limit_s: float) -> float:
    """Microseconds of one call, as preflight takes them: quick, and without other collectives."""
    return graph_microseconds(call, _CALLS, limit_s)


def timing_event() -> torch.cuda.Event:
    """An event that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def elapsed_microseconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Between two events that have happened."""
    return float(begin.elapsed_time(end)) * 1000
