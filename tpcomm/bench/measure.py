"""How the bench times: 100 calls a graph, as the published figures of others are measured."""

from __future__ import annotations

from collections.abc import Callable

from tpcomm import graph_timer
from tpcomm.graph_timer import elapsed_microseconds, timing_event, wait_for
from tpcomm.staged import StagedCommunicator

CALLS_PER_GRAPH = 100
LIMIT_S = 15.0
_REPLAYS = 5
_ROUNDS = 7


def graph_microseconds(comm: StagedCommunicator, call: Callable[[], object]) -> float:
    """Median time of one call in a replayed graph, in microseconds. Collective."""
    return graph_timer.graph_microseconds(
        call,
        CALLS_PER_GRAPH,
        LIMIT_S,
        before_round=lambda: comm.barrier(LIMIT_S),
        rounds=_ROUNDS,
        replays=_REPLAYS,
    )


def eager_microseconds(comm: StagedCommunicator, call: Callable[[], object]) -> float:
    """Mean time of one call issued by the host, in a burst, in microseconds. Collective."""
    call()
    comm.barrier(LIMIT_S)
    begin, end = timing_event(), timing_event()
    begin.record()
    for _ in range(CALLS_PER_GRAPH):
        call()
    end.record()
    wait_for(end, LIMIT_S, "a burst of calls")
    return elapsed_microseconds(begin, end) / CALLS_PER_GRAPH
